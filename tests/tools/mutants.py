"""The mutation suite: known bugs are injected one by one, and the tests must notice each.

``make mutants`` works on copies of the checkout in a temporary folder and writes docs/mutants.md. A
mutant counts as killed when a test fails with it that passes without it. Verdicts are kept in
out/mutants.json as they come: ``--resume`` goes on with the mutants that are not there yet,
``--minutes`` stops after a while, and ``--only words`` judges those whose name or file has the
words, again where they were judged before.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from queue import Queue
from threading import Lock

ROOT = Path(__file__).parents[2]
LIST = Path(__file__).with_suffix(".txt")
PAGE = ROOT / "docs" / "mutants.md"
KEPT = ROOT / "out" / "mutants.json"
LIMIT = 600  # seconds for the tests of one mutant
HEAD = """# The mutation suite

Known bugs, injected one at a time by `make mutants` from `tests/tools/mutants.txt`; the ordinary
tests must notice each. A bug counts as killed when a test fails with it that passes without it.
Seconds are of the tests until then, on two shared cores.

"""


@dataclass(frozen=True)
class Mutant:
    """In ``file``, the only occurrence of ``old`` becomes ``new``; ``tests`` are to notice."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def key(self) -> str:
        """Names this very change; a verdict about another one does not count."""
        return sha256(
            "\0".join((self.file, self.name, self.old, self.new, *self.tests)).encode()
        ).hexdigest()


FILES = {p.stem: p.relative_to(ROOT).as_posix() for p in (ROOT / "tests").rglob("test_*.py")}


def files_of(names: str) -> tuple[str, ...]:
    """By the name alone, whichever folder holds it: file names are unique."""
    return tuple(FILES.get(f"test_{name}", f"tests/test_{name}.py") for name in names.split())


def read_mutants(text: str) -> list[Mutant]:
    """The bugs of mutants.txt, in order."""
    found: list[Mutant] = []
    file, tests = "", ()
    for block in text.split("\n\n")[1:]:
        lines = block.strip("\n").split("\n")
        if lines[0].startswith("# "):
            file, _, names = lines[0][2:].partition(": ")
            tests = files_of(names)
            continue
        name, _, first = lines[0].partition(" @ ")
        old = "\n".join(line[2:] for line in lines[1:] if line.startswith("-"))
        new = "\n".join(line[2:] for line in lines[1:] if line.startswith("+"))
        order = tuple(dict.fromkeys([*files_of(first), *tests]))
        found.append(Mutant(name, file, old if new else old + "\n", new, order))
    return found


MUTANTS = read_mutants(LIST.read_text())


@dataclass(frozen=True)
class Verdict:
    """What became of a mutant: killed by a test, or the reason why not."""

    killer: str = ""
    reason: str = ""
    seconds: float = 0.0


Verdicts = dict[str, Verdict]


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
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider"]
    command.append("--sweep")
    command.append("--hypothesis-profile=unshrunk")
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
    found = re.findall(r"^(?:FAILED|ERROR) (\S+\.py::.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    if done.returncode == 1 and found:
        return found[0], ""
    return "", "" if done.returncode == 0 else done.stdout.strip()[-300:]


class Workshop:
    """Two copies of the checkout: one to spoil, and one to see whether a test passes without."""

    def __init__(self, folder: Path) -> None:
        self.clean, self.mutated = folder / "clean", folder / "mutated"
        self._passing: set[str] = set()
        for copied in (self.clean, self.mutated):
            copy_checkout(copied)

    def judge(self, mutant: Mutant) -> Verdict:
        """Inject the bug, run the tests that should notice, take the bug out again."""
        if not applies(mutant, self.mutated):
            return Verdict(reason="the text to change is not there (once): update the mutant")
        started = time.monotonic()
        path = self.mutated / mutant.file
        original = path.read_text()
        path.write_text(original.replace(mutant.old, mutant.new))
        try:
            verdict = self._noticed(mutant.tests)
        finally:
            path.write_text(original)
        return Verdict(verdict.killer, verdict.reason, time.monotonic() - started)

    def _noticed(self, tests: tuple[str, ...]) -> Verdict:
        for test in tests:
            killer, reason = first_failure(self.mutated, [test])
            if killer and not self._passes(killer):
                return Verdict(reason=f"{killer} fails without the bug too")
            if killer or reason:
                return Verdict(killer, reason)
        return Verdict(reason="no test noticed")

    def _passes(self, test: str) -> bool:
        if test not in self._passing and first_failure(self.clean, [test]) == ("", ""):
            self._passing.add(test)
        return test in self._passing


def judge_all(mutants: list[Mutant], known: Verdicts, jobs: int, minutes: float) -> None:
    """Add the verdicts to ``known`` and to the file, each as it comes; no new one after a while."""
    end, lock = time.monotonic() + 60 * minutes, Lock()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        workshops: Queue[Workshop] = Queue()
        for index in range(jobs):
            workshops.put(Workshop(Path(folder, str(index))))

        def work(mutant: Mutant) -> None:
            if time.monotonic() >= end:
                return
            workshop = workshops.get()
            try:
                verdict = workshop.judge(mutant)
            finally:
                workshops.put(workshop)
            with lock:
                known[mutant.key] = verdict
                keep(known)
            mark = "killed  " if verdict.killer else "SURVIVED"
            note = verdict.killer or verdict.reason
            print(f"{mark} {verdict.seconds:4.0f} s  {mutant.file}: {mutant.name} | {note}")
            sys.stdout.flush()

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(work, mutants))


def kept() -> Verdicts:
    """The verdicts of earlier runs."""
    if not KEPT.exists():
        return {}
    return {key: Verdict(**verdict) for key, verdict in json.loads(KEPT.read_text()).items()}


def keep(verdicts: Verdicts) -> None:
    KEPT.parent.mkdir(exist_ok=True)
    temporary = KEPT.with_suffix(".tmp")
    temporary.write_text(json.dumps({key: asdict(v) for key, v in verdicts.items()}, indent=1))
    temporary.replace(KEPT)


def page(mutants: list[Mutant], verdicts: Verdicts) -> str:
    """docs/mutants.md."""
    found = [verdicts.get(m.key) for m in mutants]
    killed = sum(bool(v and v.killer) for v in found)
    lines = [f"{HEAD}{killed} of {len(found)} killed, {found.count(None)} not judged yet.", ""]
    lines += ["| file | bug | noticed by | s |", "|---|---|---|---|"]
    for mutant, verdict in zip(mutants, found, strict=True):
        if verdict is None:
            lines.append(f"| {mutant.file} | {mutant.name} | not judged yet | |")
            continue
        what = f"`{verdict.killer}`" if verdict.killer else f"**survived**: {verdict.reason}"
        what = what.replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {mutant.file} | {mutant.name} | {what} | {verdict.seconds:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="words of the names or files to run")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--resume", action="store_true", help="keep what earlier runs found")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin none after this")
    arguments = parser.parse_args()
    known = kept() if arguments.resume or arguments.only else {}
    chosen = [m for m in MUTANTS if arguments.only in f"{m.file}: {m.name}"]
    if arguments.resume:
        chosen = [m for m in chosen if m.key not in known]
    judge_all(chosen, known, arguments.jobs, arguments.minutes)
    judged = [known[m.key] for m in MUTANTS if m.key in known]
    killed = sum(bool(v.killer) for v in judged)
    print(f"{killed} of {len(MUTANTS)} killed, {len(MUTANTS) - len(judged)} not judged yet")
    PAGE.write_text(page(MUTANTS, known))
    return 0 if killed == len(MUTANTS) else 1


if __name__ == "__main__":
    sys.exit(main())
