"""Every numbered fault has its tests, and the committed pages speak of those that exist."""

import ast
import re

from fault_matrix import GPU, PAGE, ROWS, all_tests, kept, row_tests, rows_of


def test_every_row_has_a_test():
    assert list(ROWS) == list(range(1, len(ROWS) + 1))
    assert list(row_tests()) == list(ROWS)


def test_the_page_lists_the_tests_that_exist_and_no_others():
    text = PAGE.read_text()
    sections = re.split(r"\n## Row (\d+)\n", text)[1:]
    listed = {
        int(row): re.findall(r"^- `(tests/\S+::\w+)`: ", body, re.MULTILINE)
        for row, body in zip(sections[::2], sections[1::2], strict=True)
    }
    assert listed == row_tests(), "run `make fault-matrix`"
    assert all(f"| {fault} |" in text for fault in ROWS.values())


def test_the_page_tells_a_result_of_each_and_no_failure():
    results = kept()
    assert sorted(results) == all_tests()
    clear = re.compile(rf"{GPU}$|\d+ passed")
    assert [f"{t}: {r}" for t, r in results.items() if not clear.match(r)] == []


def test_a_mark_of_two_rows_counts_for_both():
    marked, plain = (
        "@pytest.mark.fault(14, 18)\n@pytest.mark.slow\n",
        "@pytest.mark.parametrize('n', [9])\n",
    )
    assert rows_of(ast.parse(marked + "def test_a(): pass").body[0]) == [14, 18]
    assert rows_of(ast.parse(plain + "def test_a(n): pass").body[0]) == []
