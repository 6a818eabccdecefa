"""The mutation suite: known bugs are injected one by one, and the tests must notice each.

``python tests/mutants.py``, or ``make mutants``, works on copies of the checkout in a temporary
folder and writes docs/mutants.md. A mutant counts as killed when a test fails with it that passes
without it. ``--only words`` runs those whose name or file has the words, and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_suffix(".txt")
PAGE = ROOT / "docs" / "mutants.md"
LIMIT = 600  # seconds for the tests of one mutant
HEAD = """# The mutation suite

Known bugs, injected one at a time by `make mutants` (`tests/mutants.py`); the ordinary tests must
notice each. A bug counts as killed when a test fails with it that passes without it.

"""


@dataclass(frozen=True)
class Mutant:
    """In ``file``, the only occurrence of ``old`` becomes ``new``; ``tests`` are to notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]


def read_mutants(text: str) -> list[Mutant]:
    """The bugs of mutants.txt, in order."""
    found: list[Mutant] = []
    file, tests = "", ()
    for block in text.split("\n\n")[1:]:
        lines = block.strip("\n").split("\n")
        if lines[0].startswith("# "):
            file, _, names = lines[0][2:].partition(": ")
            tests = tuple(f"tests/test_{name}.py" for name in names.split())
            continue
        old = "\n".join(line[2:] for line in lines[1:] if line.startswith("-"))
        new = "\n".join(line[2:] for line in lines[1:] if line.startswith("+"))
        found.append(Mutant(lines[0], file, old if new else old + "\n", new, tests))
    return found


MUTANTS = read_mutants(LIST.read_text())


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: killed by a test, or the reason why not."""

    mutant: Mutant
    killer: str = ""
    reason: str = ""
    seconds: float = 0.0


def applies(mutant: Mutant, root: Path = ROOT) -> bool:
    """Whether the text to be changed is in the file, once."""
    return (root / mutant.file).read_text().count(mutant.old) == 1


def copy_checkout(target: Path) -> None:
    """The files of the checkout as they are now, those that git ignores left out."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        source, copied = ROOT / name, target / name
        if source.exists():
            copied.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, copied, follow_symlinks=False)


def first_failure(root: Path, tests: list[str], limit: float = LIMIT) -> tuple[str, str]:
    """The first test that fails, or ``""``; and what else ended the run: an error, the limit."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rf", "-p", "no:cacheprovider"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        done = subprocess.run(
            [*command, "-W", "ignore", *tests],
            cwd=root,
            env=environment,
            capture_output=True,
            text=True,
            timeout=limit,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "", f"no verdict within {limit:.0f} s"
    found = re.findall(r"^FAILED (\S+\.py::.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode == 1 and found:
        return found[0], ""
    return "", "" if done.returncode == 0 else done.stdout.strip()[-300:]


def judge(mutant: Mutant, clean: Path, mutated: Path) -> Verdict:
    """Inject the bug, run the tests that should notice, take the bug out again."""
    started = time.monotonic()
    if not applies(mutant, mutated):
        return Verdict(mutant, reason="the text to change is not there (once): update the mutant")
    path = mutated / mutant.file
    original = path.read_text()
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        killer, reason = "", ""
        for test in mutant.tests:
            if not killer and not reason and (mutated / test).exists():
                killer, reason = first_failure(mutated, [test])
        if killer and first_failure(clean, [killer])[0]:
            killer, reason = "", f"{killer} fails without the bug too"
    finally:
        path.write_text(original)
    reason = reason or ("" if killer else "no test noticed")
    return Verdict(mutant, killer, reason, time.monotonic() - started)


def judge_all(mutants: list[Mutant], jobs: int) -> list[Verdict]:
    """All verdicts, in order; each job has copies of its own."""
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        pairs: Queue[tuple[Path, Path]] = Queue()
        for index in range(jobs):
            pair = Path(folder, f"clean{index}"), Path(folder, f"mutated{index}")
            for copied in pair:
                copy_checkout(copied)
            pairs.put(pair)

        def work(mutant: Mutant) -> Verdict:
            pair = pairs.get()
            try:
                verdict = judge(mutant, *pair)
            finally:
                pairs.put(pair)
            mark = "killed  " if verdict.killer else "SURVIVED"
            note = verdict.killer or verdict.reason
            print(f"{mark} {verdict.seconds:4.0f} s  {mutant.file}: {mutant.name} | {note}")
            sys.stdout.flush()
            return verdict

        with ThreadPoolExecutor(jobs) as pool:
            return list(pool.map(work, mutants))


def page(verdicts: list[Verdict]) -> str:
    """docs/mutants.md."""
    killed = sum(bool(v.killer) for v in verdicts)
    lines = [HEAD + f"{killed} of {len(verdicts)} killed.", ""]
    lines += ["| file | bug | noticed by |", "|---|---|---|"]
    for v in verdicts:
        what = f"`{v.killer}`" if v.killer else f"**survived**: {v.reason}"
        what = what.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {v.mutant.file} | {v.mutant.name} | {what} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="words of the names or files to run")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    arguments = parser.parse_args()
    chosen = [m for m in MUTANTS if arguments.only in f"{m.file}: {m.name}"]
    verdicts = judge_all(chosen, arguments.jobs)
    survivors = [v for v in verdicts if not v.killer]
    if not arguments.only:
        PAGE.write_text(page(verdicts))
    print(f"{len(verdicts) - len(survivors)} of {len(verdicts)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
