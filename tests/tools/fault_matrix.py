"""docs/fault-matrix.md from a run: ``make fault-matrix``.

``--new`` runs those tests only that the page does not list yet, or that failed, and says so there.

A test serves the rows of its mark: ``@pytest.mark.fault(14, 18)``. Those of tests/gpu need a GPU
and are named as such where there is none.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "fault-matrix.md"
ROWS = {
    1: "A batch of no images: an empty output of the right shape, nothing launched",
    2: "An image smaller than a kernel needs: a ValueError that names the sizes",
    3: "Odd and oblong images: as the reference",
    4: "Channels that fill no tile (1, 3, 5, 17, 65): as the reference",
    5: "More than 65,535 tiles: as the reference",
    6: "More than 2^31 elements or offsets: right, or refused before launch",
    7: "NCHW, sliced, expanded and flipped inputs: converted once, or refused by a kernel",
    8: "Sizes of one, which are both memory orders at once: right",
    9: "Memory that is not aligned to 16 bytes, in turns with aligned: right",
    10: "An output over an input: refused, or safe and said to be",
    11: "Random calls on whole numbers, where every bit must be right; failures are kept",
    12: "NaN and -0.0 through ReLU, pooling and sums: as torch",
    13: "NaN, infinities and all-negative windows in the max pool: as torch",
    14: "NaN in one image: that image's answer alone is NaN",
    15: "Overflow of float16: infinite where torch is, reported, bfloat16 advised",
    16: "Values of 1e-8 or 1e4, and subnormal ones: at most twice PyTorch's own error",
    17: "TF32: as torch's flags have it, and recorded in the report",
    18: "The same call a hundred times, and in other company: the same bits where promised",
    19: "Every tile configuration that is shipped, on poisoned outputs: exact",
    20: "Memory that runs out: torch's error, and the model works afterwards",
    21: "Ten thousand calls and fifty batch sizes: flat memory, bounded caches",
    22: "Tensors on the wrong device: the right answer, or one error before launch",
    23: "Streams, inputs freed at once, threads, two models: right",
    24: "Outputs held across replays, and other shapes than captured: untouched and right",
    25: "Inside a capture: nothing is tuned or folded; a user's own capture works once warm",
    26: "fork, deepcopy, pickle: they work, or are refused with advice",
    27: "Tiles that are too large for a GPU: pruned; an unknown GPU: right",
    28: "No GPU, no Triton: import and the CPU work, a request for CUDA is one error",
    29: "compute-sanitizer: memcheck, racecheck, initcheck, synccheck",
    30: "A norm's eps, missing affine, bias, groups, dilation, two readers: folded right",
    31: "Norms that cannot be folded (training, no statistics, not behind a convolution): right",
    32: "Nonsense and extreme variances: refused by name, or PyTorch with one warning",
    33: "A fold that overflows float16: refused by name, bfloat16 advised",
    34: "Aliases, shared modules, modules that nobody knows, hooks: right, nothing skipped",
    35: "Weights that change after the first call, in every way: the answer follows",
    36: "Checkpoints with missing, foreign, misshapen or NaN entries: one error lists them",
    37: "Damaged and malicious files: refused, and no payload runs",
    38: "Files that are written: whole or not at all, JSON or safetensors, never a pickle",
    39: "ResNet v1 and v1.5: both right, told apart",
    40: "Every custom operator passes torch.library.opcheck",
    41: "Claims: error and agreement beside every speed, accuracy only where it was run",
    42: "Keras layers with per-feature weights behind Flatten: Keras' numbers",
    43: "Keras models inside models, called once or more, also as outputs: Keras' numbers",
    44: "Keras layers shared by maps of several sizes, names that collide: Keras' numbers",
    45: "One or two outputs: right copies are admitted, wrong ones refused",
    46: "A frozen model beside another's optimizer: nothing is folded again",
    47: "First calls from several threads: each as the source's",
    48: "An option used after a first call without it: as the source",
    49: "One leaf that cannot be traced: left to PyTorch by name, the rest fused",
    50: "Attributes set on a copy: they have effect, or one error",
    51: "Random numbers in forward: random in the copy too, or refused",
    52: "Hooks and features that forward leaves on the module: they work, or optimize says so",
    53: "A source whose forward changes its own state: the source is not touched",
    54: "A copy's first parameter and device: as the source's",
    55: "Modules of fx, torch.export and quantisation: accepted, or the real reason",
    56: "Checkpoints of training scripts: the averaged weights as timm does, or the remedy said",
    57: "Export of several inputs, outputs and dictionaries: exported, or one error",
    58: "A scripted convolution with its norm: left to PyTorch",
    59: "A command's size against the file's: one line",
    60: "Features of layers without maps, copies inside models, casts inside: one error, or right",
    61: "Keras layers that are unknown: the real reason",
    62: "Networks in which nothing can be fused: one warning",
    63: "Compiled models whose data was swapped: refresh()",
    64: "Text in a fused file: it reaches neither generated source nor getattr",
    65: "save_pretrained and push_to_hub of a copy: the source's state, or one error",
    66: "Learned constants outside convolutions on the Triton backend: right",
    67: "Containers that forward loops over or indexes: as the source",
    68: "ONNX files of small images: admitted by the rule of two",
    69: "Declared sizes that a file does not hold: refused before memory is taken",
    70: "A full disk: one line",
    71: "Signals while writing: nothing is left behind, 143 and 130",
    72: "Links and pipes as targets: written through, or refused",
    73: "A target that cannot be written: noticed before any work",
    74: "Odd tensors and nested data in files: one error",
    75: "Modules named by words of Python: right",
    76: "The oldest typer and click that are allowed: every --help works",
    77: "Packages called kernels elsewhere: importable from the checkout",
    78: "Installations: the source distribution's tests run, the floors hold",
    79: "bfloat16 on a CPU without it: one warning, and the plan says it",
    80: "A layer replaced on a live network: fused",
    81: "What users of neighbours write: typed, taken",
    82: "The fuzzer's time limit: kept",
    83: "A fused part where the source's Python expects its module: the source's answer",
    84: "A check that failed: its copy is never served",
    85: "Networks for torch.jit.script, traced by fx or for features: as torchvision's",
    86: "float64 detectors: right copies are admitted",
    87: "Calls that read memory order: they get PyTorch's",
    88: "A kernel that cannot run on this GPU: under auto one warning and PyTorch's answer",
    89: "Kernels measured before a capture: right ones only, once, within seconds, never raising",
    90: "Serving: bad images, floods, stalled uploads, clients that leave: one answer for each",
    91: "Serving: a worker or the server killed, SIGTERM, Ctrl-C: nothing hangs, lost or left",
    92: "8 bits on a GPU: the bytes of the definition; halves, ends, padding, the largest sums",
    93: "Training: data, labels and options that do not fit, or change: refused, or as wanted",
    94: "Batch jobs: a worker, the driver or a node killed, two drivers: every image exactly once",
    95: "Batch jobs: an image or a network that kills its process: an error row, or the job ends",
    96: "Batch jobs: damaged or vanished images, full disks, foreign outputs: error rows",
}
GPU = "needs a GPU: not run"
HEAD = """# The fault matrix

What can go wrong, and the tests that would notice; written by `make fault-matrix` from a run.
A test has its rows as a mark, `@pytest.mark.fault(7)`, and `pytest --fault 7` runs those of a row.
"n passed" counts its cases.

"""


def row_tests() -> dict[int, list[str]]:
    """By row: ``path::name`` of the tests that have its number, sorted."""
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for row in rows_of(node):
                    found[row].append(f"{path.relative_to(ROOT).as_posix()}::{node.name}")
    return {row: sorted(names) for row, names in sorted(found.items())}


def rows_of(test: ast.FunctionDef) -> list[int]:
    """The numbers in its mark ``fault``."""
    calls = [mark for mark in test.decorator_list if isinstance(mark, ast.Call)]
    marks = [mark for mark in calls if ast.unparse(mark.func) == "pytest.mark.fault"]
    return [ast.literal_eval(row) for mark in marks for row in mark.args]


def test_of(case: str) -> str:
    """``path::name`` of a case, without its parameters."""
    return case.partition("[")[0]


def all_tests() -> list[str]:
    return sorted({test for tests in row_tests().values() for test in tests})


@dataclass
class Outcomes:
    """A pytest plugin: keeps what became of each case of the tests that have a row."""

    wanted: frozenset[str]
    passed: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    failed: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    skipped: dict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def pytest_collection_modifyitems(self, config, items) -> None:
        others = [item for item in items if test_of(item.nodeid) not in self.wanted]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if test_of(item.nodeid) in self.wanted]

    def pytest_runtest_logreport(self, report) -> None:
        test = test_of(report.nodeid)
        if report.failed:
            self.failed[test] += 1
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
            self.skipped[test].add(reason.removeprefix("Skipped: "))
        elif report.when == "call":
            self.passed[test] += 1

    def of(self, test: str) -> str:
        """What became of a test, in words."""
        if test.startswith("tests/gpu/") and not (self.passed[test] or self.failed[test]):
            return GPU
        counts = (f"{self.failed[test]} FAILED", f"{self.passed[test]} passed")
        words = [count for count in counts if not count.startswith("0 ")]
        return "; ".join([*words, *sorted(self.skipped[test])]) or "not run"


def verdict(results: list[str]) -> str:
    """Of a row: what failed counts most, then whether some need a GPU."""
    if any("FAILED" in result for result in results):
        return "**failed**"
    if all(result == GPU for result in results):
        return GPU
    return "passed; more needs a GPU" if GPU in results else "passed"


def page(results: dict[str, str], machine: str) -> str:
    """docs/fault-matrix.md."""
    tests = row_tests()
    lines = [f"{HEAD}Run on {machine}.", "", "| row | fault and what it must get | result |"]
    lines.append("|---|---|---|")
    for row, fault in ROWS.items():
        found = verdict([results[test] for test in tests[row]])
        lines.append(f"| [{row}](#row-{row}) | {fault} | {found} |")
    for row, fault in ROWS.items():
        lines += ["", f"## Row {row}", "", f"{fault}.", ""]
        lines += [f"- `{test}`: {results[test]}" for test in tests[row]]
    return "\n".join(lines) + "\n"


def kept() -> dict[str, str]:
    """By test: the results on the page."""
    return dict(re.findall(r"^- `(tests/\S+::\w+)`: (.*)$", PAGE.read_text(), re.MULTILINE))


def ran_on() -> str:
    """Where the page says that it was run."""
    found = re.search(r"^Run on (.*)\.$", PAGE.read_text(), re.MULTILINE)
    return found[1] if found else "nothing"


def machine() -> str:
    """Processor, torch and commit."""
    from fastres.perf.environment import environment

    found = environment()
    gpu = found.gpus[0]["name"] if found.gpus else "no GPU; kernels in Triton's interpreter"
    parts = [f"Python {found.python}", f"torch {found.versions['torch']}", gpu]
    return ", ".join([*parts, f"commit {found.commit}"] if found.commit else parts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--new", action="store_true", help="only what the page lacks or calls failed"
    )
    arguments = parser.parse_args()
    os.chdir(ROOT)
    known = {t: r for t, r in kept().items() if "FAILED" not in r} if arguments.new else {}
    wanted = [test for test in all_tests() if test not in known]
    files = sorted({test.partition("::")[0] for test in wanted})
    outcomes = Outcomes(frozenset(wanted))
    code = (
        pytest.main(["-q", "--sweep", "-p", "no:cacheprovider", *files], [outcomes]) if files else 0
    )
    results = known | {test: outcomes.of(test) for test in wanted}
    PAGE.write_text(page(results, f"{ran_on()}; then {machine()}" if known else machine()))
    return int(code)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    sys.exit(main())
