"""Train a ResNet-18 on MNIST or Fashion-MNIST in plain PyTorch, for a real accuracy to lose.

    python benchmarks/train_idx.py DIR --epochs 8 --mirror --output out/fashion.safetensors

DIR holds the four files of the data set (train-images-idx3-ubyte.gz, ...). Images are padded to
32x32 pixels, one channel. The number of epochs is fixed beforehand, the test images are not seen,
and the network saved is that of the last epoch. ``benchmarks/accuracy_int8.py`` measures
it.
"""

from __future__ import annotations

import argparse
import gzip
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.models.checkpoint import save_checkpoint
from fastres.models.registry import create_model

ARCHITECTURE = {"name": "resnet18", "in_chans": 1, "num_classes": 10}
MEAN, STD = 0.2860, 0.3530


def idx_file(path: Path) -> Tensor:
    """The bytes of an idx file, gzipped or not, in the shape that its header gives."""
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        data = file.read()
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is no idx file of unsigned bytes")
    sizes = np.frombuffer(data, ">i4", data[3], 4).tolist()
    pixels = np.frombuffer(data, np.uint8, offset=4 + 4 * data[3])
    return torch.from_numpy(pixels.reshape(sizes).copy())


def idx_split(folder: Path, part: str) -> tuple[Tensor, Tensor]:
    """Images (N, 1, 32, 32), float32, normalised, and labels (N,); part: "train" or "t10k"."""
    images = idx_file(folder / f"{part}-images-idx3-ubyte.gz")
    labels = idx_file(folder / f"{part}-labels-idx1-ubyte.gz").long()
    images = F.pad(images[:, None], (2, 2, 2, 2))
    return (images.float() / 255 - MEAN) / STD, labels


def augment(images: Tensor, mirror: bool) -> Tensor:
    """Shift all images by up to two pixels, which are empty at the edge; mirror half of them."""
    if mirror:
        chosen = (torch.rand(len(images)) < 0.5)[:, None, None, None]
        images = torch.where(chosen, images.flip(3), images)
    return images.roll(torch.randint(-2, 3, (2,)).tolist(), (2, 3))


def train(images: Tensor, labels: Tensor, epochs: int, seed: int, mirror: bool) -> nn.Module:
    """SGD with Nesterov momentum, one cycle of the learning rate; products in bfloat16."""
    batch = 128
    torch.manual_seed(seed)
    model = create_model(**ARCHITECTURE).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4
    )
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.1, total_steps=steps)
    for epoch in range(epochs):
        start, order, total = time.perf_counter(), torch.randperm(len(images)), 0.0
        for first in range(0, len(images) - batch + 1, batch):
            picked = order[first : first + batch]
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(augment(images[picked], mirror))
            loss = F.cross_entropy(logits.float(), labels[picked])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            total += float(loss) * batch
        seconds = time.perf_counter() - start
        print(f"epoch {epoch + 1}: loss {total / len(images):.4f}, {seconds:.0f} s", flush=True)
    return model.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mirror", action="store_true", help="clothes may be mirrored")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    model = train(*idx_split(args.folder, "train"), args.epochs, args.seed, args.mirror)
    metadata = {
        "architecture": json.dumps(ARCHITECTURE),
        "data": args.folder.name,
        "command": f"benchmarks/train_idx.py --epochs {args.epochs} --seed {args.seed}"
        + " --mirror" * args.mirror,
    }
    save_checkpoint(model, args.output, metadata=metadata)


if __name__ == "__main__":
    main()
