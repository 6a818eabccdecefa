"""The mutation suite's list fits the code, and its page tells that each bug was noticed."""

import re

from mutants import MUTANTS, PAGE, ROOT, Mutant, applies, page, read_mutants


def test_every_bug_can_be_injected():
    """Else the code has moved on: change the text in tests/tools/mutants.txt."""
    assert [f"{m.file}: {m.name}" for m in MUTANTS if not applies(m)] == []
    assert [t for m in MUTANTS for t in m.tests if not (ROOT / t).exists()] == []
    assert all(m.tests and m.old != m.new for m in MUTANTS)


def test_there_are_many_and_of_every_kind():
    assert len({(m.file, m.name) for m in MUTANTS}) == len(MUTANTS) >= 30
    files = {m.file for m in MUTANTS}
    for part in ("graph/fold", "graph/plan", "graph/trace", "models/checkpoint"):
        assert f"fastres/{part}.py" in files
    for part in ("executor", "guards", "live", "verify"):
        assert f"fastres/runtime/{part}.py" in files
    assert len([f for f in files if f.startswith("kernels/")]) >= 4


def test_the_page_lists_the_same_bugs_and_no_survivor():
    text = PAGE.read_text()
    row = r"^\| (\S+\.py) \| (.*?) \| (?:`(\S+?)::|not judged yet )"
    rows = re.findall(row, text, re.MULTILINE)
    listed = [(file, name) for file, name, _ in rows]
    assert listed == [(m.file, m.name) for m in MUTANTS], "run `make mutants`"
    killers = [killer for *_, killer in rows if killer]
    waiting = len(rows) - len(killers)
    assert f"{len(killers)} of {len(MUTANTS)} killed, {waiting} not judged yet." in text
    assert set(killers) <= {t for m in MUTANTS for t in m.tests}


def test_the_list_is_read_as_it_is_written():
    text = "About it.\n\n# fastres/a.py: one two\n\na bug @ three\n- x = 1\n+ x = 2\n\n"
    text += "another\n- drop()"
    tests = ("tests/test_one.py", "tests/test_two.py")
    assert read_mutants(text) == [
        Mutant("a bug", "fastres/a.py", "x = 1", "x = 2", ("tests/test_three.py", *tests)),
        Mutant("another", "fastres/a.py", "drop()\n", "", tests),
    ]
    assert page([], {}).endswith("|---|---|---|---|\n")
