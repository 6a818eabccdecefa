"""A training run in progress: steps, epochs, what it judges and what it saves."""

from __future__ import annotations

import hashlib
import math
import platform
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import TrainingError
from ..models.checkpoint import save_checkpoint
from ..version import __version__
from . import checkpoints
from .checkpoints import Folder
from .config import Config
from .data import Batches
from .optimize import autocast, average_of, optimizer_of, schedule_of
from .report import Reporter, draws, line, write_curves, write_metrics


class Trainer:
    """A run in progress."""

    def __init__(
        self, model: nn.Module, batches: Batches, folder: Folder | None, reporter: Reporter
    ) -> None:
        config, device = batches.config, batches.device
        order = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device).to(memory_format=order)  # type: ignore[call-overload]
        if config.sync_bn and batches.world > 1:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.config, self.batches, self.folder = config, batches, folder
        self.device, self.reporter = device, reporter
        self.average = average_of(self.model, config, batches.world)
        wrapped: nn.Module = self.model
        if batches.world > 1:
            wrapped = DistributedDataParallel(wrapped, broadcast_buffers=False)
        self.distributed = wrapped
        self.stepped: Any = torch.compile(wrapped) if config.compile else wrapped
        self.optimizer = optimizer_of(self.model, config)
        self.steps = math.ceil(len(batches.order(0)) / config.accumulate)
        self.schedule = schedule_of(self.optimizer, config, self.steps)
        scaled = config.amp == "fp16" and device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.epoch, self.step = 0, 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right, images
        self.saved = time.monotonic()
        self.stopped_by = 0
        self.random: dict[str, Any] | None = None

    def check_labels(self) -> None:
        """Raises ValueError for a label that the network has no logit for."""
        self.model.eval()
        with torch.inference_mode():
            logits = self.model(self.batches.sample())
        if not isinstance(logits, Tensor) or logits.dim() != 2:
            raise ValueError("model must give (N, classes) logits for (N, C, H, W) images")
        data = self.batches.data
        for name, part in (("training", data.train), ("validation", data.validation)):
            if part is None:
                continue
            wrong = ((part.labels < 0) | (part.labels >= logits.shape[1])).nonzero().flatten()
            if len(wrong):
                raise ValueError(
                    f"{name} labels must be below the model's {logits.shape[1]} logits; "
                    f"got {int(part.labels[wrong[0]])} at index {int(wrong[0])}"
                )

    def describe(
        self, described: dict[str, Any], resume: bool, allow_change: Sequence[str]
    ) -> None:
        """Write the folder's ``config.json``; for a resumed run compare with it and go on."""
        assert self.folder is not None
        data = self.batches.data
        now = {
            **described,
            "data": data.name,
            "data_hash": data.digest(),
            "classes": list(data.classes),
            "mean": data.mean,
            "std": data.std,
            "world": self.batches.world,
            "options": self.config.to_dict(),
            "fastres": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        }
        if resume:
            _refuse_changes(checkpoints.read_config(self.folder.path), now, allow_change)
            self._restore(self.folder.load())
        if self.batches.rank == 0:
            self.folder.write_config(now)
            if not draws():
                self.reporter.say("curves.png needs matplotlib: install fastres[train]")

    def run(self) -> None:
        """All epochs that are left."""
        with self._signals():
            while self.epoch < self.config.epochs:
                self._train_epoch()
                self._end_epoch()
        self.model.eval()
        if self.folder is not None and self.batches.rank == 0:
            save_checkpoint(self._judged(), self.folder.path / checkpoints.MODEL)

    def _train_epoch(self) -> None:
        """The epoch's steps from ``self.step`` on."""
        self.model.train()
        accumulate, epoch = self.config.accumulate, self.epoch
        batches = self.batches.train(epoch, self.step * accumulate)
        if self.random is not None:  # of a checkpoint; a loader has drawn from it by now
            checkpoints.restore_random_state(self.random, self.device)
            self.random = None
        self.reporter.begin(epoch + 1, self.steps, self.step)
        self.started, self.waited = time.perf_counter(), 0.0
        self.images = 0
        while self.step < self.steps:
            before = time.perf_counter()
            group = list(islice(batches, accumulate))
            ready = time.perf_counter()
            images = self._take_step(group)
            self.images += images
            self.step += 1
            self.waited += ready - before
            self.reporter.step(
                epoch + 1, self.step, self.steps, images, time.perf_counter() - before
            )
            self._pause()

    def _take_step(self, group: Sequence[tuple[Tensor, Tensor]]) -> int:
        """One step of the optimizer on the batches of a group; returns its images."""
        total = sum(len(x) for x, _ in group)
        for number, (x, y) in enumerate(group, 1):
            waits = number < len(group) and isinstance(self.distributed, DistributedDataParallel)
            with self.distributed.no_sync() if waits else nullcontext():  # type: ignore[operator]
                with autocast(self.config, self.device):
                    logits = self.stepped(x)
                loss = self.criterion(logits.float(), y)
                self.scaler.scale(loss * (len(x) / total)).backward()
            hard = y if y.dim() == 1 else y.argmax(1)
            right = (logits.detach().argmax(1) == hard).sum()
            self.sums += torch.stack(
                [loss.detach() * len(x), right, torch.tensor(len(x)).to(right)]
            )
        if self.config.clip_grad_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip_grad_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.lr_scheduler == "onecycle":
            self.schedule.step()
        done = self.epoch * self.steps + self.step
        if self.average is not None and done % self.config.model_ema_steps == 0:
            self.average.update_parameters(self.model)
            if self.epoch < self.config.lr_warmup_epochs:
                self.average.n_averaged.fill_(0)  # begin anew after the warm-up
        return total

    def _end_epoch(self) -> None:
        """Judge the epoch, write what it gave, go on to the next."""
        self._refuse_nan()
        seconds = time.perf_counter() - self.started
        sums = self._over_ranks(self.sums.clone())
        loss, accuracy, top5 = self._judge()
        rate = self.optimizer.param_groups[0]["lr"]
        if self.config.lr_scheduler != "onecycle":
            self.schedule.step()
        self.epoch, self.step = self.epoch + 1, 0
        row = {
            "epoch": self.epoch,
            "lr": rate,
            "train_loss": float(sums[0] / sums[2]),
            "train_accuracy": float(sums[1] / sums[2]),
            "loss": loss,
            "accuracy": accuracy,
            "top5": top5,
            "images_per_second": self.images * self.batches.world / seconds,
            "data_wait": self.waited / seconds,
            "seconds": seconds,
            "weights": digest(self.model),
        }
        self.history.append(row)
        self.sums.zero_()
        better = self.best is None or _value(row, self.config) > _value(self.best, self.config)
        if better:
            self.best = row
        self.reporter.say(line(row, self.config.epochs))
        self._write(better)
        self._end_if_signalled()

    def _write(self, better: bool) -> None:
        """Write what the epoch gave; last the checkpoint, after which it is not made again."""
        if self.folder is None:
            return
        path = self.folder.path
        if self.batches.rank == 0:
            metadata = {"epoch": str(self.epoch)}
            if better:
                save_checkpoint(self._judged(), path / checkpoints.BEST, metadata=metadata)
            if self.config.keep and self.epoch % self.config.keep == 0:
                save_checkpoint(self._judged(), path / f"epoch{self.epoch}.safetensors")
            write_metrics(self.history, path / "metrics.csv")
            if draws():
                write_curves({"": self.history}, path / "curves.png")
        self._save()

    def _judged(self) -> nn.Module:
        """The network that is judged and kept: the average, where there is one."""
        if self.average is None:
            return self.model
        averaged: nn.Module = self.average.module
        return averaged

    def _judge(self) -> tuple[float | None, float | None, float | None]:
        """Loss, accuracy and top-5 accuracy on the validation images, each counted once."""
        if self.batches.data.validation is None:
            return None, None, None
        model = self._judged().eval()
        if self.batches.world > 1:
            for buffer in model.buffers():
                dist.broadcast(buffer, 0)
        found = torch.zeros(4, dtype=torch.float64, device=self.device)
        with torch.inference_mode(), autocast(self.config, self.device):
            for x, y in self.batches.validation():
                logits = model(x).float()
                ranks = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
                loss = F.cross_entropy(logits, y, reduction="sum")
                counts = (loss, ranks[:, 0].sum(), ranks.sum(), torch.tensor(len(x)).to(loss))
                found += torch.stack([c.double() for c in counts])
        loss, right, close, total = self._over_ranks(found).tolist()
        return loss / total, right / total, close / total

    def _over_ranks(self, counts: Tensor) -> Tensor:
        if self.batches.world > 1:
            dist.all_reduce(counts)
        return counts

    def _pause(self) -> None:
        """Between steps: save where it is time, end where a signal asks for it."""
        config = self.config
        due = time.monotonic() - self.saved > 60 * config.save_minutes
        due |= bool(config.save_steps) and self.step % config.save_steps == 0
        asked = torch.tensor([float(due), float(self.stopped_by)])
        if self.batches.world > 1:  # all or none, or one waits for ever in the next step
            asked = asked.to(self.device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        if self.folder is not None and self.step < self.steps and asked.any():
            self._refuse_nan()
            self._save()
        self.stopped_by = int(asked[1])
        if self.step < self.steps:
            self._end_if_signalled()

    def _end_if_signalled(self) -> None:
        if not self.stopped_by:
            return
        if self.folder is not None:
            self.reporter.say(
                f"saved {self.folder.path / checkpoints.LAST}; go on with: "
                f"fastres train --resume {self.folder.path}"
            )
        if self.stopped_by == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.stopped_by)

    def _refuse_nan(self) -> None:
        """Raises TrainingError where a loss since the epoch began was no finite number."""
        if bool(self.sums.isfinite().all()):
            return
        kept = ""
        if self.folder is not None and self.batches.rank == 0:
            kept = f"; the weights are in {self.folder.path / 'nan.safetensors'}"
            save_checkpoint(self.model, self.folder.path / "nan.safetensors")
        raise TrainingError(
            f"the loss became infinite or no number by step {self.step} of epoch {self.epoch + 1}, "
            f"lr {self.optimizer.param_groups[0]['lr']:g}, scale {self.scaler.get_scale():g}{kept}"
        )

    def _save(self) -> None:
        """The whole state, of every process; the first writes it."""
        state = checkpoints.random_state(self.device)
        states: list[Any] = [state]
        if self.batches.world > 1:
            states = [None] * self.batches.world
            dist.all_gather_object(states, state)
        if self.folder is not None and self.batches.rank == 0:
            self.folder.save(
                {
                    **{name: part.state_dict() for name, part in self._parts().items()},
                    "epoch": self.epoch,
                    "step": self.step,
                    "sums": self.sums,
                    "history": self.history,
                    "best": self.best,
                    "random": states,
                }
            )
        self.saved = time.monotonic()

    def _restore(self, held: dict[str, Any]) -> None:
        for name, part in self._parts().items():
            part.load_state_dict(held[name])
        self.epoch, self.step = held["epoch"], held["step"]
        self.history, self.best = held["history"], held["best"]
        self.sums = held["sums"].to(self.device)
        self.random = held["random"][self.batches.rank]

    def _parts(self) -> dict[str, Any]:
        """What has a state dict."""
        parts = {"model": self.model, "optimizer": self.optimizer, "schedule": self.schedule}
        parts |= {"scaler": self.scaler}
        return parts | ({} if self.average is None else {"average": self.average})

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """In here a first SIGINT, SIGTERM or SIGUSR1 is only noted; a second does what it did."""
        before: dict[int, Any] = {}

        def note(number: int, frame: Any) -> None:
            self.stopped_by = number
            for known, handler in before.items():
                signal.signal(known, handler)
            self.reporter.say("ending after this step; once more to end at once")

        if self.folder is not None and threading.current_thread() is threading.main_thread():
            names = [n for n in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, n)]
            before = {n: signal.getsignal(n) for n in (getattr(signal, name) for name in names)}
            for number in before:
                signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _value(row: dict[str, Any], config: Config) -> float:
    """What the best epoch has most of."""
    part = "train_" if row["accuracy"] is None else ""
    value = float(row[part + config.monitor])
    return value if config.monitor == "accuracy" else -value


def _refuse_changes(then: dict[str, Any], now: dict[str, Any], allowed: Sequence[str]) -> None:
    """Raises ValueError for what a resumed run has otherwise than before, unless it may."""
    before, after = ({**run, **run.get("options", {})} for run in (then, now))
    for name in (*now["options"], "model", "arguments", "classes", "world", "data_hash"):
        same = before.get(name) == (list(v) if isinstance(v := after.get(name), tuple) else v)
        if not same and name not in allowed:
            raise ValueError(
                f"{name} was {before.get(name)!r} in the run to resume, got {after.get(name)!r}; "
                f"allow_change={name} goes on all the same"
            )


def digest(model: nn.Module) -> str:
    """A hash of all parameters and buffers."""
    found = hashlib.sha256()
    for name, value in model.state_dict().items():
        found.update(name.encode())
        found.update(
            value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        )
    return found.hexdigest()[:16]
