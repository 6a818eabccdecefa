"""Cases: timing, reports, tables of costs, and the command line."""

from __future__ import annotations

import errno
import json
import os
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from fused import images, small
from torch import nn

import fastres
from fastres import cli, files
from fastres.batch.network import read_network
from fastres.bench import compare, demo, presets, report, run
from fastres.graph.patterns import ungrouped
from fastres.perf import forecast, kernel_check, roofline, timing
from fastres.perf.timing import Method, Samples
from fastres.runtime import clocks
from messages.models import Branching, fast
from messages.provoke import Raised, add, case, places, without


def written(content: Any) -> Path:
    path = Path("report.json")
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def benchmark(*models: str, **kwargs: Any) -> Any:
    return run.benchmark(models or ("resnet18",), **kwargs)


add("benchmark: no such network", lambda: benchmark("resnet5"))
add("benchmark: one name, which is no network", lambda: run.benchmark("resnet5"))
add("benchmark: no images", lambda: benchmark(batches=[0]))
add("benchmark: no such dtype", lambda: benchmark(dtypes=["int4"]))
add("benchmark: no such baseline", lambda: benchmark(baselines=["tensorflow"]))
add("benchmark: products of a GPU", lambda: benchmark(dtypes=["tf32"]))
add(
    "benchmark: 8 bits on a GPU",
    lambda: run._check_spec(run.Spec("resnet18", 1, dtypes=("int8",)), torch.device("cuda")),
)
add("benchmark: no device's name", lambda: benchmark(device="a GPU"))
add("benchmark: another device", lambda: benchmark(device="meta"))
add("benchmark: a GPU that is not here", lambda: benchmark(device="cuda:99"))
add("doctor: no such GPU", lambda: kernel_check.compile_kernels("sm_42"))
add("doctor: no such kernel", lambda: kernel_check.check_kernels(torch.device("cpu"), ["conv5"]))
add("doctor: nothing is compiled", lambda: kernel_check.compile_kernels("sm_90"))
add("preset: no such preset", lambda: presets.preset("slow", torch.device("cpu")))


def measure(contenders: dict[str, Any], **kwargs: Any) -> Any:
    brief = Method(rounds=1, budget=0.0, sample=0.0, warmup=0.0)
    return timing.measure(contenders, [images()], check=lambda *_: None, method=brief, **kwargs)


add("Method: no rounds", lambda: Method(rounds=0))
add("Method: negative seconds", lambda: Method(budget=-1.0))
add("Samples: none", lambda: Samples(()).quantile(0.5))
add("measure: nothing to time", lambda: measure({}))
add("measure: a baseline that is not there", lambda: measure({"a": torch.sin}, baseline="b"))


@case("measure: work outside of the stream")
def _() -> None:
    with (
        mock.patch.object(torch.cuda, "synchronize"),
        mock.patch.object(clocks, "event_seconds", return_value=([0.001], None)),
        mock.patch.object(clocks.time, "perf_counter", side_effect=[0.0, 2.0]),
    ):
        clocks._cuda_sample(torch.sin, [])


@case("Comparison: a contender that is not there")
def _() -> None:
    measure({"a": torch.sin})["b"]


def reported(**changes: Any) -> dict[str, Any]:
    return report.Report.now("a title").to_dict() | changes


add("report: another suffix", lambda: report.Report.now("a title").write("report.pdf"))
add(
    "report: a folder that is a file",
    lambda: (written(""), report.check_output("report.json/a.md")),
)
add("compare: no JSON", lambda: compare.load(written("{")))


@case("files: a full disk")
def _() -> None:
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with mock.patch.object(os, "fsync", side_effect=full):
        files.atomic_write("kept", b"new")


add("compare: no text", lambda: Path("a.json").write_bytes(b"\xff") and compare.load("a.json"))
add("compare: no report", lambda: compare.load(written({"schema": "other"})))
add("compare: a later schema", lambda: compare.load(written(reported(schema_version=99))))
add("compare: half a report", lambda: compare.load(written(half_reported())))
add("compare: a device", lambda: compare.load("/dev/null"))
add("read_text: a large file", lambda: files.read_text(written("{}"), 1))


def half_reported() -> dict[str, Any]:
    """The times of one contender are negative."""
    times = [{"name": "eager", "seconds": {"median": -1, "p20": 1, "p80": 1}}]
    case = {"model": "resnet18", "shape": [1, 3, 8, 8], "device": "cpu", "noise": None}
    return reported(cases=[case | {"timings": times}])


@case("compare: another machine")
def _() -> None:
    old = reported()
    new = json.loads(json.dumps(old))
    new["environment"]["cpu"]["name"] = "another processor"
    with mock.patch.object(compare, "machine", lambda r: r["environment"]["cpu"]["name"][:7]):
        old["environment"]["cpu"]["name"] = "this processor"
        compare.compare(old, new)


add("roofline: no such fusion", lambda: roofline.roofline(small(), (1, 3, 8, 8), fusion="all"))
add(
    "roofline: work that is not known",
    lambda: roofline.roofline(nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid()).eval(), (1, 3, 8, 8)),
)
add(
    "roofline: Python that cannot be traced",
    lambda: roofline.roofline(Branching().eval(), (1, 3, 8, 8)),
)


@case("forecast: a size that is not known")
def _() -> None:
    (group, *_) = ungrouped(fast().traced.steps)
    forecast.predicted_seconds([group], dict.fromkeys([*group.inputs, group.steps[0].name]))


@case("demo: without scikit-learn")
def _() -> None:
    with without("sklearn.datasets"):
        demo.photographs(1, 0)


COMMANDS = (
    *("nonsense", "plan", "plan a b", "plan resnet5", "plan resnet18 --dtype int8"),
    *("plan resnet18 --device tpu", "plan resnet18 --device cuda:99", "plan resnet18 --fast"),
    *("plan resnet18 --backend cudnn", "plan resnet18 --checkpoint gone.pth"),
    *("verify resnet18 --weights V9", "verify resnet18 --batch 0", "verify resnet18 --size x"),
    *("verify resnet18 --images cat.jpg", "verify gone.h5", "verify gone.h5 --dtype float16"),
    *("bench", "bench resnet18 --quick", "bench resnet18 --batch 1,x", "bench resnet5"),
    *("bench resnet18 --batch 0", "bench resnet18 --dtype float31", "bench resnet18 --rounds 0"),
    *("bench resnet18 --baselines tensorflow", "bench resnet18 --output missing/\0"),
    *("demo --report report.pdf", "classify gone.jpg", "classify", "roofline resnet5"),
    *("summary resnet5", "convert gone.h5 fused.safetensors", "convert resnet18 fused.pth"),
    *("export resnet18 model.pb --size 32", "plot resnet18 model.gif", "plot gone.keras m.svg"),
    *("plan resnet18 --checkpoint .", "plot resnet18 gone/model.svg", "report compare . ."),
    *("tune resnet18 --batch 0", "tune resnet18 --device cpu", "tune resnet18 --dtype int8"),
    "verify resnet18 --weights DEFAULT --checkpoint a.pth",
    "quantize resnet18 --data digits -o q.safetensors",
    *("train", "train imagenet", "train digits --opt lamb", "train --resume gone"),
    *("train digits --test-only", "report runs gone other"),
    *("report", "report compare gone.json gone.json", "report compare a.json"),
)


def said(command: str) -> Raised:
    """What the command wrote to standard error, its exit code, and where that was noticed."""
    wrote: list[str] = []
    found: set[tuple[str, int]] = set()

    def listen(text: str, **_: Any) -> None:
        wrote.append(text)
        found.update(places(sys.exc_info()[1]))

    with mock.patch.object(cli.ERR, "print", listen):
        code = cli.run(command.split(" "))
    return Raised("\n".join([*wrote, f"exit code {code}"]), frozenset(found))


for command in COMMANDS:
    add(f"fastres {command}".replace("\0", "NUL"), lambda c=command: said(c))


def said_of_fused(command: str) -> Raised:
    """As :func:`said`, where ``fused.safetensors`` is a fused model in float32."""
    fastres.save(fast(), "fused.safetensors")
    return said(command)


for command in (
    *("summary fused.safetensors", "verify fused.safetensors"),
    "classify gone.jpg --model fused.safetensors",
    "convert fused.safetensors again.safetensors --dtype float16",
    "convert fused.safetensors again.safetensors --checkpoint weights.pth",
):
    add(f"fastres {command}", lambda c=command: said_of_fused(c))


@case("fastres train: the data of the run to resume has moved")
def _() -> Raised:
    Path("run").mkdir()
    Path("run/config.json").write_text(json.dumps({"data": "gone.npz", "model": "resnet18"}))
    return said("train --resume run")


@case("convert: a file that is no network")
def _() -> None:
    Path("weights.pth").write_bytes(b"")
    read_network("weights.pth", None)


@case("convert: a size that is not the Keras file's")
def _() -> None:
    network = mock.Mock(input_size=(32, 48))
    with mock.patch("fastres.batch.network.from_keras", return_value=network):
        read_network("model.h5", 64)


@case("convert: a size that the network cannot take")
def _() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5)).eval()
    cli.files.image_shape(fast(network), 9)
