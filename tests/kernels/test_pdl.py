"""Programmatic dependent launch: every kernel waits first, and only those that wait start early.

That the wait comes before any access in compiled code is the compile gate's to show.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from fastres.kernels import _common

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "kernels").rglob("*.py"))
TREES = {path.name: ast.parse(path.read_text()) for path in FILES}
KERNELS = {
    node.name: node
    for tree in TREES.values()
    for node in ast.walk(tree)
    if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel")
}
CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize("name", KERNELS)
def test_every_kernel_waits_before_anything_else(name):
    """One kernel that starts early and does not wait breaks the reuse of buffers behind it."""
    kernel = KERNELS[name]
    assert ast.unparse(kernel.body[0]) == "await_producers(PDL)"
    (place,) = (i for i, argument in enumerate(kernel.args.args) if argument.arg == "PDL")
    annotation = kernel.args.args[place].annotation
    assert ast.unparse(annotation) in ("tl.constexpr", "gl.constexpr")
    default = kernel.args.defaults[place - len(kernel.args.args)]
    assert ast.unparse(default) == "False"


def test_the_list_of_kernels_is_whole():
    assert len(KERNELS) >= 11
    jitted = {
        node.name
        for tree in TREES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and "jit" in ast.unparse(node.decorator_list[:1] or [])
    }
    assert set(KERNELS) <= jitted


def test_kernels_are_launched_by_launch_alone():
    for name, tree in TREES.items():
        launches = [
            ast.unparse(node)
            for node in ast.walk(tree)
            if isinstance(node, ast.Call)
            and isinstance(node.func, ast.Subscript)
            and isinstance(node.func.slice, ast.Tuple)
        ]
        assert bool(launches) == (name == "_common.py"), launches


class Recorder:
    """A kernel that keeps what it was launched with."""

    def __init__(self, *arguments: str) -> None:
        self.__name__ = "recorder"
        self.arg_names = list(arguments)
        self.meta: dict = {}

    def __getitem__(self, grid):
        return lambda *args, **meta: self.meta.update(meta)


@pytest.mark.parametrize("early", [False, True])
@pytest.mark.parametrize("waits", [False, True])
def test_only_kernels_that_wait_start_early(monkeypatch, early, waits):
    monkeypatch.setattr(_common, "launches_early", lambda device: early)
    kernel = Recorder("x", *(["PDL"] if waits else []))
    _common.launch(kernel, 1, torch.device("cpu"), 0, num_warps=4)
    asked = {"PDL": True, "launch_pdl": True} if early and waits else {}
    assert kernel.meta == {"num_warps": 4, **asked}


@pytest.fixture
def switched(monkeypatch):
    """``switched(value, capability)``: the switch as it is read on such a GPU."""

    def read(value, capability=(9, 0), device=CUDA, interpreted=False):
        monkeypatch.setattr(_common, "_host", None)
        monkeypatch.setattr(_common, "INTERPRETED", interpreted)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(torch.version, "hip", None)
        if value is None:
            monkeypatch.delenv("FASTRES_PDL", raising=False)
        else:
            monkeypatch.setenv("FASTRES_PDL", value)
        return _common._gpu_launches_early.__wrapped__(device)

    return read


def test_it_is_off_unless_asked_for_where_it_exists(switched):
    assert switched("1")
    assert switched("1", (10, 0))
    assert not switched(None)
    assert not switched("0")
    assert not switched("1", (8, 9))
    assert not switched("1", device=torch.device("cpu"))
    assert not switched("1", interpreted=True)


JUDGED = """
import json, sys
sys.path.insert(0, "tests/tools")
from compile_gate import wait_problems
wait = "griddepcontrol.wait"
codes = [
    f"ld.param.b64 %rd1, [p]; {wait}; ld.global.b32 %r1, [%rd1];",
    f"@%p1 ld.global.b32 %r1, [%rd1]; {wait};",
    f"cp.async.cg.shared.global [%r1], [%rd1], 16; {wait};",
    f"cp.async.bulk.tensor.2d.shared::cluster.global [%r1]; {wait};",
    f"st.global.b32 [%rd1], %r1; {wait};",
    "ld.global.b32 %r1, [%rd1];",
]
sass = ["LDC R1, c[0x0]; ACQBULK; LDG.E R2", "LDG.E R2; ACQBULK", "UTMALDG.2D; ACQBULK", "LDG R2"]
found = [wait_problems(wait, c) for c in codes], [wait_problems("ACQBULK", c) for c in sass]
print(json.dumps(found))
"""


def ordinary(*command: str) -> subprocess.CompletedProcess:
    """A process without the interpreter: it and the compiler cannot share one."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *command],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_the_gate_sees_an_access_before_the_wait():
    done = ordinary("-c", JUDGED)
    assert done.returncode == 0, done.stderr
    ptx, sass = json.loads(done.stdout)
    assert [bool(problems) for problems in ptx] == [False, True, True, True, True, True]
    assert ptx[1] == ["ld.global before griddepcontrol.wait"]
    assert ptx[-1] == ["no griddepcontrol.wait"]
    assert [bool(problems) for problems in sass] == [False, True, True, True]


@pytest.mark.sweep
def test_compiled_kernels_touch_nothing_before_the_wait():
    """The first row of each kernel, both forms."""
    verdicts = []
    for script in ("compile_gate", "compile_gate_fused"):
        kernels = ("relu", "max_pool2d", "global_avg_pool", "head", "b2b_gemm", "stem")
        chosen = [word for kernel in kernels for word in ("--kernel", kernel)]
        done = ordinary(f"tests/tools/{script}.py", "--target", "sm_90", "--json", *chosen)
        assert done.returncode == 0, done.stdout + done.stderr
        verdicts += json.loads(done.stdout)
    assert sum("pdl" in v["what"] for v in verdicts) == len(kernels)
    assert not [v for v in verdicts if v["problems"]]
