"""What 8 bits cost a trained network: its accuracy in float32, bfloat16 and int8, and torch.ao's.

    python benchmarks/accuracy_int8.py digits --output out/digits.json
    python benchmarks/accuracy_int8.py RUN --output out/fashion.json

RUN is the folder of a run of ``fastres train`` on images in memory; its best epoch is measured.
Calibration is on 512 training images, all figures are of the test images, with Wilson's intervals
of 95 %.
"""

from __future__ import annotations

import argparse
import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastres
from fastres.frontends.calibrate import decibels
from fastres.frontends.quantize import wilson
from fastres.models.digits import digits_split, load_digits_model
from fastres.models.pretrained import load_network, read_run
from fastres.perf.environment import environment
from fastres.train.batches import Batches
from fastres.train.config import Config
from fastres.train.data import open_data

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


def splits_of(held: dict[str, Any]) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and test images as the run's network takes them, and their labels."""
    data = open_data(held["data"])
    config = Config.of({"resize": held["options"]["resize"]})
    found = []
    for part in (data.train, data.validation):
        batches = Batches(replace(data, validation=part), config, torch.device("cpu"))
        x, y = zip(*batches.validation(), strict=True)
        found.append((torch.cat(x), torch.cat(y)))
    return found[0], found[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", help="digits, or the folder of a run")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    if args.source == "digits":
        model: nn.Module = load_digits_model()
        splits = digits_split("train"), digits_split("heldout")
        trained: dict[str, Any] = {"network": "the shipped ResNet-20"}
    else:
        held = read_run(args.source)
        model, splits = load_network(args.source), splits_of(held)
        trained = {"network": held["model"], "data": held["data"], "options": held["options"]}
    found = {
        "trained": trained,
        "results": measured(model.eval(), *splits),
        "environment": environment().to_dict(),
    }
    args.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
