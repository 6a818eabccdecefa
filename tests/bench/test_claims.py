"""Rows 17, 25, 29 and 41 as far as a CPU can show them.

TF32 is recorded, nothing is tuned or folded inside a capture, what compute-sanitizer will run is
right, and no speed or accuracy is claimed without its proof.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fused import small

from fastres.bench import run
from fastres.bench.report import Report
from fastres.perf.timing import Method
from fastres.runtime import live
from fastres.runtime.cuda_graph import GraphRunner
from fastres.runtime.executor import Executor

ROOT = Path(__file__).parents[2]
KERNELS = sorted((ROOT / "kernels").rglob("*.py"))


@pytest.mark.fault(17)
@pytest.mark.parametrize("allowed", [False, True])
def test_a_report_records_torchs_flags(allowed):
    backends = torch.backends.cudnn, torch.backends.cuda.matmul
    saved = [b.allow_tf32 for b in backends]
    try:
        for b in backends:
            b.allow_tf32 = allowed
        recorded = json.loads(Report.now("flags").to_json())["environment"]["flags"]
    finally:
        for b, before in zip(backends, saved, strict=True):
            b.allow_tf32 = before
    precisions = {recorded["conv_precision"], recorded["matmul_precision"]}
    assert precisions == {"tf32"} if allowed else "tf32" not in precisions


def on_gpu():
    """What the engine asks of an input, as a CUDA tensor would answer."""
    return SimpleNamespace(device=torch.device("cuda"), dtype=torch.float32, shape=(2, 3, 8, 8))


@pytest.mark.fault(25)
def test_folding_inside_a_capture_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="call it once outside the capture"):
        live._refuse_during_capture(on_gpu())
    live._refuse_during_capture(torch.randn(1))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    live._refuse_during_capture(on_gpu())


@pytest.mark.fault(25)
def test_a_users_own_capture_gets_the_steps_and_no_graph_in_it(monkeypatch):
    model, x = small(), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = model(x)
        (runner,) = model._live()._runners.values()
        assert isinstance(runner.executor, Executor)
        captured = GraphRunner(runner.executor)
        ran = []
        monkeypatch.setattr(Executor, "run", lambda _, *inputs: ran.append(inputs) or expected)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for _ in range(3):
            assert captured(on_gpu()) is expected
    assert len(ran) == 3
    assert not captured.shapes


@pytest.mark.fault(25)
@pytest.mark.parametrize("path", KERNELS, ids=lambda p: p.name)
def test_no_kernel_is_tuned_by_timing(path):
    """Tiles come from a table and a formula, so that a capture never meets a measurement."""
    names = {n.attr for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Attribute)}
    assert not names & {"autotune", "Autotuner", "do_bench", "perf_counter", "elapsed_time"}


@pytest.mark.sweep
@pytest.mark.fault(29)
@pytest.mark.interpreter
@pytest.mark.slow
def test_what_the_sanitizer_runs_is_exact_and_holds_every_kernel():
    """In a process of its own: Triton's interpreter must be on before triton is imported."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "tests/gpu/sanitize.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    jitted = {
        node.name: ast.unparse(node.decorator_list[0])
        for path in KERNELS
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
    }
    gluon = {name for name, decorator in jitted.items() if decorator.startswith("gluon.")}
    assert (len(jitted), len(gluon)) >= (12, 2)  # cache_read and nine standard ones, three of HWNC
    launched = done.stdout.splitlines()[-1].partition(" launches of ")[2].split(", ")
    assert set(launched) == set(jitted) - gluon, "the interpreter knows no Gluon"
    source = (ROOT / "tests/gpu/sanitize.py").read_text()
    assert all(f'"{name.removesuffix("_kernel")}"' in source for name in gluon)


def unproven(case):
    """Contenders of a report's case that have a time and no error and agreement beside it."""
    timed = [t["name"] for t in case["timings"] if (t["seconds"] or {}).get("values")]
    assert timed
    errors = case["errors"]
    return [n for n in timed if not {"rms", "max_abs", "agreement"} <= set(errors.get(n, {}))]


@pytest.mark.slow
@pytest.mark.fault(41)
def test_every_speed_stands_beside_its_error_and_agreement():
    brief = Method(rounds=1, budget=0.0, sample=0.0, warmup=0.0)
    report = run.benchmark(
        ("resnet18",), batches=(2,), size=32, dtypes=("float32", "bfloat16"), method=brief
    )
    assert report.ok
    read = json.loads(report.to_json())
    (case,) = read["cases"]
    assert unproven(case) == []
    assert len(case["timings"]) >= 4
    case["errors"].popitem()
    assert len(unproven(case)) == 1
    table = report.to_markdown().splitlines()
    (header,) = [line for line in table if line.startswith("| contender")]
    assert "error" in header
    assert "top-1" in header


PUBLISHED = sorted((ROOT / "benchmarks" / "results").rglob("latest.json"))


@pytest.mark.fault(41)
def test_published_speeds_have_their_proof():
    for path in PUBLISHED:
        report = json.loads(path.read_text())
        assert report["ok"], path
        assert [unproven(case) for case in report["cases"]] == [[]] * len(report["cases"]), path
    # Where nothing is published yet, nothing may be claimed either.
    claimed = "not measured" not in (ROOT / "README.md").read_text()
    assert PUBLISHED or not claimed


ACCURACY = re.compile(r"(?i)(accuracy|top-?[15]|acc@[15])[^|\n]{0,40}\d\d\.\d+ ?%?")


@pytest.mark.fault(41)
def test_no_accuracy_is_claimed_that_was_not_run():
    assert ACCURACY.search("reaches a top-1 accuracy of 76.13 % on ImageNet")
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    claims = [f"{p.name}: {m[0]}" for p in pages for m in ACCURACY.finditer(p.read_text())]
    assert claims == []
