"""The loop: ``fit`` trains a network and can be interrupted at any step without changing a bit."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..models.preprocess import Normalize
from .batches import Batches
from .checkpoints import Folder
from .config import Config
from .data import Data, from_tensors, open_data, split_of
from .judge import check_labels, dtype_of, judge
from .trainer import Trainer


@dataclass
class Run:
    """What a training run found.

    Attributes:
        model: the network, in eval mode, with its last weights.
        config: the options.
        data: what it was trained on.
        history: a row for each epoch: ``epoch``, ``lr``, ``train_loss``, ``train_accuracy``,
            ``loss``, ``accuracy`` and ``top5`` of validation (None without), ``images_per_second``,
            ``data_wait`` (share of time), ``seconds`` and ``weights``, a hash of them.
        best: the row of the best epoch.
        folder: where the files are; None for a run without.
    """

    model: nn.Module
    config: Config
    data: Data
    history: list[dict[str, Any]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    folder: str | None = None

    @property
    def normalize(self) -> Normalize | None:
        """Turns uint8 images into what the network was trained on; None for other images."""
        mean, std = self.data.mean, self.data.std
        return Normalize(mean, std) if mean and std else None

    def evaluate(self, images: Any, labels: Any) -> dict[str, float]:
        """``loss``, ``accuracy`` and ``top5`` on images and labels of the form that it trained on.

        Raises:
            ValueError: they do not fit.
        """
        part = split_of("evaluation", images, labels)
        return evaluate(self.model, replace(self.data, validation=part), self.config)


def fit(
    model: nn.Module,
    train: Any,
    labels: Any = None,
    *,
    validation: tuple[Any, Any] | None = None,
    folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    overwrite: bool = False,
    allow_change: Sequence[str] = (),
    device: torch.device | str | None = None,
    progress: bool = True,
    described: dict[str, Any] | None = None,
    **options: Any,
) -> Run:
    """Train ``model`` in place.

    Args:
        model: takes (N, C, H, W) images and gives (N, classes) logits.
        train: images, as a tensor or an array, (N, C, H, W) or (N, H, W, C), with ``labels``, (N,)
            or one-hot; or the name of a data set, see :func:`fastres.train.data.open_data`. uint8
            images are normalised by their own mean and deviation, others are taken as they are.
        labels: of ``train``.
        validation: images and labels to judge each epoch by; a named data set has its own.
        folder: where options, metrics, curves and checkpoints are kept; None keeps none.
        resume: go on from the folder's last checkpoint; the result is that of a run never cut.
        overwrite: whether another run in the folder may be replaced.
        allow_change: options that a resumed run may have otherwise.
        device: by default where the model's parameters are.
        progress: show progress on standard error.
        described: what ``config.json`` says of the network.
        options: the fields of :class:`fastres.train.config.Config`: ``epochs``, ``batch_size``,
            ``lr``, ``opt`` ...

    Raises:
        TypeError: an option that is unknown.
        ValueError: an option, an image or a label that does not fit; a folder with another run.
        TrainingError: the loss became infinite or no number; the last checkpoint is untouched.
        KeyboardInterrupt, SystemExit: a first SIGINT, or SIGTERM or SIGUSR1, ended the run after
            its step and a checkpoint; a second ends it at once.
    """
    config = Config.of(options)
    data = _data(train, labels, validation, config)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("model must have parameters that require a gradient; it has none")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    joined = dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)
    where = torch.device(device) if device is not None else next(model.parameters()).device
    if world > 1 and where.type == "cuda":
        where = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    _check_sizes(data, config, world)
    held = None if folder is None else Folder(folder, resume, overwrite)
    batches = Batches(data.on(where), config, where, rank, world, dtype_of(model))
    with _deterministic(config):
        torch.manual_seed(config.seed)
        trainer = Trainer(model, batches, held, progress)
        check_labels(trainer.model, batches)
        if held is not None:
            trainer.describe(described or {}, resume, allow_change)
        trainer.run()
    kept = None if held is None else str(held.path)
    return Run(trainer.model, config, data, trainer.history, trainer.best, kept)


def evaluate(
    model: nn.Module, data: Data, config: Config, device: torch.device | str | None = None
) -> dict[str, float]:
    """``loss``, ``accuracy`` and ``top5`` of a network on the data's validation images.

    Raises:
        ValueError: there are none, or labels that the network has no logit for.
    """
    if data.validation is None:
        raise ValueError(f"{data.name} has no validation images to be judged by")
    where = torch.device(device) if device is not None else next(model.parameters()).device
    batches = Batches(data.on(where), config, where, dtype=dtype_of(model))
    check_labels(model.to(where), batches)
    return judge(model, batches)


def _data(train: Any, labels: Any, validation: Any, config: Config) -> Data:
    if isinstance(train, Data):
        return train
    if isinstance(train, (str, os.PathLike)):
        if labels is not None or validation is not None:
            raise ValueError(f"labels and validation do not go with {str(train)!r}, which has them")
        return open_data(os.fspath(train), config.on_bad_file)
    if labels is None and isinstance(train, (tuple, list)) and len(train) == 2:
        train, labels = train
    if labels is None:
        raise ValueError(
            "train must be images, with labels, or the name of a data set; "
            f"got a {type(train).__name__} alone"
        )
    if validation is not None and len(validation) != 2:
        raise ValueError(f"validation must be images and labels; got {len(validation)} things")
    return from_tensors(train, labels, validation)


def _check_sizes(data: Data, config: Config, world: int) -> None:
    """Raises ValueError where a process gets no whole batch, or there is no file for a worker."""
    if config.batch_size * world > len(data.train):
        raise ValueError(
            f"batch_size must be at most the {len(data.train)} training images over {world} "
            f"processes, got {config.batch_size}"
        )
    if config.workers > len(data.train):
        raise ValueError(
            f"workers must be at most the {len(data.train)} training images, got {config.workers}"
        )
    if config.shift and data.train.images is None:
        raise ValueError(
            "shift is for images in memory, those of a folder are cropped at random; "
            f"got {config.shift}"
        )


@contextmanager
def _deterministic(config: Config) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    if config.use_deterministic_algorithms:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
