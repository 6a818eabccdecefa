"""What 8 bits cost a trained network: its accuracy in float32, bfloat16 and int8, and torch.ao's.

    python benchmarks/accuracy_int8.py digits --output out/digits.json
    python benchmarks/accuracy_int8.py FOLDER --checkpoint out/fashion.safetensors --output ...

FOLDER and the checkpoint are those of ``train_idx.py``. Calibration is on 512 training images, all
figures are of the test images, with Wilson's intervals of 95 %.
"""

from __future__ import annotations

import argparse
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from train_idx import ARCHITECTURE, idx_split

import fastres
from fastres.frontends.calibrate import decibels
from fastres.frontends.quantize import wilson
from fastres.models.checkpoint import load_checkpoint, read_metadata
from fastres.models.digits import digits_split, load_digits_model
from fastres.models.registry import create_model
from fastres.perf.environment import environment

IMAGES = 512


@torch.inference_mode()
def logits_of(model: Any, images: Tensor) -> Tensor:
    return torch.cat([model(batch).float() for batch in images.split(250)])


def torch_ao(model: nn.Module, images: Tensor) -> nn.Module:
    """torch.ao's quantisation by FX for oneDNN, calibrated on the same images."""
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx

    torch.backends.quantized.engine = "onednn"
    plain = torch.fx.symbolic_trace(model)
    mapping = get_default_qconfig_mapping("onednn").set_object_type(nn.Linear, None)
    prepared = prepare_fx(plain, mapping, (images[:1],))
    logits_of(prepared, images)
    return convert_fx(prepared)


def figures(logits: Tensor, exact: Tensor, labels: Tensor) -> dict[str, Any]:
    answers = logits.argmax(1)
    right, same = int((answers == labels).sum()), int((answers == exact.argmax(1)).sum())
    return {
        "accuracy": right / len(labels),
        "interval": wilson(right, len(labels)),
        "agreement": same / len(labels),
        "agreement_interval": wilson(same, len(labels)),
        "decibels": min(decibels(exact, logits), 200.0),
    }


def measured(
    model: nn.Module, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]
) -> dict[str, Any]:
    images, labels = train
    places = torch.linspace(0, len(images) - 1, IMAGES).round().long()
    chosen = (images[places], labels[places])
    exact = logits_of(model, test[0])
    int8 = {name: fastres.quantize(model, chosen, calibrator=name) for name in ("mse", "max")}
    print(int8["mse"].report)
    contenders = {
        "float32": fastres.optimize(model, images[:4]),
        "bfloat16": fastres.optimize(model, images[:4], dtype=torch.bfloat16),
        "int8": int8["mse"],
        "int8, calibrator max": int8["max"],
        "int8 of torch.ao (FX, onednn)": torch_ao(model, chosen[0]),
    }
    found = {}
    for name, contender in contenders.items():
        found[name] = figures(logits_of(contender, test[0]), exact, test[1])
        row = found[name]
        low, high = row["interval"]
        print(
            f"{name:30} accuracy {row['accuracy']:.2%} ({low:.2%} to {high:.2%}), "
            f"agreement {row['agreement']:.2%}, {row['decibels']:.1f} dB",
            flush=True,
        )
    return {"test_images": len(test[1]), "calibration": int8["mse"].report.to_dict(), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="digits, or a folder of idx files")
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if args.data == "digits":
        model: nn.Module = load_digits_model()
        splits = digits_split("train"), digits_split("heldout")
        trained: dict[str, Any] = {"network": "the shipped ResNet-20"}
    else:
        model = create_model(**ARCHITECTURE)
        load_checkpoint(model, args.checkpoint)
        splits = idx_split(Path(args.data), "train"), idx_split(Path(args.data), "t10k")
        trained = {"network": "ResNet-18", **read_metadata(args.checkpoint)}
        trained.pop("architecture", None)
    found = {
        "trained": trained,
        "results": measured(model.eval(), *splits),
        "environment": environment().to_dict(),
    }
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
