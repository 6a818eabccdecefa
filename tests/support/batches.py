"""Small batch jobs: a network of three classes, seeded images with damaged ones among them."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import fastres
from fastres.batch import BatchJob

DAMAGED = {3: b"", 10: b"<html>404</html>", 17: b"\xff\xd8\xff no JPEG"}
POISON = b"kills whoever decodes it"
# Imported by workers at their start: one image kills, and all take long enough to be interrupted.
DEADLY = f"""
import os, time
from pathlib import Path
from PIL import Image
opened = Image.open
def open(file, *args, **kwargs):
    time.sleep(0.1)
    if file.getvalue().startswith({POISON!r}):
        Path(__file__).with_name(f"death-{{os.getpid()}}").touch()
        os.kill(os.getpid(), 9)
    return opened(file, *args, **kwargs)
Image.open = open
"""


class Colours(nn.Sequential):
    """A network of three classes, quick on images of 224 pixels."""

    def __init__(self, seed: int) -> None:
        torch.manual_seed(seed)
        super().__init__(
            nn.Conv2d(3, 8, 7, 16), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
            nn.Linear(8, 3),
        )  # fmt: skip


def write_model(folder: Path, seed: int = 3) -> Path:
    """A fused file of it."""
    path = folder / "fused.safetensors"
    fastres.save(fastres.optimize(Colours(seed).eval(), torch.randn(2, 3, 224, 224)), path)
    return path


def photo(seed: int) -> bytes:
    """A small JPEG, another for each seed."""
    from PIL import Image

    rng, file = np.random.default_rng(seed), io.BytesIO()
    cells = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
    Image.fromarray(cells).resize((60, 48), Image.Resampling.BICUBIC).save(file, "JPEG")
    return file.getvalue()


def write_images(folder: Path, count: int, **named: bytes) -> list[str]:
    """``count`` of them in two folders; returns the ids that a job has to give them, sorted."""
    contents = {
        f"{'ab'[i % 2]}/{i:03d}.jpg": photo(i) if i not in DAMAGED else DAMAGED[i]
        for i in range(count)
    }
    contents |= {f"{name}.jpg": data for name, data in named.items()}
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return sorted(contents)


def do(job: BatchJob, parts: list[int] | None = None) -> dict[str, Any]:
    """Do parts, by default the missing ones, in this process, as an engine's worker does."""
    todo = job.missing_parts() if parts is None else parts
    classifier = job.classifier()
    for index in todo:
        job.run_part(index, classifier)
    return job.finish(len(todo)).to_dict()


def rows(output: Path) -> dict[str, list[Any]]:
    """The whole output, by column, in the order of its parts."""
    from pyarrow import concat_tables
    from pyarrow.parquet import read_table

    files = sorted(output.glob("part-*.parquet"))
    found: dict[str, list[Any]] = concat_tables([read_table(file) for file in files]).to_pydict()
    return found


def success(output: Path) -> dict[str, Any]:
    """``_SUCCESS.json``."""
    found: dict[str, Any] = json.loads((output / "_SUCCESS.json").read_text())
    return found
