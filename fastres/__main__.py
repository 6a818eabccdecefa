"""``python -m fastres`` is the ``fastres`` command."""

from .cli import main

main()
