"""The demonstration: real digits classified by PyTorch and by fastres, then both timed.

Run as a module under TRITON_INTERPRET=1 it classifies some digits through the Triton kernels in
Triton's interpreter and prints what it found as JSON; the demonstration calls itself so on machines
without a GPU.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..backends.select import select_ops
from ..errors import MissingDependencyError, one_line
from ..frontends.optimize import optimize
from ..models.digits import digits_split, load_digits_model
from ..models.registry import create_model
from ..models.resnet import ResNet
from ..perf.timing import Method, Progress
from .accuracy import AccuracyCheck, calibrate_
from .baselines import Model, eager
from .report import Report
from .results import Case, Check, Picture
from .run import BASELINE, compare, fast_dtypes, ours, parse_device

ACCURACY = 0.98
INTERPRETED = 32
TIMED_DIGITS = 64
PICTURES = 12
FAST = "fastres fp32"
METHOD = Method(rounds=15, budget=12.0)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Follow = Callable[[str], Progress]


def demo(
    *,
    device: torch.device | str = "auto",
    method: Method = METHOD,
    follow: Follow | None = None,
) -> Report:
    """Classify the held-out digits, check the answers, and only if they are right take times.

    Args:
        device: where to run; ``"auto"`` is a GPU where there is one.
        method: how to time each of the two cases.
        follow: called with the title of each piece of work, returns its progress callback.

    Raises:
        MissingDependencyError: without scikit-learn, whose digits and photographs are the input.
        ValueError: for a device that is not there.
    """
    device = parse_device(device)
    notes = [f"Ran on {_where(device)}."]
    model = load_digits_model().to(device)
    images, labels = (part.to(device) for part in digits_split("heldout"))
    checks, pictures = classify_digits(model, images, labels)
    if device.type == "cpu":
        _follow(follow, "Triton's interpreter")
        obstacle = interpreter_obstacle()
        if obstacle:
            notes.append(f"The Triton kernels did not run in the interpreter: {obstacle}.")
        else:
            checks.append(interpreter_check())
    cases: list[Case] = []
    if all(check.ok for check in checks):
        cases = time_both(model, images, method, follow)
    else:
        notes.append("Nothing was timed, since answers are wrong.")
    return Report.now(
        "fastres demo",
        checks=tuple(checks),
        cases=tuple(cases),
        pictures=pictures,
        notes=tuple(notes),
    )


def classify_digits(
    model: ResNet, images: Tensor, labels: Tensor
) -> tuple[list[Check], tuple[Picture, ...]]:
    """Held-out accuracy of PyTorch and of fastres, and how far their logits are apart."""
    contenders = in_pytorch(model) | {FAST: ours(model, torch.float32, "auto", images[:32])}
    with torch.inference_mode():
        judge = AccuracyCheck(model, contenders, [images])
        plain = contenders[BASELINE](images)
        try:
            fast = contenders[FAST](images)
        except Exception as error:
            return [Check("fastres runs", False, one_line(error))], ()
        complaint = judge(FAST, 0, fast)
    checks = [_accuracy("PyTorch", plain, labels), _accuracy("fastres", fast, labels)]
    same = int((plain.argmax(1) == fast.argmax(1)).sum())
    apart = (plain - fast).abs().max().item()
    by = select_ops("auto", images.device, torch.float32).name  # after a kernel has failed, others
    detail = complaint or (
        f"{same} of {len(labels)} digits get the same answer by {by}; "
        f"the largest difference of a logit is {apart:.1e}"
    )
    agrees = complaint is None and same == len(labels)
    checks.append(Check("fastres agrees with PyTorch", agrees, detail))
    return checks, some_pictures(images, labels, fast)


def in_pytorch(model: ResNet) -> dict[str, Model]:
    """Eager float32 in both layouts, whose rounding differs and bounds that of fastres."""
    layouts = {"": torch.contiguous_format, " channels_last": torch.channels_last}
    return {BASELINE + name: eager(model, torch.float32, kind) for name, kind in layouts.items()}


def time_both(model: ResNet, images: Tensor, method: Method, follow: Follow | None) -> list[Case]:
    """The digits, and a ResNet-50 on photographs at 224x224."""
    device = images.device
    dtypes = fast_dtypes(device)
    digits = compare(
        "ResNet-20 on digits",
        model,
        images[: 4 * TIMED_DIGITS].split(TIMED_DIGITS),
        dtypes,
        "shipped",
        method,
        _follow(follow, "timing digits"),
    )
    batch = 32 if device.type == "cuda" else 4
    photos = [photographs(batch, seed).to(device) for seed in (0, 1)]
    resnet50 = create_model("resnet50").eval().to(device)
    calibrate_(resnet50, photos[0])
    large = compare(
        "ResNet-50 on photographs",
        resnet50,
        photos,
        dtypes,
        "random, with batch norms calibrated on the photographs",
        method,
        _follow(follow, "timing ResNet-50"),
    )
    return [digits, large]


def photographs(batch: int, seed: int) -> Tensor:
    """Random 224x224 crops of scikit-learn's two photographs, normalised, (batch, 3, 224, 224)."""
    try:
        from sklearn.datasets import load_sample_images
    except ImportError as error:
        raise MissingDependencyError(
            f"the photographs come from scikit-learn, which cannot be imported ({error}); "
            "install fastres[demo]"
        ) from error
    generator = torch.Generator().manual_seed(seed)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    sources = [torch.from_numpy(np.array(image)) for image in load_sample_images().images]
    crops = []
    for index in range(batch):
        image = sources[index % len(sources)].permute(2, 0, 1).float() / 255
        top, left = (
            int(torch.randint(length - 224, (), generator=generator)) for length in image.shape[1:]
        )
        crops.append((image[:, top : top + 224, left : left + 224] - mean) / std)
    return torch.stack(crops)


def some_pictures(images: Tensor, labels: Tensor, logits: Tensor) -> tuple[Picture, ...]:
    """Up to four mistakes, if there are any, among the first right answers."""
    predicted = logits.argmax(1)
    wrong = (predicted != labels).nonzero().flatten()[:4]
    right = (predicted == labels).nonzero().flatten()[: PICTURES - len(wrong)]
    probabilities = logits.float().softmax(1).amax(1)
    return tuple(
        Picture(
            tuple(tuple(row) for row in images[i, 0].tolist()),
            str(int(labels[i])),
            str(int(predicted[i])),
            float(probabilities[i]),
        )
        for i in torch.cat([wrong, right]).tolist()
    )


def interpreter_obstacle() -> str | None:
    """Why Triton's interpreter cannot run here, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    import triton

    if _version(triton.__version__) < (3, 7) and _version(np.__version__) >= (2, 4):
        return f"that of Triton {triton.__version__} needs numpy below 2.4, not {np.__version__}"
    return None


def interpreter_check() -> Check:
    """The verdict of a process of its own, since TRITON_INTERPRET counts before Triton's import."""
    name = f"the Triton kernels, interpreted, on {INTERPRETED} digits"
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "fastres.bench.demo"],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        return Check(name, False, last)
    return Check(name, **json.loads(done.stdout.splitlines()[-1]))


def interpret() -> dict[str, object]:
    """``ok`` and ``detail`` of :func:`interpreter_check`, found in this process."""
    model = load_digits_model()
    images, labels = (part[:INTERPRETED] for part in digits_split("heldout"))
    fast = optimize(model, backend="triton", verify=False)
    with torch.inference_mode():
        plain = in_pytorch(model)
        judge = AccuracyCheck(model, plain, [images])
        logits = fast(images)
        complaint = judge("fastres triton", 0, logits)
        apart = (plain[BASELINE](images) - logits).abs().max().item()
    right = int((logits.argmax(1) == labels).sum())
    kernels = sum(name.startswith("triton") for name in fast.plan().kernels)
    detail = (
        f"{right} of {len(labels)} right through {kernels} kernels; "
        f"the largest difference of a logit is {apart:.1e}"
    )
    return {"ok": complaint is None and kernels > 0, "detail": complaint or detail}


def _accuracy(who: str, logits: Tensor, labels: Tensor) -> Check:
    right = int((logits.argmax(1) == labels).sum())
    share = right / len(labels)
    detail = f"{right} of {len(labels)} held-out digits, {share:.2%} (at least {ACCURACY:.0%})"
    return Check(f"{who} reads the digits", share >= ACCURACY, detail)


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} with the Triton kernels"
    reason = "as asked" if torch.cuda.is_available() else "since there is no GPU that torch can use"
    return f"the CPU, {reason}; times are oneDNN's, not the Triton kernels'"


def _follow(follow: Follow | None, title: str) -> Progress | None:
    return follow(title) if follow else None


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


if __name__ == "__main__":
    print(json.dumps(interpret()))
