"""Row 38: what is saved is whole or not there, whoever is killed or writes at the same time.

Also: everything goes through one function that makes it so, nothing is kept as a pickle, and a
file in a cache that turns out damaged is named, not fatal for the process.
"""

import ast
import errno
import io
import json
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from fused import small

from fastres import files
from fastres.bench.report import Report
from fastres.models.checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not hasattr(os, "fork"), reason="processes are forked to be killed in the middle"
)


@pytest.fixture
def writer(tmp_path):
    """A path with the first of two models in it, and both models."""
    path = tmp_path / "w.safetensors"
    models = [small(seed=seed) for seed in (1, 2)]
    save_checkpoint(models[0], path)
    return path, models


def child(work) -> int:
    """Run ``work`` in a forked process; its id."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def death_of(pid: int) -> int:
    """The signal that ended the process, or minus its exit code."""
    return -os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def content(path) -> int:
    """Which of the two models the file holds, read through the loader that users have."""
    target = small(seed=3)
    load_checkpoint(target, path)
    same = [
        all(
            torch.equal(v, target.state_dict()[k]) for k, v in small(seed=seed).state_dict().items()
        )
        for seed in (1, 2)
    ]
    assert any(same), "the file holds neither of the two models"
    return same.index(True)


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


class HalfWritten:
    """A file whose writer dies half-way through its first write."""

    def __init__(self, path, mode):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def write(self, data):
        self.path.write_bytes(data[: len(data) // 2])
        die()


PLACES = {
    "before a byte is written": ("open", die, 0),
    "half-way through": ("open", HalfWritten, 0),
    "before it is on disk": ("fsync", die, 0),
    "before the rename": ("replace", die, 0),
    "after the rename": ("_sync_directory", die, 1),
}


@pytest.mark.fault(38)
@pytest.mark.parametrize("place", PLACES)
def test_killed_at_every_step_the_file_is_the_old_or_the_new(writer, monkeypatch, place):
    path, models = writer
    name, replacement, expected = PLACES[place]

    def save():
        owner = files.os if name in ("fsync", "replace") else files
        monkeypatch.setattr(owner, name, replacement, raising=False)
        save_checkpoint(models[1], path)

    assert death_of(child(save)) == signal.SIGKILL
    assert content(path) == expected
    assert all(p.name.startswith(".w.safetensors.") for p in path.parent.iterdir() if p != path)
    save_checkpoint(models[1], path)
    assert content(path) == 1


@pytest.mark.fault(38)
def test_killed_at_any_moment(writer):
    """kill -9 from outside, at moments spread over a few saves."""
    path, models = writer
    moments = random.Random(0)

    def save_for_ever():
        while True:
            for model in models:
                save_checkpoint(model, path)

    for _ in range(20):
        pid = child(save_for_ever)
        time.sleep(moments.uniform(0, 0.03))
        os.kill(pid, signal.SIGKILL)
        assert death_of(pid) == signal.SIGKILL
        assert content(path) in (0, 1)


@pytest.mark.fault(38)
def test_two_writers_and_a_reader_lose_nothing(writer):
    path, models = writer

    def save_often(model):
        for _ in range(40):
            save_checkpoint(model, path)

    children = [child(lambda model=model: save_often(model)) for model in models]
    seen = [content(path) for _ in range(15)]
    assert [death_of(pid) for pid in children] == [0, 0]
    assert set(seen) <= {0, 1}
    assert os.listdir(path.parent) == [path.name]


@pytest.mark.fault(38)
@pytest.mark.parametrize("suffix", [".json", ".md", ".html"])
def test_reports_are_written_the_same_way(tmp_path, monkeypatch, suffix):
    path = tmp_path / f"r{suffix}"
    Report.now("first").write(path)
    first = path.read_bytes()
    assert b"first" in first

    def write():
        monkeypatch.setattr(files.os, "replace", die)
        Report.now("second").write(path)

    assert death_of(child(write)) == signal.SIGKILL
    assert path.read_bytes() == first
    if suffix == ".json":
        assert json.loads(first)["title"] == "first"


def sources():
    return sorted({p.resolve() for p in (ROOT / "fastres").rglob("*.py")})


def calls(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield node, ast.unparse(node.func)


@pytest.mark.fault(38)
def test_nothing_else_writes_files():
    """Every file that fastres makes is made by atomic_write."""
    found = []
    for path in sources():
        for node, name in calls(ast.parse(path.read_text())):
            short = name.rsplit(".", 1)[-1]
            writes = short in ("write_text", "write_bytes", "mkstemp", "copyfile", "savefig")
            if short == "open" and name in ("open", "io.open"):
                modes = [*node.args[1:2], *[k.value for k in node.keywords if k.arg == "mode"]]
                writes = any(set("wax+") & set(ast.literal_eval(mode)) for mode in modes)
            if writes:
                found.append((path.name, name))
    assert found == [("files.py", "open")]


@pytest.mark.fault(38)
def test_nothing_is_kept_as_a_pickle():
    for path in sources():
        tree = ast.parse(path.read_text())
        imported = {
            alias.name.split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in [*node.names, ast.alias(getattr(node, "module", None) or "")]
        }
        assert not imported & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
        for node, name in calls(tree):
            assert name not in ("torch.save", "numpy.save", "np.save"), path.name
            if name == "torch.load":
                assert {"weights_only": True}.items() <= {
                    k.arg: ast.literal_eval(k.value)
                    for k in node.keywords
                    if k.arg != "map_location"
                }.items(), path.name


@pytest.mark.fault(37)
def test_the_torch_required_is_past_the_known_holes_of_weights_only():
    """CVE-2025-32434 was closed in torch 2.6, CVE-2026-24747 in 2.10."""
    text = (ROOT / "pyproject.toml").read_text()
    line = next(line for line in text.splitlines() if line.strip().startswith('"torch>='))
    minimum = line.split(">=")[1].strip('", ').split(".")
    assert (int(minimum[0]), int(minimum[1])) >= (2, 10)


def test_of_a_file_that_is_too_large_no_more_is_read_than_shows_it(tmp_path, monkeypatch):
    taken = []

    class Counted(io.BufferedReader):
        def read(self, size=-1):
            data = super().read(size)
            taken.append(len(data))
            return data

    def opened(path, mode, opener):
        return Counted(io.FileIO(path, mode, opener=opener))

    monkeypatch.setattr(files, "open", opened, raising=False)
    path = tmp_path / "large.json"
    path.write_bytes(b"7" * 1000)
    with pytest.raises(ValueError, match="large.json is larger than 10 bytes"):
        files.read_text(path, 10)
    assert taken == [11]
    assert files.read_text(path, 1000) == "7" * 1000


@pytest.mark.fault(70)
@pytest.mark.parametrize("place", ["write", "replace"])
def test_an_error_of_the_system_names_the_target_alone(tmp_path, monkeypatch, place):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "beside", None, "target")

    monkeypatch.setattr(os, "fsync" if place == "write" else "replace", full)
    with pytest.raises(OSError, match="No space left") as found:
        files.atomic_write(tmp_path / "kept", b"new")
    assert str(found.value) == f"[Errno 28] No space left on device: '{tmp_path / 'kept'}'"
    assert not list(tmp_path.iterdir())


def test_a_text_that_is_none_is_named(tmp_path):
    (tmp_path / "names.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(ValueError, match=r"names.txt is no text in UTF-8: .* 0xe9"):
        files.read_text(tmp_path / "names.txt", 99)
