"""Train a ResNet-20 on scikit-learn's real 8x8 digits and save it as safetensors.

    python examples/train_digits.py --output digits.safetensors

The network never sees the held-out quarter (fastres.models.digits.digits_split) before its training
is
over, and the number of epochs is fixed beforehand: the accuracies printed are of the last epoch,
and the network saved is that of the first seed, not that of the best.
"""

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres.models.checkpoint import save_checkpoint
from fastres.models.digits import digits_split
from fastres.models.registry import create_model

ARCHITECTURE = {"name": "resnet20", "in_chans": 1, "num_classes": 10}


def augment(images: Tensor) -> Tensor:
    """Rotate up to 12 degrees, scale by up to 12 %, shift by up to one pixel; (N, 1, 8, 8)."""
    n, pixel = len(images), 2 / images.shape[-1]
    angle = torch.empty(n).uniform_(-1, 1) * math.radians(12)
    scale = torch.empty(n).uniform_(0.88, 1.12)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    shift = torch.empty(2, n).uniform_(-pixel, pixel)
    rows = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=1)
    grid = F.affine_grid(rows.view(n, 2, 3), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, align_corners=False)


def train(images: Tensor, labels: Tensor, seed: int, epochs: int, batch: int = 64) -> nn.Module:
    """SGD with Nesterov momentum, one cycle of the learning rate, label smoothing."""
    torch.manual_seed(seed)
    model = create_model(**ARCHITECTURE)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.2, total_steps=steps)

    model.train()
    for _ in range(epochs):
        order = torch.randperm(len(images))
        for start in range(0, len(images) - batch + 1, batch):
            picked = order[start : start + batch]
            logits = model(augment(images[picked]))
            loss = F.cross_entropy(logits, labels[picked], label_smoothing=0.1)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """The share of images whose largest logit is the label's."""
    return float((model(images).argmax(1) == labels).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--output", type=Path, help="where to save the first seed's network")
    args = parser.parse_args()

    torch.use_deterministic_algorithms(True)
    images, labels = digits_split("train")
    models = {}
    for seed in args.seeds:
        start = time.perf_counter()
        models[seed] = train(images, labels, seed, args.epochs)
        print(f"seed {seed}: trained {args.epochs} epochs in {time.perf_counter() - start:.0f} s")

    heldout = digits_split("heldout")
    accuracies = {seed: accuracy(model, *heldout) for seed, model in models.items()}
    for seed, value in accuracies.items():
        print(f"seed {seed}: {value:.2%} of {len(heldout[1])} held-out digits")

    if args.output:
        first = args.seeds[0]
        command = f"python examples/train_digits.py --epochs {args.epochs} --seeds " + " ".join(
            map(str, args.seeds)
        )
        metadata = {
            "architecture": json.dumps(ARCHITECTURE),
            "seed": str(first),
            "command": command,
            "heldout_accuracy": json.dumps(accuracies),
        }
        save_checkpoint(models[first], args.output, metadata=metadata)
        print(f"wrote {args.output} ({args.output.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()
