"""The HTML form of a report: one file, readable in light and dark, by eye and by screen reader."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from . import plots, results

if TYPE_CHECKING:
    from .report import Report


def page(report: Report) -> str:
    """The whole document, from ``report.html.jinja``."""
    from jinja2 import Environment, PackageLoader, StrictUndefined  # import fastres is light

    templates = Environment(
        loader=PackageLoader("fastres", "bench"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    templates.filters["grey"] = _grey
    facts = flatten(report.environment.to_dict())
    template = templates.get_template("report.html.jinja")
    return template.render(report=report, facts=facts, plots=plots, results=results)


def _grey(value: float) -> str:
    """The colour of a pixel in [0, 1]."""
    return "#" + 3 * f"{round(255 * min(max(value, 0.0), 1.0)):02x}"


def flatten(value: Any, name: str = "") -> list[tuple[str, str]]:
    """``(dotted name, text)`` of every leaf in nested dicts and lists."""
    if isinstance(value, dict):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, list):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        return [(name, str(value))]
    return [pair for key, item in items for pair in flatten(item, f"{name}.{key}".strip("."))]
