"""Cases: options, data sets and folders of training runs."""

from __future__ import annotations

import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from fastres.models.pretrained import load_network, read_run
from fastres.train import checkpoints
from fastres.train.config import Config
from fastres.train.data import from_tensors, open_data
from fastres.train.loop import evaluate, fit
from fastres.train.report import compared, write_curves
from messages.provoke import add, case, without

IMAGES = torch.arange(6 * 16.0).view(6, 1, 4, 4)
LABELS = torch.tensor([0, 1, 0, 1, 0, 1])


def train(model: nn.Module | None = None, labels: Any = LABELS, **options: Any) -> Any:
    network = model or nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    return fit(network, IMAGES, labels, **{"batch_size": 3, "progress": False, **options})


add("train: an option that is unknown", lambda: train(momentun=0.9))
add("train: no integer", lambda: Config(epochs=1.5))  # type: ignore[arg-type]
add("train: out of range", lambda: Config(batch_size=0))
add("train: no choice", lambda: Config(opt="lamb"))
add("train: no flag", lambda: Config(flip=1))  # type: ignore[arg-type]
add("train: no share", lambda: Config(label_smoothing=1.5))
add("train: two warm-ups", lambda: Config(lr_scheduler="onecycle", lr_warmup_epochs=1))
add("train: warm-up to the end", lambda: Config(epochs=2, lr_warmup_epochs=2))
add("train: no labels", lambda: train(labels=None))
add("train: labels of a named set", lambda: fit(nn.Identity(), "digits", LABELS))
add("train: a batch that is too large", lambda: train(batch_size=9))
add("train: a label without a logit", lambda: train(labels=LABELS + 1))
add("train: no logits", lambda: train(nn.Conv2d(1, 2, 3)))
add("train: images that are none", lambda: from_tensors(IMAGES.int(), LABELS))
add("train: labels that do not fit", lambda: from_tensors(IMAGES, LABELS.float()))
add("train: labels of two classes", lambda: from_tensors(IMAGES, torch.full((6, 2), 0.5)))
add("train: labels that are no numbers of classes", lambda: from_tensors(IMAGES, LABELS - 1))
add("train: labels that are words", lambda: from_tensors(IMAGES, ["cat"] * 6))
add("train: a data set of torch alone", lambda: fit(nn.Linear(1, 1), TensorDataset(IMAGES)))
add("train: validation of three", lambda: train(validation=(IMAGES, LABELS, 1)))
add("train: bytes beside floats", lambda: train(validation=(IMAGES.byte(), LABELS)))
add("train: nothing to train", lambda: train(nn.Flatten()))
add("train: a loss that is no number", lambda: train(lr=1e38, epochs=9))
add("train: nothing to resume", lambda: train(folder="run", resume=True))


@case("train: another run in the folder")
def _() -> None:
    train(folder="run", epochs=1)
    train(folder="run", epochs=1)


@case("train: resumed otherwise")
def _() -> None:
    train(folder="run", epochs=1)
    train(folder="run", epochs=1, lr=0.3, resume=True)


@case("train: resumed with another optimizer")
def _() -> None:
    train(folder="run", epochs=1)
    train(folder="run", epochs=1, opt="adamw", resume=True, allow_change=("opt",))


@case("train: a checkpoint that is none")
def _() -> None:
    Path("last.safetensors").write_bytes(b"no checkpoint")
    checkpoints.unpack(Path("last.safetensors"))


@case("train: both checkpoints damaged")
def _() -> None:
    train(folder="run", epochs=1)
    (Path("run") / "last.safetensors").write_bytes(b"")
    train(folder="run", epochs=1, resume=True)


add("train: state of another kind", lambda: checkpoints.pack({"a": {1}}))
add("train: no folder of a run", lambda: read_run("nowhere"))


@case("train: options that are no object")
def _() -> None:
    Path("config.json").write_text("[]")
    read_run(".")


add("train: no such data set", lambda: open_data("imagenet"))
add("train: no idx files", lambda: open_data("mnist:."))
add("train: no CIFAR-10", lambda: open_data("cifar10:."))
add("train: an empty folder", lambda: open_data("."))


@case("train: idx files that are damaged")
def _() -> None:
    Path("train-images-idx3-ubyte").write_bytes(struct.pack(">HBBi", 0, 8, 3, 1))
    open_data("mnist:.")


@case("train: arrays of other names")
def _() -> None:
    np.savez("set.npz", images=np.zeros(3))
    open_data("set.npz")


@case("train: images without labels to be judged by")
def _() -> None:
    np.savez("set.npz", x_train=IMAGES.numpy(), y_train=LABELS.numpy(), x_test=IMAGES.numpy())
    open_data("set.npz")


@case("train: no such arrays")
def _() -> None:
    open_data("set.npz")


@case("train: images of a folder that are to be moved")
def _() -> None:
    _picture("train/cat/1.png")
    fit(nn.Linear(1, 1), ".", batch_size=1, shift=2)


@case("train: no arrays")
def _() -> None:
    Path("set.npz").write_bytes(b"no arrays")
    open_data("set.npz")


def _picture(path: str) -> None:
    from PIL import Image

    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path)


@case("train: a class without pictures")
def _() -> None:
    Path("train/cat").mkdir(parents=True)
    open_data(".")


@case("train: other classes to judge by")
def _() -> None:
    _picture("train/cat/1.png")
    _picture("val/dog/1.png")
    open_data(".")


@case("train: a damaged picture")
def _() -> None:
    _picture("train/cat/1.png")
    Path("train/cat/2.png").write_bytes(b"no picture")
    open_data(".")


@case("train: pictures of one class all damaged")
def _() -> None:
    _picture("train/cat/1.png")
    Path("train/dog").mkdir()
    Path("train/dog/1.png").write_bytes(b"no picture")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        open_data(".", on_bad_file="skip")


add("train: more workers than images", lambda: train(workers=7))


@case("train: nothing to be judged by")
def _() -> None:
    evaluate(nn.Identity(), from_tensors(IMAGES, LABELS), Config())


@case("train: weights beside a run")
def _() -> None:
    Path("config.json").write_text("{}")
    load_network(".", weights="DEFAULT")


@case("report runs: a folder without an epoch")
def _() -> None:
    for name in ("a", "b"):
        Path(name).mkdir()
        (Path(name) / "config.json").write_text("{}")
    compared(["a", "b"])


@case("report runs: a folder with an empty table")
def _() -> None:
    for name in ("a", "b"):
        Path(name).mkdir()
        (Path(name) / "config.json").write_text("{}")
        (Path(name) / "metrics.csv").write_text("epoch,loss\n")
    compared(["a", "b"])


add("report runs: one folder", lambda: compared(["a"]))


@case("report runs: no matplotlib")
def _() -> None:
    with without("matplotlib"):
        write_curves({}, Path("both.png"))
