"""Every message that a user can provoke, against tests/tools/messages/snapshot.txt, and exit codes.

``python tests/tools/messages`` writes the snapshot anew, for a reader to judge.
"""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("h5py")
pytest.importorskip("PIL")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")
pytest.importorskip("onnxscript")
pytest.importorskip("triton")

from messages import batching, eight_bit, files, keras, models, serving, tools, training
from messages.provoke import CASES, UNREACHABLE, provoke_all, reachable, read_snapshot, sites

from fastres import cli

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
    """What each case says."""
    assert all(
        module.__name__
        for module in (batching, eight_bit, files, keras, models, serving, tools, training)
    )
    return provoke_all()


def test_every_message_is_as_in_the_snapshot(found):
    known = read_snapshot()
    assert {name: said.text for name, said in found.items()} == known
    assert list(known) == list(CASES)


def test_every_raise_is_provoked_or_known_to_be_unreachable(found):
    met = {place for said in found.values() for place in said.places}
    missing = [
        str(site)
        for site in sites()
        if reachable(site) and not any((site.module, line) in met for line in site.lines)
    ]
    assert missing == [], "add a case to tests/tools/messages, or the reason to UNREACHABLE"


def test_what_is_called_unreachable_exists():
    named = {name for site in sites() for name in (site.raises, str(site))}
    assert set(UNREACHABLE) <= named


def test_messages_name_what_is_wrong(found):
    """No bare exception of Python's own kind, no empty text, no address of an object."""
    for name, said in found.items():
        kind, _, text = said.text.partition(": ")
        assert len(text) > 8, name
        assert kind not in ("AttributeError", "IndexError", "AssertionError", "UnboundLocalError")
        assert not re.search(r"<\w+ object at|Traceback", text), name


def test_mistakes_on_the_command_line_end_with_2_and_one_line(found):
    for name in (n for n in CASES if n.startswith("fastres ")):
        *lines, code = found[name].text.split("\n")
        assert code == "exit code 2", name
        assert [line for line in lines if not line.startswith("note: ")] == lines[-1:], name
        assert lines[-1].startswith("error: "), name


@pytest.mark.parametrize("command", ["plan resnet5", "plot resnet18 model.gif", "bench"])
def test_a_process_shows_no_traceback(command, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "fastres", *command.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_the_page_documents_every_command_and_exit_code():
    text = (ROOT / "docs" / "cli.md").read_text()
    for command, (_, example) in cli.COMMANDS.items():
        assert f"`fastres {command}" in text
        assert example in text
    assert [int(code) for code in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)] == [0, 1, 2, 130]
