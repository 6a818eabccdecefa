"""A network of timm, fused, compared and timed on this machine.

pip install timm
python examples/optimize_timm.py --model resnet50d --pretrained
"""

import argparse
import time
from collections.abc import Callable
from statistics import median

import timm
import torch
from torch import Tensor

import fastres


def seconds(calls: dict[str, Callable[[Tensor], Tensor]], x: Tensor, rounds: int = 10) -> dict:
    """Median seconds per call, the calls in turns."""
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            started = time.perf_counter()
            call(x)
            found[name].append(time.perf_counter() - started)
    return {name: median(times) for name, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="resnet50d")
    parser.add_argument("--pretrained", action="store_true", help="download timm's weights")
    parser.add_argument("--size", type=int, default=224, help="height and width of the images")
    parser.add_argument("--batch", type=int, default=2)
    arguments = parser.parse_args()

    source = timm.create_model(arguments.model, pretrained=arguments.pretrained).eval()
    images = torch.randn(arguments.batch, 3, arguments.size, arguments.size)
    fast = fastres.optimize(source, example_input=images)
    print(fast.plan())
    print(fast.verification.reason)

    with torch.inference_mode():
        times = seconds({"timm": source, "fastres": fast}, images)
    for name, value in times.items():
        print(f"{name:8} {1000 * value:8.2f} ms")


if __name__ == "__main__":
    main()
