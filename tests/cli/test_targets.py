"""Files that are written: full disks, signals, links, pipes and targets that cannot be written.

What needs a process of its own is forked, so that limits and signals meet it alone.
"""

import importlib
import os
import signal
import stat
import traceback
import warnings

import pytest
import torch
from fused import images, small
from torch import nn

import fastres
from fastres import cli, files
from fastres.backends import kernel_choice
from fastres.bench import report
from fastres.bench.report import Report
from fastres.files import atomic_write, check_target

resource = pytest.importorskip("resource")
EXPORT = importlib.import_module("fastres.formats.export")  # fastres.export is the function


@pytest.fixture(scope="module")
def fast():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    return fastres.optimize(model.eval(), verify=False)


@pytest.fixture(scope="module")
def fused(fast, tmp_path_factory):
    """The fused model's file, for commands to start from."""
    path = tmp_path_factory.mktemp("source") / "fused.safetensors"
    fastres.save(fast, path)
    return str(path)


def measured():
    found = kernel_choice.Measurement({f"kernel{i}": 1.0 for i in range(100)})
    return {"case": {1: found}}


WRITERS = {
    "weights.safetensors": lambda path, fast: fastres.save_checkpoint(small(), path),
    "fused.safetensors": lambda path, fast: fastres.save(fast, path),
    "model.pt2": lambda path, fast: fastres.export(fast, path, images()),
    "model.onnx": lambda path, fast: fastres.export(fast, path, images()),
    "model.svg": lambda path, fast: fastres.plot_model(small(), path),
    "model.png": lambda path, fast: fastres.plot_model(small(), path),
    "report.json": lambda path, fast: Report.now("a title").write(path),
    "report.html": lambda path, fast: Report.now("a title").write(path),
    "cases.jsonl": lambda path, fast: report.started(path),
    "tuned.json": lambda path, fast: kernel_choice.store(path, "a machine", measured()),
}
COMMANDS = {
    "a.safetensors": ("convert",),
    "a.pt2": ("export", "--size", "32"),
    "a.svg": ("plot", "--size", "32"),
}
EXPORTS = ("model.pt2", "model.onnx")


def command(fused, target):
    name, *options = COMMANDS.get(os.path.basename(target), ("export",))
    return [name, fused, str(target), *options]


def ended(work) -> int:
    """The exit code of ``work`` in a forked process; minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            code = work() or 0
        except SystemExit as error:
            code = error.code
        except KeyboardInterrupt:
            code = 130
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def left(folder):
    """What lies in the folder, but for the empty lock beside a file of measurements."""
    return sorted(p.name for p in folder.iterdir() if p.suffix != ".lock")


@pytest.mark.fault(70)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "before"),
    [
        *((name, "an older file") for name in WRITERS),
        *((name, "nothing") for name in WRITERS if name not in EXPORTS),
    ],
)
def test_a_full_disk_is_one_error_and_leaves_what_was_there(tmp_path, fast, name, before):
    """A limit on the size of files stands for the disk: the write itself fails, in the kernel."""
    path = tmp_path / name
    if before != "nothing":
        path.write_bytes(b"{}")

    def write():
        resource.setrlimit(resource.RLIMIT_FSIZE, (256, 256))
        with pytest.raises(OSError, match=f"File too large: .*{name}"):
            WRITERS[name](path, fast)

    assert ended(write) == 0
    assert left(tmp_path) == ([] if before == "nothing" else [name])
    assert before == "nothing" or path.read_bytes() == b"{}"


@pytest.mark.fault(70)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk_is_one_line_and_exit_code_2(tmp_path, fused, capsys, name):
    def run():
        resource.setrlimit(resource.RLIMIT_FSIZE, (256, 256))
        code = cli.run(command(fused, tmp_path / name))
        said = capsys.readouterr()
        assert said.out == ""
        assert said.err.startswith("error: ")
        assert said.err.count("\n") == 1
        return code

    assert ended(run) == 2
    assert left(tmp_path) == []


@pytest.mark.fault(70)
def test_a_full_disk_leaves_whole_lines_of_finished_cases(tmp_path):
    path = tmp_path / "cases.jsonl"
    case = type("Case", (), {"to_dict": lambda self: {"a": "b" * 5000}})()

    def run():
        append = report.started(path)
        size = path.stat().st_size
        append(case)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 6000, size + 6000))
        with pytest.raises(OSError, match="File too large"):
            append(case)

    assert ended(run) == 0
    text = path.read_text()
    assert text.endswith("\n")
    assert text.count("\n") == 2


@pytest.mark.fault(70)
@pytest.mark.filterwarnings("ignore")
def test_an_onnx_file_in_two_parts(tmp_path, fast, monkeypatch):
    """As above the limit of one file: written and checked beside the target, then moved there."""
    onnxruntime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(EXPORT, "PROTOBUF_LIMIT", 0)
    real = tmp_path / "real"
    real.mkdir()
    link = tmp_path / "model.onnx"
    link.symlink_to(real / "there.onnx")
    assert fastres.export(fast, link, images()).max_abs < 1e-4
    assert link.is_symlink()
    assert left(real) == ["there.onnx", "there.onnx.data"]
    session = onnxruntime.InferenceSession(real / "there.onnx")
    (answer,) = session.run(None, {session.get_inputs()[0].name: images().numpy()})
    torch.testing.assert_close(torch.from_numpy(answer), fast(images()), rtol=1e-4, atol=1e-4)

    def full():
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
        with pytest.raises(OSError, match="File too large"):
            fastres.export(fast, tmp_path / "other.onnx", images())

    assert ended(full) == 0
    assert left(tmp_path) == ["model.onnx", "real"]


SIGNALS = {signal.SIGTERM: 143, signal.SIGHUP: 129, signal.SIGINT: 130}


@pytest.fixture
def heeded():
    """The signals that nohup, or a shell behind a job, has told this process to ignore."""
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        default = signal.default_int_handler if number is signal.SIGINT else signal.SIG_DFL
        signal.signal(number, default)
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def killing_at_fsync(monkeypatch, number):
    """The signal arrives when all bytes are in the temporary file."""
    monkeypatch.setattr(files.os, "fsync", lambda _: os.kill(os.getpid(), number))


@pytest.mark.fault(71)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("model.pt2", signal.SIGTERM),
        *((n, s) for n in ("weights.safetensors", "report.json", "tuned.json") for s in SIGNALS),
    ],
)
def test_signals_while_writing_leave_nothing(heeded, tmp_path, fast, monkeypatch, name, number):
    killing_at_fsync(monkeypatch, number)
    assert ended(lambda: WRITERS[name](tmp_path / name, fast)) == SIGNALS[number]
    assert left(tmp_path) == []


@pytest.mark.fault(71)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda n: n.name)
def test_commands_end_with_the_signals_code(heeded, tmp_path, fused, monkeypatch, number):
    killing_at_fsync(monkeypatch, number)
    monkeypatch.setattr("sys.argv", ["fastres", *command(fused, tmp_path / "a.safetensors")])
    assert ended(cli.main) == SIGNALS[number]
    assert left(tmp_path) == []


@pytest.mark.fault(71)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda n: n.name)
def test_signals_during_the_work_of_a_command(heeded, fused, tmp_path, monkeypatch, number):
    """Also where torch.onnx wraps what the signal raised in an error of its own."""

    def exporter(*_, **__):
        try:
            os.kill(os.getpid(), number)
        except BaseException as error:
            raise RuntimeError("Failed to export the model") from error

    monkeypatch.setattr(torch.onnx, "export", exporter)
    monkeypatch.setattr("sys.argv", ["fastres", *command(fused, tmp_path / "b.onnx")])
    assert ended(cli.main) == SIGNALS[number]
    assert left(tmp_path) == []


@pytest.mark.fault(71)
def test_handlers_of_the_program_stay(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("ours"))
    try:
        handler = signal.getsignal(signal.SIGTERM)
        with files.exiting_on_signals():
            os.kill(os.getpid(), signal.SIGTERM)
        assert seen == ["ours"]
        assert signal.getsignal(signal.SIGTERM) is handler
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        atomic_write(tmp_path / "a", b"data")
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.fault(72)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "dangling"),
    [
        *((name, False) for name in WRITERS),
        *((name, True) for name in WRITERS if name not in EXPORTS),
    ],
)
def test_a_link_is_written_through(tmp_path, fast, name, dangling):
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    real, link, between = folder / "real", tmp_path / name, tmp_path / "between"
    if not dangling:
        real.write_bytes(b"{}")
        real.chmod(0o640)
    between.symlink_to("elsewhere/real")
    link.symlink_to(between)
    WRITERS[name](link, fast)
    assert link.is_symlink()
    assert between.is_symlink()
    assert real.stat().st_size > 2
    assert link.read_bytes() == real.read_bytes()
    assert dangling or stat.S_IMODE(real.stat().st_mode) == 0o640
    assert left(folder) == ["real"]


def ring(path):
    path.symlink_to(path)


ODD = {
    "a pipe": (os.mkfifo, "no file but a folder, pipe or device"),
    "a folder": (os.mkdir, "no file but a folder, pipe or device"),
    "a device": (lambda path: path.symlink_to("/dev/null"), "no file but a folder, pipe or dev"),
    "a pipe behind a link": (
        lambda path: (os.mkfifo(f"{path}.pipe"), path.symlink_to(f"{path}.pipe")),
        "no file but a folder, pipe or device",
    ),
    "a ring of links": (ring, "Too many levels of symbolic links"),
    "a link to a missing folder": (
        lambda path: path.symlink_to(path.parent / "gone" / "file"),
        "there is no folder",
    ),
}


@pytest.mark.fault(72)
@pytest.mark.parametrize("kind", [k for k in ODD if k != "a link to a missing folder"])
@pytest.mark.parametrize("name", WRITERS)
def test_what_is_no_file_is_refused(tmp_path, fast, monkeypatch, name, kind):
    make, message = ODD[kind]
    path = tmp_path / name
    make(path)
    before = os.lstat(path)
    with pytest.raises(OSError, match=message):
        WRITERS[name](path, fast)
    after = os.lstat(path)
    assert (after.st_ino, after.st_mode) == (before.st_ino, before.st_mode)
    assert not [name for name in left(tmp_path) if name.startswith(".")]


def no_work(*_, **__):
    raise AssertionError("work was begun before the target was looked at")


@pytest.fixture
def idle(monkeypatch):
    """Neither networks nor files are read, nor is anything traced, exported or measured."""
    for place in (
        "fastres.batch.network.read_network",
        "fastres.models.pretrained.load_network",
        "fastres.perf.autotune.tune",
        "fastres.bench.demo.demo",
        "fastres.bench.run.run",
        "fastres.graph.diagram._boxes",
        "fastres.formats.fused_file._describe",
    ):
        monkeypatch.setattr(place, no_work)
    monkeypatch.setattr(EXPORT, "_run", no_work)


TARGETS = {
    "missing folder": ("gone/{}", "there is no folder"),
    "folder is a file": ("file/{}", "is not a folder to write in"),
    "a pipe": ("pipe{}", "no file but a folder, pipe or device"),
}
COMMANDS_THAT_WRITE = [
    *(("convert", "resnet18", "m.safetensors"), ("export", "resnet18", "m.pt2")),
    *(("export", "resnet18", "m.onnx"), ("plot", "resnet18", "m.svg")),
    ("plot", "resnet18", "m.png"),
]


@pytest.mark.fault(73)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("arguments", COMMANDS_THAT_WRITE, ids=" ".join)
def test_targets_are_looked_at_before_any_work(
    tmp_path, monkeypatch, idle, capsys, arguments, target
):
    monkeypatch.chdir(tmp_path)
    name, message = TARGETS[target]
    (tmp_path / "file").write_bytes(b"")
    path = name.format(arguments[-1])
    if target == "a pipe":
        os.mkfifo(path)
    assert cli.run([*arguments[:-1], path]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.fault(73)
@pytest.mark.parametrize(
    "arguments",
    [
        ("convert", "resnet18", "m.pth"),
        ("export", "resnet18", "m.pb"),
        ("plot", "resnet18", "m.gif"),
        ("demo", "--report", "r.pdf"),
        ("demo", "--report", "file/r.html"),
        ("bench", "resnet18", "--output", "file/r"),
        ("bench", "resnet18", "--output", "out"),
        ("tune", "resnet18", "--cache", "file/tuned.json"),
        ("tune", "resnet18", "--cache", "folder"),
    ],
    ids=" ".join,
)
def test_suffixes_reports_and_measurements(tmp_path, monkeypatch, idle, capsys, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    (tmp_path / "out.jsonl").mkdir()
    assert cli.run(list(arguments)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    assert left(tmp_path) == ["file", "folder", "out.jsonl"]


@pytest.mark.fault(73)
def test_write_protection_is_seen_before_any_work(tmp_path, fast, monkeypatch, idle):
    """Root may write everything, so the answer of the system is put into its mouth."""
    path = tmp_path / "m.svg"
    path.write_bytes(b"old")
    real = os.access
    monkeypatch.setattr(os, "access", lambda p, mode: str(p) != str(path) and real(p, mode))
    with pytest.raises(PermissionError, match="it is write-protected"):
        fastres.plot_model(small(), path)
    monkeypatch.setattr(os, "access", lambda p, mode: False)
    for name, write in WRITERS.items():
        with pytest.raises(PermissionError, match="is not a folder to write in"):
            write(tmp_path / f"new-{name}", fast)


@pytest.mark.fault(73)
def test_names_at_the_limit_of_the_file_system(tmp_path):
    longest = tmp_path / f"{'n' * 250}.json"
    atomic_write(longest, b"data")
    assert longest.read_bytes() == b"data"
    with pytest.raises(OSError, match="File name too long"):
        check_target(tmp_path / f"{'n' * 300}.json")


@pytest.mark.fault(73)
def test_missing_packages_are_noticed_before_any_work(tmp_path, idle, capsys, monkeypatch):
    for arguments, package in (
        (("export", "resnet18", "m.onnx"), "onnxscript"),
        (("plot", "resnet18", "m.png"), "PIL"),
    ):
        monkeypatch.setitem(__import__("sys").modules, package, None)
        assert cli.run([*arguments[:2], str(tmp_path / arguments[2])]) == 2
        assert "cannot be imported" in capsys.readouterr().err


def test_writing_gives_no_warning(tmp_path, fast):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastres.export(fast, tmp_path / "model.pt2", images())
