"""The options of a training run: one frozen dataclass, checked, as JSON and as command options."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from typing import Any

import numpy as np


def _option(default: Any, text: str, choices: tuple[str, ...] = (), least: float = 0) -> Any:
    return field(default=default, metadata={"help": text, "choices": choices, "least": least})


@dataclass(frozen=True, kw_only=True)
class Config:
    """How to train; the names are those of torchvision's reference script where it has one.

    Raises:
        ValueError: an option out of its range, or two that exclude each other.
    """

    epochs: int = _option(10, "Passes over the training images.", least=1)
    batch_size: int = _option(128, "Images of a step, for each process.", least=1)
    accumulate: int = _option(1, "Batches whose gradients make one step.", least=1)
    opt: str = _option("sgd", "Optimizer.", ("sgd", "adamw"))
    lr: float = _option(0.1, "Learning rate; of onecycle the highest.")
    momentum: float = _option(0.9, "Momentum of sgd.")
    nesterov: bool = _option(False, "Nesterov momentum.")
    weight_decay: float = _option(1e-4, "Weight decay.")
    norm_weight_decay: float | None = _option(None, "Weight decay of norms; by default the same.")
    lr_scheduler: str = _option(
        "cosine", "How the rate falls.", ("constant", "step", "cosine", "onecycle")
    )
    lr_warmup_epochs: int = _option(0, "Epochs in which the rate rises first.")
    lr_warmup_decay: float = _option(0.01, "The share of the rate that warm-up starts from.")
    lr_step_size: int = _option(30, "Epochs between steps of the rate.", least=1)
    lr_gamma: float = _option(0.1, "What a step of the rate multiplies it by.")
    lr_min: float = _option(0.0, "The rate at the end of cosine.")
    label_smoothing: float = _option(0.0, "Label smoothing.")
    mixup_alpha: float = _option(0.0, "Mixup's alpha; 0 is off.")
    cutmix_alpha: float = _option(0.0, "CutMix's alpha; 0 is off.")
    flip: bool = _option(False, "Mirror half of the images; always those of folders.")
    shift: int = _option(0, "Move images by up to so many pixels, zeros behind them.")
    resize: int | None = _option(None, "Height and width for the network.", least=1)
    model_ema: bool = _option(False, "Average the weights and judge and keep the average.")
    model_ema_steps: int = _option(32, "Steps between updates of the average.", least=1)
    model_ema_decay: float = _option(0.99998, "Decay of the average at batch 1 and one epoch.")
    clip_grad_norm: float | None = _option(None, "Largest norm of the gradients.")
    amp: str = _option("none", "Mixed precision.", ("none", "bf16", "fp16"))
    channels_last: bool = _option(True, "NHWC memory.")
    compile: bool = _option(False, "Train through torch.compile.")
    sync_bn: bool = _option(False, "Batch norms over all processes.")
    use_deterministic_algorithms: bool = _option(False, "Refuse operators that vary.")
    workers: int = _option(0, "Processes that decode images.")
    on_bad_file: str = _option("raise", "Of folders: files that are no images.", ("raise", "skip"))
    monitor: str = _option("accuracy", "What the best epoch is best in.", ("accuracy", "loss"))
    keep: int = _option(0, "Keep the weights of every so many epochs; 0 is none.")
    save_minutes: float = _option(10.0, "Minutes between checkpoints inside an epoch.")
    save_steps: int = _option(0, "Steps between checkpoints inside an epoch; 0 is by time.")
    seed: int = _option(0, "Of the weights, the order and the augmentation.")

    def __post_init__(self) -> None:
        for option in fields(self):
            if isinstance(number := getattr(self, option.name), np.generic):
                object.__setattr__(self, option.name, number.item())
            _check(option, getattr(self, option.name))
        for name in ("label_smoothing", "momentum", "model_ema_decay", "lr_warmup_decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be from 0 to 1, got {getattr(self, name)}")
        if self.lr_scheduler == "onecycle" and self.lr_warmup_epochs:
            raise ValueError("lr_warmup_epochs goes with other schedulers: onecycle has a warm-up")
        if self.lr_warmup_epochs >= self.epochs:
            raise ValueError(
                f"lr_warmup_epochs must be below epochs ({self.epochs}), "
                f"got {self.lr_warmup_epochs}"
            )

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Config:
        """The options given, the others at their defaults.

        Raises:
            TypeError: an option that is unknown; the message has the closest one.
            ValueError: as the class.
        """
        known = [option.name for option in fields(cls)]
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, 1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise TypeError(f"unknown option {name!r} of training{hint}")
        return cls(**options)


def _check(option: Field[Any], value: Any) -> None:
    """Raises ValueError where the value is not of the option's type or range."""
    name, kind = option.name, str(option.type)
    choices, least = option.metadata["choices"], option.metadata["least"]
    if value is None and "None" in kind:
        return
    if choices:
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
    elif kind == "bool":
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")
    elif isinstance(value, bool) or not isinstance(
        value, int if kind.startswith("int") else (int, float)
    ):
        wanted = "an integer" if kind.startswith("int") else "a number"
        raise ValueError(f"{name} must be {wanted}, got {value!r}")
    elif not math.isfinite(value) or value < least:
        raise ValueError(f"{name} must be at least {least:g}, got {value!r}")
