"""Steps per second and memory of ``fastres.fit`` and of torchvision's reference loop.

    python benchmarks/training_loop.py --output out/loop.json

The loop is that of torchvision's references/classification/train.py (train_one_epoch: a DataLoader,
an average loss and the top-1 and top-5 accuracy read at each step), on torchvision's network, in
its NCHW. Both train a ResNet of the same weights on the same uint8 images in memory, normalised
alike, by SGD with momentum, and neither evaluates. Rounds of one epoch are interleaved; each is
timed as a whole, CPU time beside wall time. Peak memory is that of a process which does one alone,
above what it had when images and network were there.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2

import fastres
from fastres.perf.environment import environment

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LOOPS = ("torchvision", "fastres")


class Images(Dataset[tuple[Tensor, Tensor]]):
    """uint8 images in memory, normalised one by one as torchvision's presets do."""

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels
        parts = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
        self.transform = v2.Compose(parts)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[index]), self.labels[index]


def reference(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> None:
    """One epoch as train_one_epoch takes it, without its printing."""
    loader = DataLoader(Images(images, labels), batch, shuffle=True)
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-4)
    model.train()
    read = []
    for x, y in loader:
        output = model(x)
        loss = criterion(output, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.inference_mode():
            right = output.topk(5).indices.eq(y[:, None])
            read.append((loss.item(), right[:, :1].sum().item(), right.sum().item()))


def ours(model: nn.Module, images: Tensor, labels: Tensor, batch: int) -> None:
    """One epoch of ``fastres.fit`` without a folder or validation."""
    options = {"epochs": 1, "lr": 0.05, "lr_scheduler": "constant", "progress": False}
    fastres.fit(model, images, labels, batch_size=batch, **options)


def prepared(name: str, size: int, batch: int, steps: int) -> Callable[[], Any]:
    """The call that one loop takes for one epoch of so many steps."""
    given = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (batch * steps, 3, size, size), generator=given)
    labels = torch.randint(0, 10, (batch * steps,), generator=given)
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    loop = reference
    if name == "fastres":
        network = fastres.resnet18(num_classes=10)
        network.load_state_dict(model.state_dict())
        model, loop = network, ours
    return lambda: loop(model, images.to(torch.uint8), labels, batch)


def memory(name: str, size: int, batch: int) -> float:
    """Peak memory of four steps in MB, above what was there before; for a process of its own."""
    call = prepared(name, size, batch, 4)
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1]) * resource.getpagesize()
    call()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before) / 1e6


def measured(size: int, batch: int, steps: int, rounds: int) -> dict[str, Any]:
    calls = {name: prepared(name, size, batch, steps) for name in LOOPS}
    spent: dict[str, list[tuple[float, float]]] = {name: [] for name in LOOPS}
    for number in range(rounds + 1):
        for name in LOOPS if number % 2 else LOOPS[::-1]:
            wall, cpu = time.perf_counter(), time.process_time()
            calls[name]()
            if number:  # the first is for warming up
                spent[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    found: dict[str, Any] = {}
    for name, pairs in spent.items():
        again = [sys.executable, __file__, "--memory", name, f"--size={size}", f"--batch={batch}"]
        out = subprocess.run(again, capture_output=True, text=True, check=True).stdout
        walls, cpus = zip(*pairs, strict=True)
        found[name] = {
            "steps_per_second": steps / statistics.median(walls),
            "steps_per_cpu_second": steps / statistics.median(cpus),
            "wall_seconds": walls,
            "cpu_seconds": cpus,
            "peak_mb": float(out),
        }
    for unit in ("wall", "cpu"):
        theirs, us = (found[name][f"{unit}_seconds"] for name in LOOPS)
        ratios = [a / b for a, b in zip(theirs, us, strict=True)]
        found[f"times_faster_{unit}"] = statistics.median(ratios)
        found[f"times_faster_{unit}_least"] = min(ratios)
    return {"size": size, "batch": batch, "steps": steps, "rounds": rounds, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", action="append", help="SIZE,BATCH,STEPS; repeat")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory", choices=LOOPS, help="print this one's peak memory only")
    parser.add_argument("--size", type=int)
    parser.add_argument("--batch", type=int)
    args = parser.parse_args()
    if args.memory:
        print(memory(args.memory, args.size, args.batch))
        return
    rows = []
    for case in args.case or ("32,64,4", "64,32,4"):
        rows.append(measured(*map(int, case.split(",")), args.rounds))
        row = rows[-1]
        print(
            f"{case}: {row['times_faster_wall']:.2f}x by wall time, "
            f"{row['times_faster_cpu']:.2f}x by CPU time, "
            f"peak {row['fastres']['peak_mb']:.0f} MB for {row['torchvision']['peak_mb']:.0f}",
            flush=True,
        )
    if args.output:
        command = f"python benchmarks/training_loop.py --rounds {args.rounds}"
        command += "".join(f" --case {case}" for case in args.case or ())
        told = {"command": command, "network": "resnet18", "torchvision": torchvision.__version__}
        told |= {"rows": rows, "environment": environment().to_dict()}
        args.output.write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    main()
