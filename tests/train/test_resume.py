"""A run that was cut ends with the same bits as one that was not."""

import copy
import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

from fastres.models.checkpoint import digest
from fastres.train import checkpoints, trainer
from fastres.train.batches import Batches
from fastres.train.data import from_tensors
from fastres.train.loop import fit

ROOT = Path(__file__).parents[2]
GIVEN = torch.Generator().manual_seed(7)
IMAGES = torch.randint(0, 256, (40, 1, 8, 8), generator=GIVEN, dtype=torch.uint8)
LABELS = torch.randint(0, 3, (40,), generator=GIVEN)
WAYS = {
    "plain": {},
    "all": {
        "accumulate": 2,
        "model_ema": True,
        "model_ema_steps": 2,
        "lr_warmup_epochs": 1,
        "flip": True,
        "shift": 1,
        "clip_grad_norm": 1.0,
    },
    "onecycle": {"lr_scheduler": "onecycle", "nesterov": True, "label_smoothing": 0.1},
    "adamw": {"opt": "adamw", "lr": 1e-3, "lr_scheduler": "step", "lr_step_size": 1},
}


def network():
    torch.manual_seed(1)
    parts = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.3))
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(144, 3))


def train(model, folder, **options):
    defaults = {"epochs": 3, "batch_size": 8, "lr": 0.05, "progress": False}
    validation = (IMAGES[:11], LABELS[:11])
    return fit(model, IMAGES, LABELS, validation=validation, folder=folder, **defaults | options)


def ended_by(number, call):
    """A network that gets the signal in its ``call``-th forward pass of training."""
    model, calls = network(), []

    def count(module, *_):
        calls.append(module.training)
        if sum(calls) == call and module.training:
            os.kill(os.getpid(), number)

    model.register_forward_hook(count)
    return model


@pytest.mark.parametrize("call", [1, 5, 9])
@pytest.mark.parametrize("way", WAYS)
def test_terminated_and_continued(way, call, tmp_path, capsys):
    whole = train(network(), tmp_path / "whole", **WAYS[way])
    with pytest.raises(SystemExit) as ended:
        train(ended_by(signal.SIGTERM, call), tmp_path / "cut", **WAYS[way] | {"progress": True})
    assert ended.value.code == 143
    assert f"go on with: fastres train --resume {tmp_path / 'cut'}" in _words(
        capsys.readouterr().err
    )
    again = train(network(), tmp_path / "cut", resume=True, **WAYS[way])
    timed = ("images_per_second", "data_wait", "seconds")
    for cut, row in zip(again.history, whole.history, strict=True):
        assert {k: v for k, v in cut.items() if k not in timed} == {
            k: v for k, v in row.items() if k not in timed
        }
    last = [checkpoints.unpack(tmp_path / name / "last.safetensors") for name in ("whole", "cut")]
    for a, b in zip(*(_tensors(tree) for tree in last), strict=True):
        assert torch.equal(a, b)


def _words(text):
    """Without the line breaks of a narrow terminal."""
    return " ".join(text.split())


def _tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, dict):
        for key in tree:
            yield from _tensors(tree[key])
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from _tensors(item)


def test_interrupted_by_the_keyboard(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        train(ended_by(signal.SIGINT, 2), tmp_path)
    assert checkpoints.unpack(tmp_path / "last.safetensors")["step"] == 2


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    whole = train(network(), tmp_path / "whole")
    written = []

    def full(descriptor):
        written.append(descriptor)
        if len(written) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    real = os.fsync
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        train(network(), tmp_path / "cut", save_steps=2)
    monkeypatch.undo()
    again = train(network(), tmp_path / "cut", resume=True, save_steps=2)
    assert again.history[-1]["weights"] == whole.history[-1]["weights"]


@pytest.mark.fault(93)
@pytest.mark.parametrize("scheduler", ["cosine", "onecycle", "constant"])
def test_a_run_that_goes_on_for_longer_has_the_rates_of_a_longer_one(scheduler, tmp_path):
    options = {"lr_scheduler": scheduler, "lr": 0.2, "momentum": 0.5}
    whole = train(network(), None, epochs=4, **options)
    train(network(), tmp_path, epochs=2, **options)
    allowed = {"resume": True, "allow_change": ("epochs",)}
    longer = train(network(), tmp_path, epochs=4, **options, **allowed)
    rates = [row["lr"] for row in whole.history]
    assert [row["lr"] for row in longer.history[2:]] == rates[2:]
    if scheduler == "constant":  # where the first epochs are those of the longer run
        assert longer.history[-1]["weights"] == whole.history[-1]["weights"]


@pytest.mark.fault(93)
def test_options_that_may_change_do(tmp_path):
    options = {"lr_scheduler": "constant", "momentum": 0.0, "epochs": 1}
    model = network()
    model[3].p = 0.0
    first = copy.deepcopy(train(model, tmp_path, lr=0.2, **options).model)
    options |= {"epochs": 2, "lr": 0.01, "weight_decay": 0.5}
    changed = {"resume": True, "allow_change": ("epochs", "lr", "weight_decay")}
    run = train(model, tmp_path, **options, **changed)
    assert [row["lr"] for row in run.history] == [0.2, 0.01]
    # SGD without momentum keeps nothing, so that the second epoch can be made by hand.
    data = from_tensors(IMAGES, LABELS)
    batches = Batches(data, run.config, torch.device("cpu"))
    optimizer = torch.optim.SGD(first.parameters(), 0.01, weight_decay=0.5)
    for x, y in batches.train(1):
        optimizer.zero_grad()
        nn.functional.cross_entropy(first.train()(x), y).backward()
        optimizer.step()
    for name, value in first.state_dict().items():
        torch.testing.assert_close(run.model.state_dict()[name], value, rtol=1e-4, atol=1e-5)
    for fixed in ({"opt": "adamw"}, {"model_ema": True}):
        with pytest.raises(ValueError, match=f"{next(iter(fixed))} was .* it cannot change"):
            train(network(), tmp_path, **{**options, **fixed}, resume=True,
                  allow_change=tuple(fixed))  # fmt: skip


def test_the_best_weights_are_those_of_a_run_that_was_not_cut(tmp_path, monkeypatch):
    """Cut while the weights of its second and best epoch are written."""
    options = {"epochs": 2, "monitor": "loss"}
    assert train(network(), tmp_path / "whole", **options).best["epoch"] == 2
    written, real = [], trainer.save_checkpoint

    def fails(*args, **others):
        written.append(args)
        if len(written) == 2:
            raise KeyboardInterrupt
        real(*args, **others)

    monkeypatch.setattr(trainer, "save_checkpoint", fails)
    with pytest.raises(KeyboardInterrupt):
        train(network(), tmp_path / "cut", **options)
    monkeypatch.undo()
    train(network(), tmp_path / "cut", resume=True, **options)
    names = [tmp_path / name / "best.safetensors" for name in ("whole", "cut")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path):
    whole = train(network(), tmp_path)
    last = tmp_path / "last.safetensors"
    last.write_bytes(last.read_bytes()[:-9])
    with pytest.warns(UserWarning, match="goes on from last.prev.safetensors: cannot read"):
        again = train(network(), tmp_path, resume=True)
    assert again.history[-1]["weights"] == whole.history[-1]["weights"]
    (tmp_path / "last.prev.safetensors").write_bytes(b"")
    last.write_bytes(b"")
    with pytest.raises(checkpoints.CheckpointError, match="cannot read"):
        train(network(), tmp_path, resume=True)


SCRIPT = textwrap.dedent("""
    import sys, torch
    sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests/train"]
    from test_resume import network, train
    run = train(network(), sys.argv[2], resume=sys.argv[3] == "resume", epochs=60, save_steps=3)
    print(run.history[-1]["weights"])
""")


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.sweep)])
def test_killed_at_random_moments(kills, tmp_path):
    """SIGKILL: nothing is lost but the steps since the last save, and the end is the same."""
    whole = train(network(), tmp_path / "whole", epochs=60, save_steps=3).history[-1]["weights"]
    cut, generator = tmp_path / "cut", torch.Generator().manual_seed(kills)
    for _ in range(kills):
        how = "resume" if (cut / "last.safetensors").exists() else "new"
        process = _start(cut, how)
        held = (cut / "last.safetensors").stat().st_mtime if how == "resume" else 0
        while process.poll() is None and _modified(cut) == held:
            pass
        try:  # at any moment after the first save, inside of saves too
            process.wait(float(torch.rand((), generator=generator)) * 0.2)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
    done = _start(cut, "resume")
    assert done.communicate(timeout=120)[0].strip().splitlines()[-1] == whole


def _start(folder, how):
    command = [sys.executable, "-c", SCRIPT, str(ROOT), str(folder), how]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def _modified(folder):
    path = folder / "last.safetensors"
    return path.stat().st_mtime if path.exists() else 0


RANK = textwrap.dedent("""
    import os, signal, sys, torch
    sys.path[:0] = [sys.argv[1], sys.argv[1] + "/tests/train"]
    from test_resume import ended_by, network, train
    torch.set_num_threads(1)
    folder, at = sys.argv[2], int(sys.argv[3])
    model = ended_by(signal.SIGTERM, at) if at and os.environ["RANK"] == "1" else network()
    run = train(model, folder, resume=sys.argv[4] == "resume", batch_size=4)
    if os.environ["RANK"] == "0":
        print(run.history[-1]["weights"], run.history[-1]["accuracy"])
""")


def _ranks(folder, at, how):
    """What rank 0 of two prints."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    both = []
    for rank in "01":
        names = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        command = [sys.executable, "-c", RANK, str(ROOT), str(folder), str(at), how]
        both.append(
            subprocess.Popen(
                command,
                env=os.environ | names,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )  # fmt: skip
        )
    found = [process.communicate(timeout=120) for process in both]
    return [process.returncode for process in both], found[0][0].split(), found


@pytest.mark.slow
def test_two_processes_cut_and_continued(tmp_path):
    """By a signal that only the second of them gets; the accuracy is of 11 images, not of 12."""
    codes, whole, said = _ranks(tmp_path / "whole", 0, "new")
    assert codes == [0, 0], said
    codes, _, said = _ranks(tmp_path / "cut", 4, "new")
    assert codes == [143, 143], said
    codes, again, said = _ranks(tmp_path / "cut", 0, "resume")
    assert codes == [0, 0], said
    assert again == whole
    assert round(float(whole[1]) * 11, 6) % 1 == 0
    with pytest.raises(ValueError, match="world was 2 in the run to resume, got 1"):
        train(network(), tmp_path / "cut", resume=True, batch_size=4)
    one = digest(network().state_dict())[:16]
    assert whole[0] != one
