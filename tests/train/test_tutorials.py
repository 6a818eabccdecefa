"""What four tutorials do after their networks are built, scaled down, on data of the same form."""

import json

import pytest
import torch
import torch.nn.functional as F
from test_data import write_idx
from torch import nn

import fastres
from fastres import cli
from fastres.models.pretrained import load_network
from fastres.train.report import curves, read_metrics
from tests.support.tutorials import Residual

GIVEN = torch.Generator().manual_seed(13)


def pictures(classes, each, *shape):
    """uint8 images that one pattern for each class shines through, and their labels, shuffled."""
    patterns = torch.randint(0, 256, (classes, *shape), generator=GIVEN)
    labels = torch.arange(classes * each)[torch.randperm(classes * each, generator=GIVEN)] % classes
    noise = torch.randint(0, 256, (len(labels), *shape), generator=GIVEN)
    return ((patterns[labels] + noise) // 2).to(torch.uint8), labels


@pytest.fixture(scope="module")
def idx(tmp_path_factory):
    """Fashion-MNIST's four files with 240 and 60 images of 28x28."""
    folder = tmp_path_factory.mktemp("idx")
    images, labels = pictures(10, 30, 28, 28)
    for part, chosen in (("train", slice(240)), ("t10k", slice(240, None))):
        given = images[chosen].numpy(), labels[chosen].to(torch.uint8).numpy()
        write_idx(folder, part, *given, compressed=True)
    return folder


def test_keras_fit_evaluate_save_load_predict(tmp_path):
    """ResNet on 64x64 signs of six classes: fit(x, y, epochs=2, batch_size=32) and what follows."""
    x, y = pictures(6, 32, 64, 64, 3)
    torch.manual_seed(0)
    model = fastres.create_model("resnet18", num_classes=6, planes=16)
    run = fastres.fit(model, x.numpy(), F.one_hot(y).numpy(), epochs=2, batch_size=32, lr=0.02)
    unseen, labels = x[:50].flip(0), y[:50].flip(0)
    found = run.evaluate(unseen, labels)
    images = unseen.permute(0, 3, 1, 2).float() / 255
    mean, std = ((x.double() / 255).flatten(0, 2).T for _ in range(2))
    mean, std = mean.mean(1).float(), std.std(1, correction=0).float()
    with torch.no_grad():
        logits = model((images - mean[:, None, None]) / std[:, None, None])
    assert found["accuracy"] == int((logits.argmax(1) == labels).sum()) / 50 > 0.5
    assert found["loss"] == pytest.approx(float(F.cross_entropy(logits, labels)), rel=1e-3)
    fastres.save_checkpoint(model, tmp_path / "signs.safetensors")
    loaded = load_network("resnet18", checkpoint=tmp_path / "signs.safetensors", planes=16)
    one = run.normalize(unseen[:1].permute(0, 3, 1, 2).contiguous())
    with torch.no_grad():
        torch.testing.assert_close(loaded(one), logits[:1], rtol=1e-3, atol=1e-3)
    with pytest.raises(ValueError, match="evaluation labels must be one integer for each"):
        run.evaluate(unseen, labels[:3])


def test_d2l_trains_its_network_with_three_curves(idx, tmp_path):
    """Train loss, train accuracy and test accuracy over the epochs, as its animated plot."""
    pytest.importorskip("matplotlib")
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 8, 7, stride=2, padding=3), nn.BatchNorm2d(8), nn.ReLU())
    net = nn.Sequential(
        stem, nn.MaxPool2d(3, stride=2, padding=1), Residual(8, 8),
        Residual(8, 16, use_1x1conv=True, stride=2), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(),
        nn.Linear(16, 10),
    )  # fmt: skip
    options = {"epochs": 3, "batch_size": 24, "lr": 0.1, "resize": 32, "progress": False}
    run = fastres.fit(net, f"fashion-mnist:{idx}", folder=tmp_path / "run", **options)
    assert run.history[-1]["accuracy"] > 0.5
    rows = read_metrics(run.folder)
    assert rows == [{**row, "epoch": row["epoch"]} for row in run.history]
    drawn = {
        line.get_label(): [float(v) for v in line.get_ydata()]
        for plot in curves({"": rows}).axes
        for line in plot.get_lines()
    }
    for name, key in (
        ("train loss", "train_loss"),
        ("train accuracy", "train_accuracy"),
        ("accuracy", "accuracy"),
    ):
        assert drawn[name] == [row[key] for row in run.history]
    assert (tmp_path / "run" / "curves.png").stat().st_size > 5000


@pytest.fixture(scope="module")
def two_runs(idx, tmp_path_factory):
    """The folders of a run with and one without the residual, made by the command."""
    folder = tmp_path_factory.mktemp("runs")
    names = [str(folder / name) for name in ("with", "without")]
    for name, more in zip(names, ([], ["--no-residual"]), strict=True):
        assert cli.run([*base(idx), "--output-dir", name, *more]) == 0
    return names


def base(idx):
    options = ["--resize", "16", "--batch-size", "48", "--lr", "0.05", "--epochs", "2"]
    return ["train", f"mnist:{idx}", "--model", "resnet20", *options]


def test_two_runs_beside_each_other(two_runs, idx, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    both = tmp_path / "both.png"
    assert cli.run(["report", "runs", *two_runs, "--plot", str(both), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    found = [compared[name] for name in two_runs]
    assert [one["differs"] for one in found] == [{"residual": True}, {"residual": False}]
    rows = [read_metrics(name) for name in two_runs]
    assert [one["last"] for one in found] == [row[-1] for row in rows]
    assert [one["best"]["accuracy"] for one in found] == [
        max(epoch["accuracy"] for epoch in row) for row in rows
    ]
    assert both.read_bytes().startswith(b"\x89PNG")
    assert cli.run(["report", "runs", *two_runs]) == 0
    shown = capsys.readouterr().out
    assert f"{rows[1][-1]['accuracy']:.2%}" in shown
    assert shown.split()[:2] == ["with", "without"]
    for runs, text in (
        ((two_runs[0], two_runs[0]), "give two or more folders of runs, each once"),
        ((two_runs[0], str(idx)), "is no folder of a run"),
        ((*two_runs, "--plot", "both.gif"), "path must end in .png"),
    ):
        assert cli.run(["report", "runs", *runs]) == 2
        assert text in " ".join(capsys.readouterr().err.split())


def test_a_run_is_judged_again(two_runs, idx, capsys):
    """--test-only, of a run's folder and of its weights as a checkpoint."""
    best = [max(read_metrics(name), key=lambda row: row["accuracy"]) for name in two_runs]
    assert cli.run(["train", "--test-only", "--resume", two_runs[0], "--json"]) == 0
    judged = json.loads(capsys.readouterr().out)
    assert judged["accuracy"] == best[0]["accuracy"]
    assert judged["loss"] == pytest.approx(best[0]["loss"], rel=1e-5)
    weights = ["--checkpoint", f"{two_runs[1]}/best.safetensors", "--no-residual", "--json"]
    assert cli.run([*base(idx), "--test-only", *weights]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == best[1]["accuracy"]
    assert cli.run([*base(idx), "--test-only"]) == 2
    assert "give --test-only the --resume FOLDER" in capsys.readouterr().err


def test_commands_take_the_folder_of_a_run(two_runs, idx, tmp_path, capsys):
    assert cli.run(["verify", two_runs[0], "--size", "16", "--batch", "2", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]
    quick = ["--batch", "1", "--size", "16", "--rounds", "1", "--seconds", "0", "--json"]
    assert cli.run(["bench", two_runs[1], *quick]) == 0
    case = json.loads(capsys.readouterr().out)["cases"][0]
    assert case["weights"] == "of the run's best epoch"
    target = ["-o", str(tmp_path / "int8.safetensors"), "--size", "16"]
    options = ["--images", "80", "--min-agreement", "0.5", "--json"]
    data = ["--data", f"mnist:{idx}"]
    assert cli.run(["quantize", two_runs[0], *data, *target, *options]) == 0
    accuracy = json.loads(capsys.readouterr().out)["test"]["float32"]["accuracy"]
    assert accuracy == pytest.approx(max(row["accuracy"] for row in read_metrics(two_runs[0])))
    assert cli.run(["bench", two_runs[0], "--weights", "DEFAULT", *quick]) == 2
    assert "do not go with" in capsys.readouterr().err
