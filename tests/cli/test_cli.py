"""The command line: exit codes, one-line errors, JSON, help. Commands run in this process."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

import fastres
from fastres import cli
from fastres.bench import report
from fastres.bench import run as bench
from fastres.bench.results import Picture

ROOT = Path(__file__).parents[2]
COMMANDS = ("demo", "bench", "verify", "classify", "summary", "plan", "roofline", "env")
QUICK = (
    *("--rounds", "1", "--seconds", "0", "--size", "32", "--batch", "2"),
    *("--device", "cpu", "--dtype", "float32"),
)


@pytest.fixture
def run(capsys):
    """``run(*arguments)`` is (exit code, standard output, standard error)."""

    def call(*arguments):
        code = cli.run(list(arguments))
        return code, *capsys.readouterr()

    return call


def flat(text):
    return " ".join(text.split())


MISTAKES = {
    ("plan", "resnet5"): ("unknown model 'resnet5'; did you mean resnet56, resnet50, resnet152?"),
    ("plan", "resnet18", "--dtype", "int8"): (
        "dtype must be one of float32, float16, bfloat16; got 'int8'"
    ),
    ("plan", "resnet18", "--device", "tpu"): "device must be auto, cpu or cuda; got 'tpu'",
    ("plan", "resnet18", "--device", "cuda:99"): (
        f"device cuda:99 is not here: torch sees {torch.cuda.device_count()} CUDA devices"
    ),
    ("plan", "resnet18", "--backend", "cudnn"): (
        "backend must be one of 'auto', 'triton', 'torch', got 'cudnn'"
    ),
    ("plan", "resnet18", "--checkpoint", "gone.pth"): "no checkpoint file at gone.pth",
    ("bench", "resnet18", "--batch", "1,x"): ("--batch takes integers such as 1,8,32; got '1,x'"),
    ("bench", "resnet18", "--batch", "0"): "batch must be at least 1, got 0",
    ("bench", "resnet18", "--dtype", "float31"): (
        "dtype must be one of float32, float16, bfloat16, int8; got 'float31'"
    ),
    ("demo", "--report", "report.pdf"): ("a report ends in .json, .md, .html; got 'report.pdf'"),
    ("verify", "resnet18", "--weights", "V9"): (
        "unknown weights 'V9' for resnet18; available: DEFAULT, IMAGENET1K_V1"
    ),
    ("nonsense",): "No such command 'nonsense'.",
}


@pytest.mark.parametrize(("arguments", "message"), MISTAKES.items(), ids=map(" ".join, MISTAKES))
def test_a_mistake_is_one_line_and_exit_code_2(run, arguments, message):
    assert run(*arguments) == (2, "", f"error: {message}\n")


@pytest.mark.parametrize(
    "arguments", [("bench",), ("plan", "a", "b"), ("verify", "m", "--size", "0")]
)
def test_mistakes_that_the_parser_finds_are_one_line_too(run, arguments):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_an_error_of_many_lines_is_joined(run, tmp_path):
    path = tmp_path / "other.pth"
    state = fastres.resnet18().state_dict()
    del state["bn1.weight"]
    torch.save(state | {"stray": torch.ones(1)}, path)
    code, _, err = run("plan", "resnet18", "--checkpoint", str(path))
    assert code == 2
    assert err.count("\n") == 1
    assert err.endswith("(2 problems); missing: bn1.weight; unexpected: stray\n")


def test_a_bug_of_ours_is_not_dressed_up_as_a_mistake(run, monkeypatch):
    def broken(name, **kwargs):
        raise KeyError("a bug")

    monkeypatch.setattr("fastres.models.pretrained.create_model", broken)
    with pytest.raises(KeyError):
        run("plan", "resnet18")


def test_the_traceback_can_be_asked_for(run, monkeypatch):
    monkeypatch.setenv("FASTRES_TRACEBACK", "1")
    with pytest.raises(fastres.errors.UnknownModelError):
        run("plan", "resnet5")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example_of_the_command(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"Example: fastres {command}" in flat(out)


def test_the_help_lists_the_commands_and_the_exit_codes(run):
    for arguments in ((), ("--help",)):
        code, out, _ = run(*arguments)
        assert code == 0
        assert all(command in out for command in COMMANDS)
        assert "Exit codes: 0 all is well; 1 a check failed" in flat(out)


def test_python_m_fastres_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "fastres", "--version"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"fastres {fastres.__version__}\n"


def test_env_as_json_and_as_a_table(run):
    _, out, _ = run("env", "--json")
    read = json.loads(out)
    assert read["fastres"] == fastres.__version__
    code, out, _ = run("env")
    assert code == 0
    assert "versions.torch" in out


def test_plan_as_json_and_as_a_table(run):
    _, out, _ = run("plan", "resnet18", "--json", "--device", "cpu")
    steps = json.loads(out)["steps"]
    assert len(steps) == 24  # 20 convolutions, max pool, average pool, flatten, classifier
    assert all(step["served_by"] for step in steps)
    code, out, _ = run("plan", "resnet18", "--device", "cpu")
    assert code == 0
    assert "conv 7x7/2 3->64 + bias + ReLU" in out


def test_summary_counts_the_published_parameters_and_operations(run):
    _, out, _ = run("summary", "resnet18", "--json")
    read = json.loads(out)
    assert read["parameters"] == 11_689_512  # torchvision's num_params
    assert read["flop"] == pytest.approx(3.63e9, rel=2e-3)  # 2 x torchvision's 1.814 GMAC
    code, out, _ = run("summary", "resnet18")
    assert code == 0
    assert "layer1.0.conv1" in out


def test_a_summary_leaves_the_model_as_it_is():
    """Batch norms in training would count, and hooks would stay."""
    model = fastres.resnet20()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = fastres.summary(model, (1, 3, 32, 32))
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rows = {line.split()[0]: line.split()[1:] for line in found.table.splitlines()}
    assert rows["conv1"] == ["Conv2d", "3x3", "1x16x32x32", "432", f"{2 * 27 * 16 * 32 * 32:,}"]
    assert rows["fc"] == ["Linear", "1x10", "650", f"{2 * 64 * 10:,}"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_measures_a_right_network(run, dtype):
    arguments = ("verify", "resnet18", "--size", "64", "--batch", "4", "--dtype", dtype)
    code, out, _ = run(*arguments, "--device", "cpu", "--json")
    read = json.loads(out)
    assert code == 0
    assert read["ok"] is True
    assert read["wrong_steps"] == []
    assert 0 < read["rms"] < 0.1 * read["scale"]  # bfloat16 through 20 layers


def test_verify_of_a_wrong_fold_fails_and_names_the_steps(run, monkeypatch):
    from fastres.graph import fold

    right = fold.folded_conv

    def drop_the_bias(op, *rest):
        weight, bias = right(op, *rest)
        return weight, bias * 0

    monkeypatch.setattr(fold, "folded_conv", drop_the_bias)
    arguments = ("verify", "resnet18", "--size", "64", "--batch", "2", "--device", "cpu")
    code, out, _ = run(*arguments, "--json")
    read = json.loads(out)
    assert code == 1
    assert read["ok"] is False
    assert "conv1" in [step["step"] for step in read["wrong_steps"]]


def test_bench_writes_all_forms_and_each_case_as_it_comes(run, tmp_path):
    code, out, _ = run("bench", "resnet18", *QUICK, "--json", "--output", str(tmp_path / "r"))
    read = json.loads(out)
    assert code == 0
    assert {p.name for p in tmp_path.iterdir()} == {"r.json", "r.jsonl", "r.md", "r.html"}
    assert json.loads((tmp_path / "r.json").read_text()) == read
    (case,) = read["cases"]
    assert [t["name"] for t in case["timings"]] == [
        "eager fp32",
        "eager fp32 channels_last",
        "fastres fp32",
    ]
    assert all(t["seconds"]["values"] for t in case["timings"])


def test_bench_with_a_wrong_output_gives_no_speed_and_exit_code_1(run, monkeypatch):
    honest = bench.ours

    def shifted(*arguments):
        fast = honest(*arguments)
        return lambda x: fast(x) + 1e-2

    monkeypatch.setattr(bench, "ours", shifted)
    code, out, _ = run("bench", "resnet18", *QUICK)
    assert code == 1
    row = next(line for line in out.splitlines() if line.startswith("fastres fp32 "))
    assert row.split()[:5] == ["fastres", "fp32", "-", "-", "-"]
    assert "fastres fp32 has no time: wrong output" in flat(out)


def test_bench_goes_on_after_a_case_that_does_not_fit(run):
    arguments = [*QUICK]
    arguments[arguments.index("--batch") + 1] = f"{10**9},2"
    code, out, _ = run("bench", "resnet18", *arguments, "--json")
    read = json.loads(out)
    assert code == 1
    assert read["checks"][0]["name"] == f"resnet18, batch {10**9}, 32x32"
    assert "not measured: RuntimeError" in read["checks"][0]["detail"]
    assert [case["shape"][0] for case in read["cases"]] == [2]


def test_results_are_shown_even_when_they_cannot_be_written(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    write = report.atomic_write

    def full(path, data):
        if str(path).endswith(".jsonl"):  # begun before the first case
            return write(path, data)
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(report, "atomic_write", full)
    code, out, err = run("bench", "resnet18", *QUICK, "--output", "never")
    assert code == 2
    assert "fastres fp32" in out
    assert err == "error: [Errno 28] No space left on device: 'never.json'\n"


def test_interruption_is_exit_code_130(run, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("fastres.models.pretrained.create_model", interrupted)
    assert run("plan", "resnet18")[0] == 130


def test_pictures_on_the_terminal_stay_inside_its_width():
    from fastres.cli.runs import gallery

    picture = Picture(((0.0, 1.0),) * 4, "2", "3", 0.5)
    drawn = gallery((picture,) * 9, width=30)
    assert max(map(len, drawn.splitlines())) <= 30
    assert drawn.count("3 (50%), is 2") == 9


def test_a_warning_is_one_line_without_its_place(monkeypatch, capsys):
    def warn():
        warnings.warn("one\n  two", stacklevel=1)
        return 0

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    monkeypatch.setattr(cli, "run", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with pytest.raises(SystemExit):
            cli.main()
    assert capsys.readouterr().err == "warning: one; two\n"
