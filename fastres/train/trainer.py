"""A training run in progress: steps, epochs and what it saves."""

from __future__ import annotations

import json
import math
import platform
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..errors import TrainingError
from ..files import atomic_write
from ..models.checkpoint import digest, save_checkpoint
from ..models.pretrained import BEST, RUN, read_run
from ..version import __version__
from .batches import Batches
from .checkpoints import EPOCH, LAST, MODEL, NAN, Folder, random_state, restore_random_state
from .judge import NOT_JUDGED, autocast, judge, over_ranks
from .optimize import average_of, optimizer_of, schedule_of
from .report import CURVES, METRICS, Reporter, draws, write_curves, write_metrics
from .taps import ReachedTaps

FIXED = ("model", "opt", "model_ema")  # what a checkpoint holds is theirs
LOOKS = 50  # steps between looks at the loss, for which a GPU has to be waited for


class Trainer:
    """A run in progress."""

    def __init__(
        self, model: nn.Module, batches: Batches, folder: Folder | None, shown: bool
    ) -> None:
        config, device = batches.config, batches.device
        order = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device).to(memory_format=order)  # type: ignore[call-overload]
        if config.sync_bn and batches.world > 1:
            self.model = nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self.config, self.batches, self.folder, self.device = config, batches, folder, device
        self.first = batches.rank == 0
        self.average = average_of(self.model, config, batches.world)
        self.kept: nn.Module = self.model if self.average is None else self.average.module
        self.distributed: nn.Module = self.model
        if batches.world > 1:
            self.distributed = DistributedDataParallel(self.model, broadcast_buffers=False)
        self.stepped: Any = torch.compile(self.distributed) if config.compile else self.distributed
        plain = device.type == "cpu" and not config.compile
        self.taps: ReachedTaps | nullcontext[None] = ReachedTaps() if plain else nullcontext()
        self.optimizer = optimizer_of(self.model, config)
        self.steps = math.ceil(len(batches.order(0)) / config.accumulate)
        self.reporter = Reporter(shown and self.first, config.epochs, self.steps)
        self.schedule = schedule_of(self.optimizer, config, self.steps)
        scaled = config.amp == "fp16" and device.type == "cuda"
        self.scaler = torch.amp.GradScaler(device.type, enabled=scaled)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=config.label_smoothing)
        self.parts: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}
        self.parts |= {"schedule": self.schedule, "scaler": self.scaler}
        self.parts |= {} if self.average is None else {"average": self.average}
        self.epoch, self.step, self.stopped_by = 0, 0, 0
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, right, images
        self.saved = time.monotonic()
        self.random: dict[str, Any] | None = None

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
            "skipped": data.skipped,
            "classes": list(data.classes),
            "mean": data.mean,
            "std": data.std,
            "world": self.batches.world,
            "options": asdict(self.config),
            "fastres": __version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
        }
        if resume:
            changed = _changes(read_run(self.folder.path), now, allow_change)
            self._restore(self.folder.load(), changed)
        elif self.first:
            self.folder.begin()
        if self.first:
            text = json.dumps(now, indent=1) + "\n"
            atomic_write(self.folder.path / RUN, text.encode())
            if not draws():
                self.reporter.say(f"{CURVES} needs matplotlib: install fastres[train]")

    def run(self) -> None:
        """All epochs that are left."""
        left_out = len(self.batches.share(0)) - sum(map(len, self.batches.order(0)))
        if left_out:
            self.reporter.say("a last batch of one image is left out: its norms would be of one")
        with self._signals():
            while self.epoch < self.config.epochs:
                self._train_epoch()
                self._end_epoch()
        self.model.eval()
        if self.folder is not None and self.first:
            save_checkpoint(self.kept, self.folder.path / MODEL)

    def _train_epoch(self) -> None:
        """The epoch's steps from ``self.step`` on."""
        self.model.train()
        accumulate = self.config.accumulate
        batches = self.batches.train(self.epoch, self.step * accumulate)
        if self.random is not None:  # of a checkpoint; a loader has drawn from it by now
            restore_random_state(self.random, self.device)
            self.random = None
        self.started, self.waited, self.images = time.perf_counter(), 0.0, 0
        while self.step < self.steps:
            before = time.perf_counter()
            group = list(islice(batches, accumulate))
            self.waited += time.perf_counter() - before
            images = self._take_step(group)
            self.images += images
            self.step += 1
            self.reporter.step(self.epoch, self.step, images, time.perf_counter() - before)
            self._pause()

    def _take_step(self, group: Sequence[tuple[Tensor, Tensor]]) -> int:
        """One step of the optimizer on the batches of a group; returns its images."""
        total = sum(len(x) for x, _ in group)
        for number, (x, y) in enumerate(group, 1):
            waits = number < len(group) and isinstance(self.distributed, DistributedDataParallel)
            with self.distributed.no_sync() if waits else nullcontext():  # type: ignore[operator]
                with autocast(self.config, self.device), self.taps:
                    logits = self.stepped(x)
                if not getattr(self.taps, "found", True):
                    self.taps = nullcontext()
                loss = self.criterion(logits.float(), y)
                self.scaler.scale(loss * (len(x) / total)).backward()
            hard = y if y.dim() == 1 else y.argmax(1)
            right = (logits.detach().argmax(1) == hard).sum()
            seen = torch.tensor(len(x)).to(right)
            self.sums += torch.stack([loss.detach() * len(x), right, seen])
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
        loss, right, images = over_ranks(self.sums.clone(), self.batches.world).tolist()
        rate = self.optimizer.param_groups[0]["lr"]
        judged = judge(self.kept, self.batches) if self.batches.data.validation else NOT_JUDGED
        if self.config.lr_scheduler != "onecycle":
            self.schedule.step()
        self.epoch, self.step = self.epoch + 1, 0
        row = {
            "epoch": self.epoch,
            "lr": rate,
            "train_loss": loss / images,
            "train_accuracy": right / images,
            **judged,
            "images_per_second": self.images * self.batches.world / seconds,
            "data_wait": self.waited / seconds,
            "seconds": seconds,
            "weights": digest(self.model.state_dict())[:16],
        }
        self.history.append(row)
        self.sums.zero_()
        better = self.best is None or self._value(row) > self._value(self.best)
        self.best = row if better else self.best
        self.reporter.epoch(row)
        self._write(better)
        self._end_if_signalled()

    def _value(self, row: dict[str, Any]) -> float:
        """What the best epoch has most of."""
        monitor = self.config.monitor
        value = float(row[monitor if row["accuracy"] is not None else f"train_{monitor}"])
        return value if monitor == "accuracy" else -value

    def _write(self, better: bool) -> None:
        """Write what the epoch gave; last the checkpoint, after which it is not made again."""
        if self.folder is None:
            return
        path = self.folder.path
        if self.first:
            if better:
                save_checkpoint(self.kept, path / BEST, metadata={"epoch": str(self.epoch)})
            if self.config.keep and self.epoch % self.config.keep == 0:
                save_checkpoint(self.kept, path / EPOCH.format(self.epoch))
            write_metrics(self.history, path / METRICS)
            if draws():
                write_curves({"": self.history}, path / CURVES)
        self._save()

    def _pause(self) -> None:
        """Between steps: save where it is time, end where a signal asks for it."""
        config = self.config
        if self.device.type == "cpu" or self.step % LOOKS == 0:
            self._refuse_nan()
        due = time.monotonic() - self.saved > 60 * config.save_minutes
        due |= bool(config.save_steps) and self.step % config.save_steps == 0
        asked = torch.tensor([float(due), float(self.stopped_by)])
        if self.batches.world > 1:  # all or none, or one waits for ever in the next step
            asked = asked.to(self.device)
            dist.all_reduce(asked, dist.ReduceOp.MAX)
        self.stopped_by = int(asked[1])
        if self.step < self.steps:
            if self.folder is not None and asked.any():
                self._refuse_nan()
                self._save()
            self._end_if_signalled()

    def _end_if_signalled(self) -> None:
        if not self.stopped_by:
            return
        if self.folder is not None:
            path = self.folder.path
            self.reporter.say(f"saved {path / LAST}; go on with: fastres train --resume {path}")
        if self.stopped_by == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + self.stopped_by)

    def _refuse_nan(self) -> None:
        """Raises TrainingError where a loss since the epoch began was no finite number."""
        if bool(self.sums.isfinite().all()):
            return
        kept = ""
        if self.folder is not None and self.first:
            kept = f"; the weights are in {self.folder.path / NAN}"
            save_checkpoint(self.model, self.folder.path / NAN)
        raise TrainingError(
            f"the loss became infinite or no number by step {self.step} of epoch {self.epoch + 1}, "
            f"lr {self.optimizer.param_groups[0]['lr']:g}, scale {self.scaler.get_scale():g}{kept}"
        )

    def _save(self) -> None:
        """The whole state, of every process; the first writes it."""
        states: list[Any] = [random_state(self.device)]
        if self.batches.world > 1:
            states *= self.batches.world
            dist.all_gather_object(states, states[0])
        if self.folder is not None and self.first:
            tree = {name: part.state_dict() for name, part in self.parts.items()}
            tree |= {"epoch": self.epoch, "step": self.step, "sums": self.sums}
            tree |= {"history": self.history, "best": self.best, "random": states}
            self.folder.save(tree)
        self.saved = time.monotonic()

    def _restore(self, held: dict[str, Any], changed: bool) -> None:
        """Go on from a checkpoint; where options changed, with theirs in place of its own."""
        wanted = [{**group} for group in self.optimizer.param_groups]
        for name, part in self.parts.items():
            if not (changed and name in ("schedule", "scaler")):
                part.load_state_dict(held[name])
        self.epoch, self.step = held["epoch"], min(held["step"], self.steps)
        if changed:
            for group, options in zip(self.optimizer.param_groups, wanted, strict=True):
                group.update({**options, "params": group["params"]})
            self._catch_up()
        self.history, self.best = held["history"], held["best"]
        self.sums = held["sums"].to(self.device)
        self.random = held["random"][self.batches.rank]

    def _catch_up(self) -> None:
        """Bring a schedule that has just been made to where the run is."""
        done = self.epoch
        if self.config.lr_scheduler == "onecycle":
            done = min(self.epoch, self.config.epochs) * self.steps + self.step
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
            for _ in range(done):
                self.schedule.step()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """In here a first SIGINT, SIGTERM or SIGUSR1 is only noted; a second does what it did."""
        before: dict[int, Any] = {}

        def put_back() -> None:
            for number, handler in before.items():
                signal.signal(number, handler)

        def note(number: int, frame: Any) -> None:
            self.stopped_by = number
            put_back()
            self.reporter.say("ending after this step; once more to end at once")

        if self.folder is not None and threading.current_thread() is threading.main_thread():
            for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
                if number := getattr(signal, name, None):
                    before[number] = signal.signal(number, note)
        try:
            yield
        finally:
            put_back()


def _changes(then: dict[str, Any], now: dict[str, Any], allowed: Sequence[str]) -> bool:
    """Whether a resumed run has something else than before; raises ValueError unless it may."""
    before, after = ({**run, **run.get("options", {})} for run in (then, now))
    every = (*now["options"], "model", "arguments", "classes", "world", "data_hash")
    changed = [name for name in every if before.get(name) != after.get(name)]
    for name in changed:
        if name in FIXED or name not in allowed:
            may = (
                "it cannot change" if name in FIXED else f"allow_change={name} goes on all the same"
            )
            was, got = before.get(name), after.get(name)
            raise ValueError(f"{name} was {was!r} in the run to resume, got {got!r}; {may}")
    return bool(changed)
