"""``fit`` against plain loops of torch, its files, and what it says to mistakes."""

import copy
import csv
import json
import signal
from dataclasses import asdict
from itertools import islice

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastres
from fastres import cli
from fastres.errors import TrainingError
from fastres.models.checkpoint import digest
from fastres.models.pretrained import load_network
from fastres.train import checkpoints
from fastres.train.batches import Batches
from fastres.train.config import Config
from fastres.train.data import from_tensors
from fastres.train.loop import fit

GIVEN = torch.Generator().manual_seed(7)
IMAGES = torch.randint(0, 256, (50, 1, 8, 8), generator=GIVEN, dtype=torch.uint8)
LABELS = torch.randint(0, 3, (50,), generator=GIVEN)
CPU = torch.device("cpu")


def network(dropout=0.0):
    torch.manual_seed(1)
    parts = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(dropout))
    return nn.Sequential(*parts, nn.Flatten(), nn.Linear(144, 3))


def train(model, **options):
    defaults = {"epochs": 2, "batch_size": 16, "lr": 0.05, "progress": False}
    return fit(model, IMAGES, LABELS, **defaults | options)


def normalised(images):
    x = images.double() / 255
    return ((x - x.mean()) / x.std(correction=0)).float()


def test_two_epochs_by_hand():
    """Order, normalisation, momentum, decay, smoothing and cosine, bit for bit."""
    options = {"momentum": 0.8, "weight_decay": 0.01, "label_smoothing": 0.2, "seed": 3}
    fitted, plain = network(), network()
    run = train(fitted, **options)
    optimizer = torch.optim.SGD(plain.parameters(), 0.05, 0.8, weight_decay=0.01)
    order = Batches(from_tensors(IMAGES, LABELS), Config(batch_size=16, seed=3), CPU)
    x = normalised(IMAGES).contiguous(memory_format=torch.channels_last)
    plain.train().to(memory_format=torch.channels_last)
    for epoch in range(2):
        losses = []
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (1.0, 0.5)[epoch]
        for batch in order.order(epoch):
            loss = F.cross_entropy(plain(x[batch]), LABELS[batch], label_smoothing=0.2)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += [float(loss)] * len(batch)
        assert run.history[epoch]["train_loss"] == pytest.approx(sum(losses) / 50, rel=1e-6)
    for a, b in zip(fitted.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # x was normalised in other steps
    assert sorted(torch.cat(order.order(0)).tolist()) == list(range(50))
    assert order.order(0)[0].tolist() != order.order(1)[0].tolist()


def test_gradients_of_unequal_batches_are_of_all_their_images():
    """50 images by fours: the last step has two batches of 4 and one of 2."""
    plain, fitted = (nn.Sequential(nn.Flatten(), nn.Linear(64, 3)) for _ in range(2))
    fitted.load_state_dict(plain.state_dict())
    options = {"epochs": 1, "lr_scheduler": "constant", "momentum": 0.0, "weight_decay": 0.0}
    train(fitted, batch_size=4, accumulate=5, **options)
    x, optimizer = normalised(IMAGES), torch.optim.SGD(plain.parameters(), 0.05)
    batches = iter(Batches(from_tensors(IMAGES, LABELS), Config(batch_size=4), CPU).order(0))
    while group := list(islice(batches, 5)):
        together = torch.cat(group)
        optimizer.zero_grad()
        F.cross_entropy(plain(x[together]), LABELS[together]).backward()
        optimizer.step()
    torch.testing.assert_close(fitted[1].weight, plain[1].weight, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scheduler", ["cosine", "step", "onecycle", "constant"])
def test_rates_of_the_schedules(scheduler):
    warmup = 0 if scheduler == "onecycle" else 2
    run = train(
        network(),
        epochs=5,
        lr=1.0,
        lr_scheduler=scheduler,
        lr_warmup_epochs=warmup,
        lr_step_size=2,
        lr_min=0.1,
    )
    rates = [row["lr"] for row in run.history]
    rising = [0.01, 0.01 + 0.99 / 2]
    if scheduler == "onecycle":
        one = torch.optim.SGD([nn.Parameter(torch.ones(1))], 1.0, 0.9)
        cycle = torch.optim.lr_scheduler.OneCycleLR(one, 1.0, total_steps=20)
        expected = []
        for _ in range(20):
            one.step()
            cycle.step() if len(expected) < 19 else None
            expected.append(cycle.get_last_lr()[0])
        assert rates[:4] == pytest.approx(expected[3:16:4])
    elif scheduler == "cosine":  # 0.1 + 0.9 (1 + cos(pi t / 3)) / 2
        assert rates == pytest.approx([*rising, 1.0, 0.775, 0.325])
    else:
        assert rates == pytest.approx([*rising, 1.0, 1.0, {"step": 0.1}.get(scheduler, 1.0)])


def test_the_average_is_what_is_judged_and_kept(tmp_path):
    model = network()
    options = {"model_ema": True, "model_ema_steps": 2, "model_ema_decay": 0.99}
    run = train(model, folder=tmp_path, validation=(IMAGES, LABELS), **options)
    kept = network()
    fastres.load_checkpoint(kept, tmp_path / "model.safetensors")
    assert digest(kept.state_dict()) != digest(model.state_dict())
    with torch.no_grad():
        logits = kept.eval()(normalised(IMAGES))
    assert run.history[-1]["loss"] == pytest.approx(
        float(F.cross_entropy(logits, LABELS)), rel=1e-4
    )


def test_norms_may_have_another_decay_and_gradients_a_largest_norm():
    still = network()
    train(still, epochs=1, lr=1.0, clip_grad_norm=1e-12, norm_weight_decay=0.5, weight_decay=0.0)
    fresh = network()
    assert torch.allclose(still[0].weight, fresh[0].weight, atol=1e-9)
    assert float(still[1].weight.mean()) < 0.5


def test_augmentation_depends_on_epoch_and_index_alone():
    data = from_tensors(IMAGES.float() + 1, LABELS)

    def seen(batch_size, epoch):
        options = Config(batch_size=batch_size, shift=2, flip=True)
        batches = Batches(data, options, CPU)
        order = torch.cat(batches.order(epoch))
        images = torch.cat([x for x, _ in batches.train(epoch)])
        return images[order.argsort()]

    assert torch.equal(seen(8, 0), seen(25, 0))
    assert not torch.equal(seen(25, 0), seen(25, 1))
    changed = [not torch.equal(a, b) for a, b in zip(seen(25, 0), data.train.images, strict=True)]
    assert sum(changed) > 40
    one = seen(25, 0)[changed.index(True)]
    kept = one[one > 0]  # zeros come in at the borders, the rest is the image's own
    assert 36 <= len(kept) <= 64
    assert set(kept.tolist()) <= set(data.train.images[changed.index(True)].flatten().tolist())


def test_a_last_batch_of_one_is_left_out():
    """A batch norm over one pixel of one image has no deviation."""
    data = from_tensors(IMAGES[:49], LABELS[:49])
    for size, sizes in ((8, [8] * 6), (9, [9] * 5 + [4]), (49, [49])):
        batches = Batches(data, Config(batch_size=size), CPU).order(0)
        assert list(map(len, batches)) == sizes
    shares = [Batches(data, Config(batch_size=8), CPU, rank, 2).order(0) for rank in (0, 1)]
    seen = [set(torch.cat(share).tolist()) for share in shares]
    assert len(seen[0]) == len(seen[1]) == 24
    assert not seen[0] & seen[1]


def test_mixing_two_images_mixes_their_labels():
    pytest.importorskip("torchvision")
    batches = Batches(from_tensors(IMAGES, LABELS), Config(batch_size=50, mixup_alpha=1.0), CPU)
    (x, y), (again, _) = (next(batches.train(0)) for _ in range(2))
    assert torch.equal(x, again)
    assert y.shape == (50, 3)
    assert torch.allclose(y.sum(1), torch.ones(50))
    run = train(network(), mixup_alpha=0.2, cutmix_alpha=1.0)
    assert 0 < run.history[0]["train_accuracy"] < 1


def test_what_keras_users_have_is_taken():
    """64x64 images of six classes, NHWC in [0, 1], one-hot labels, as the tutorial's signs."""
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(24, 64, 64, 3, generator=generator).numpy()
    y = F.one_hot(torch.arange(24) % 6).numpy()
    assert from_tensors(x, y).train.labels.tolist() == [i % 6 for i in range(24)]
    model = fastres.create_model("resnet20", num_classes=6)
    run = fit(model, x, y, epochs=2, batch_size=8, lr=0.01, progress=False, validation=(x, y))
    assert len(run.history) == 2
    assert run.normalize is None
    with torch.no_grad():
        assert model(torch.from_numpy(x[:1]).permute(0, 3, 1, 2)).shape == (1, 6)


def test_the_network_serves_fused_with_the_new_weights():
    torch.manual_seed(0)
    model = fastres.create_model("resnet20", in_chans=1, num_classes=3, planes=8)
    run = train(model, epochs=1)
    reference = copy.deepcopy(model)
    with torch.no_grad():
        y, exact = model(run.normalize(IMAGES)), reference._forward_impl(run.normalize(IMAGES))
    assert model.plan().fused
    torch.testing.assert_close(y, exact, rtol=1e-4, atol=1e-4)


def test_files_of_a_run(tmp_path):
    run = train(network(), folder=tmp_path / "run", validation=(IMAGES[:9], LABELS[:9]), keep=2)
    rows = list(csv.DictReader((tmp_path / "run" / "metrics.csv").open()))
    assert [row["weights"] for row in rows] == [row["weights"] for row in run.history]
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["options"]["batch_size"] == 16
    x = IMAGES.double() / 255
    assert config["mean"] == pytest.approx([float(x.mean())])
    assert config["std"] == pytest.approx([float(x.std(correction=0))])
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"best.safetensors", "model.safetensors", "epoch2.safetensors"} <= names
    assert not [name for name in names if name.startswith(".")]
    pytest.importorskip("matplotlib")
    assert (tmp_path / "run" / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_nest_survives_its_file(tmp_path):
    tree = {"a": [1, 2.5, None, True, "x"], 3: (torch.ones(2, 2).t(), {"b": torch.tensor(1)})}
    (tmp_path / "file").write_bytes(checkpoints.pack(tree))
    found = checkpoints.unpack(tmp_path / "file")
    assert found["a"] == tree["a"]
    assert isinstance(found[3], tuple)
    assert torch.equal(found[3][0], tree[3][0])
    assert int(found[3][1]["b"]) == 1
    with pytest.raises(TypeError, match="cannot save /x: it is a set"):
        checkpoints.pack({"x": {1}})


def test_a_last_batch_that_is_left_out_is_said(capsys):
    fit(network(), IMAGES[:49], LABELS[:49], epochs=1, batch_size=16, lr=0.05)
    assert "a last batch of one image is left out" in capsys.readouterr().err
    fit(network(), IMAGES, LABELS, epochs=1, batch_size=16, lr=0.05)
    assert "left out" not in capsys.readouterr().err


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    options = {"folder": tmp_path, "epochs": 3, "save_steps": 1, "lr_scheduler": "constant"}
    with pytest.raises(TrainingError, match=r"by step \d of epoch 1, lr 1e\+30"):
        train(network(), lr=1e30, **options)
    assert (tmp_path / "nan.safetensors").exists()
    last = tmp_path / "last.safetensors"
    if last.exists():
        held = checkpoints.unpack(last)
        assert all(bool(v.isfinite().all()) for v in held["model"].values())


MISTAKES = {
    "option": ({"lrr": 1}, TypeError, "unknown option 'lrr' of training; did you mean lr?"),
    "kind": ({"epochs": 2.5}, ValueError, "epochs must be an integer, got 2.5"),
    "range": ({"batch_size": 0}, ValueError, "batch_size must be at least 1, got 0"),
    "choice": ({"opt": "adam"}, ValueError, "opt must be one of sgd, adamw; got 'adam'"),
    "share": ({"label_smoothing": 2.0}, ValueError, "label_smoothing must be from 0 to 1"),
    "flag": ({"flip": 1}, ValueError, "flip must be True or False, got 1"),
    "warm-up": ({"lr_warmup_epochs": 2}, ValueError, "lr_warmup_epochs must be below epochs"),
    "two warm-ups": (
        {"lr_warmup_epochs": 1, "lr_scheduler": "onecycle"},
        ValueError,
        "lr_warmup_epochs goes with other schedulers",
    ),
    "large": ({"batch_size": 64}, ValueError, "batch_size must be at most the 50"),
    "workers": ({"workers": 51}, ValueError, "workers must be at most the 50 training images"),
    "nothing": ({"validation": (IMAGES, LABELS, 0)}, ValueError, "validation must be images and"),
    "bad files": ({"on_bad_file": "stop"}, ValueError, "on_bad_file must be one of raise, skip"),
    "resume": ({"folder": "x", "resume": True}, ValueError, "no checkpoint to resume in x"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_said_before_anything_is_written(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options, kind, text = MISTAKES[name]
    model = network()
    with pytest.raises(kind, match=text.replace("?", r"\?")):
        train(model, **options)
    assert digest(model.state_dict()) == digest(network().state_dict())
    assert not list(tmp_path.iterdir())


def test_labels_and_images_that_do_not_fit():
    wrong = LABELS.clone()
    wrong[4] = 3
    with pytest.raises(
        ValueError, match="training labels must be below .* 3 logits; got 3 at inde"
    ):
        fit(network(), IMAGES, wrong, progress=False, batch_size=8)
    with pytest.raises(ValueError, match="one integer for each of the 50 images"):
        fit(network(), IMAGES, LABELS[:9], progress=False)
    with pytest.raises(ValueError, match=r"must be \(N, C, H, W\), uint8 or floating"):
        fit(network(), IMAGES.int(), LABELS, progress=False)
    with pytest.raises(ValueError, match="train must be images, with labels, .* got a Tensor"):
        fit(network(), IMAGES, progress=False)
    with pytest.raises(ValueError, match="labels and validation do not go with 'digits'"):
        fit(network(), "digits", LABELS, progress=False)
    with pytest.raises(ValueError, match="model must give"):
        fit(nn.Conv2d(1, 3, 3), IMAGES, LABELS, batch_size=8, progress=False)


@pytest.mark.fault(93)
@pytest.mark.parametrize("made", [torch.Tensor.double, torch.Tensor.half, torch.Tensor.numpy])
def test_images_of_any_floating_dtype_get_that_of_the_network(made):
    images = (IMAGES / 256).half().float()  # numbers that each of them holds
    options = {"epochs": 1, "batch_size": 16, "progress": False}
    plain, other = (fit(network(), x, LABELS, **options) for x in (images, made(images)))
    assert digest(other.model.state_dict()) == digest(plain.model.state_dict())
    wide = fit(network().double(), made(images), LABELS, **options)
    assert wide.history[0]["train_loss"] == pytest.approx(plain.history[0]["train_loss"], rel=1e-5)


@pytest.mark.fault(93)
@pytest.mark.parametrize("images", [IMAGES / 255, IMAGES.expand(-1, 3, -1, -1)])
def test_images_to_judge_by_are_as_those_of_training(images):
    options = {"epochs": 1, "batch_size": 16, "progress": False}
    with pytest.raises(ValueError, match="validation images must be uint8 of 1 channels, as those"):
        fit(network(), IMAGES, LABELS, validation=(images, LABELS), **options)
    run = fit(network(), IMAGES, LABELS, **options)
    with pytest.raises(ValueError, match="validation images must be uint8 of 1 channels, as those"):
        run.evaluate(images, LABELS)
    floats = fit(network(), normalised(IMAGES), LABELS, **options)
    with pytest.raises(ValueError, match="validation images must be floating-point"):
        floats.evaluate(IMAGES, LABELS)
    judged = run.evaluate(IMAGES, LABELS)
    assert judged["loss"] == pytest.approx(
        floats.evaluate(normalised(IMAGES), LABELS)["loss"], rel=1e-4
    )


@pytest.mark.fault(93)
def test_labels_that_are_no_classes():
    y = LABELS.clone()
    y[3] = 2**40  # a hash, of which no list of classes is to be made
    for labels, text in (
        (torch.softmax(torch.rand(50, 3), 1), r"labels of shape \(50, 3\) must be one-hot"),
        (torch.ones(50, 3), "must be one-hot"),
        (y, "train labels must be integers from 0 to 999,999; got 1099511627776 at index 3"),
        (["cat"] * 50, "train labels must be a tensor or an array; got a list"),
    ):
        with pytest.raises(ValueError, match=text):
            from_tensors(IMAGES, labels)


def test_batches_of_one_leave_none_out():
    data = from_tensors(IMAGES[:5], LABELS[:5])
    assert len(Batches(data, Config(batch_size=1), CPU).order(0)) == 5


def test_options_may_be_numbers_of_numpy():
    found = Config(epochs=np.int64(3), lr=np.float32(0.5), flip=np.bool_(True))
    assert found == Config(epochs=3, lr=0.5, flip=True)
    assert json.loads(json.dumps(asdict(found)))["epochs"] == 3


@pytest.mark.fault(93)
def test_a_run_is_replaced_by_one_that_begins(tmp_path):
    """What keeps a new run from beginning leaves the old one whole; then nothing of it is left."""
    train(network(), folder=tmp_path, keep=1)
    (tmp_path / "mine.safetensors").write_bytes(b"mine")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {"config.json", "metrics.csv", "epoch2.safetensors"} <= before.keys()
    with pytest.raises(ValueError, match="training labels must be below"):
        fit(network(), IMAGES, LABELS + 1, folder=tmp_path, overwrite=True, batch_size=16)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with pytest.raises(TrainingError):
        train(network(), folder=tmp_path, overwrite=True, lr=1e30, lr_scheduler="constant")
    kept = {path.name for path in tmp_path.iterdir()}
    assert kept == {"config.json", "mine.safetensors", "nan.safetensors"}


@pytest.mark.fault(93)
def test_a_run_that_cannot_begin_leaves_no_folder(tmp_path):
    with pytest.raises(ValueError, match="training labels must be below"):
        fit(network(), IMAGES, LABELS + 1, folder=tmp_path / "a" / "b", batch_size=16)
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError, match="is not a folder to write in"):
        train(network(), folder=tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_another_run_is_neither_replaced_nor_mixed_in(tmp_path):
    train(network(), folder=tmp_path)
    with pytest.raises(ValueError, match="holds another run"):
        train(network(), folder=tmp_path)
    for change, text in (
        ({"lr": 0.1}, "lr was 0.05 in the run to resume, got 0.1"),
        (
            {"described": {"model": "resnet34"}},
            "model was None in the run to resume",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            train(network(), folder=tmp_path, resume=True, **change)
    fewer = LABELS.clamp(max=1)
    with pytest.raises(ValueError, match=r"classes was \['0', '1', '2'\] in the run to resume"):
        fit(network(), IMAGES, fewer, folder=tmp_path, resume=True, epochs=2, batch_size=16,
            lr=0.05, progress=False)  # fmt: skip
    with pytest.raises(ValueError, match="data_hash was"):
        fit(network(), IMAGES + 1, LABELS, folder=tmp_path, resume=True, epochs=2, batch_size=16,
            lr=0.05, progress=False)  # fmt: skip
    longer = train(network(), folder=tmp_path, resume=True, epochs=3, lr_scheduler="cosine",
                   allow_change=("epochs",))  # fmt: skip
    assert [row["epoch"] for row in longer.history] == [1, 2, 3]
    train(network(), folder=tmp_path, overwrite=True, lr=0.1)


def test_the_command(tmp_path, capsys):
    pytest.importorskip("sklearn")
    run = ["train", "digits", "--model", "resnet20", "--batch-size", "64", "--no-residual"]
    folder = ["--output-dir", str(tmp_path / "run")]
    assert cli.run([*run, *folder, "--epochs", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["best"]["accuracy"] > 0.15
    assert cli.run([*run, *folder]) == 2
    assert "holds another run" in capsys.readouterr().err
    more = ["--epochs", "2", "--allow-change", "epochs", "--json"]
    assert cli.run(["train", "--resume", str(tmp_path / "run"), *more]) == 0
    assert len(json.loads(capsys.readouterr().out)["history"]) == 2
    fused = tmp_path / "fused.safetensors"
    assert cli.run(["convert", str(tmp_path / "run"), str(fused), "--size", "8"]) == 0
    x, loaded = torch.rand(5, 1, 8, 8), load_network(str(tmp_path / "run"))
    with torch.no_grad():
        torch.testing.assert_close(fastres.load(fused)(x), loaded(x), rtol=1e-3, atol=1e-3)
    capsys.readouterr()
    assert cli.run([*run, "--dry", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps of an epoch"] == 22
    assert cli.run(["train"]) == 2
    assert "give DATA to train on" in capsys.readouterr().err


def test_a_plain_network_adds_no_shortcut():
    torch.manual_seed(0)
    plain = fastres.create_model("resnet18", num_classes=3, planes=8, residual=False).eval()
    assert not [name for name in plain.state_dict() if "downsample" in name]
    block = plain.layer1[0]
    x = torch.randn(1, 8, 6, 6)
    with torch.no_grad():
        expected = F.relu(block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x))))))
        assert torch.equal(block(x), expected)
        images = torch.randn(1, 3, 32, 32)
        torch.testing.assert_close(plain(images), plain._forward_impl(images), rtol=1e-4, atol=1e-5)


def test_signals_are_as_before_afterwards(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    train(network(), folder=tmp_path, epochs=1)
    assert signal.getsignal(signal.SIGTERM) is before
