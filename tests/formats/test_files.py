"""Exports and pictures, from Python and from the command line."""

import json
import sys
import xml.etree.ElementTree as ET

import pytest
import torch
from helpers import adversarial_, real_images
from torch import nn
from tutorials import MnistResNet18

import fastres
from fastres import Bottleneck, ResNet, cli
from fastres.errors import MissingDependencyError, VerificationError
from fastres.graph import diagram

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def model():
    return adversarial_(ResNet(Bottleneck, [1, 1], num_classes=6, planes=8))


@pytest.fixture
def images():
    return real_images(3, 32)


@pytest.fixture
def run(capsys):
    def call(*arguments):
        code = cli.run([str(a) for a in arguments])
        return code, *capsys.readouterr()

    return call


class TestExport:
    @pytest.mark.filterwarnings("ignore")
    @pytest.mark.parametrize("suffix", [".onnx", ".pt2"])
    def test_files_are_run_before_they_are_kept(self, model, images, tmp_path, suffix):
        pytest.importorskip("onnxscript")
        fast = fastres.optimize(model, example_input=images)
        path = tmp_path / f"model{suffix}"
        found = fastres.export(fast, path, images)
        assert found.path == str(path)
        assert found.checked_by == {".onnx": "onnxruntime", ".pt2": "torch.export"}[suffix]
        assert found.max_abs < 1e-4
        assert [p.name for p in tmp_path.iterdir()] == [path.name]
        with torch.no_grad():
            wanted = model._forward_impl(real_images(5, 32))
        if suffix == ".pt2":
            answer = torch.export.load(path).module()(real_images(5, 32))
        else:
            import onnxruntime

            session = onnxruntime.InferenceSession(path)
            answer = torch.from_numpy(session.run(None, {"x": real_images(5, 32).numpy()})[0])
        torch.testing.assert_close(answer, wanted, rtol=1e-4, atol=1e-4)

    @pytest.mark.filterwarnings("ignore")
    def test_a_wrong_file_is_not_kept(self, model, images, tmp_path, monkeypatch):
        fast = fastres.optimize(model, example_input=images)
        path = tmp_path / "model.pt2"
        path.write_bytes(b"the older one")
        real = torch.export.load

        def other(file):
            program = real(file)
            program.state_dict["folded.bias0"].add_(1)
            return program

        monkeypatch.setattr(torch.export, "load", other)
        with pytest.raises(VerificationError, match=r"torch\.export gives other answers"):
            fastres.export(fast, path, images)
        assert path.read_bytes() == b"the older one"
        assert list(tmp_path.iterdir()) == [path]

    def test_mistakes(self, model, images, tmp_path):
        fast = fastres.optimize(model, verify=False)
        half = fastres.optimize(model, dtype=torch.bfloat16, verify=False)
        for arguments, kind, message in (
            ((model, tmp_path / "m.onnx", images), TypeError, "must be a FastModel"),
            ((fast, tmp_path / "m.pb", images), ValueError, r"\.onnx or \.pt2"),
            ((fast, tmp_path / "m.onnx", images[:1]), ValueError, "at least two"),
            ((half, tmp_path / "m.onnx", images), ValueError, "float32 or torch.float16; got"),
        ):
            with pytest.raises(kind, match=message):
                fastres.export(*arguments)
        assert not list(tmp_path.iterdir())


def texts(path):
    return [element.text for element in ET.parse(path).iter(f"{SVG}text")]


class TestPlot:
    def test_fused_and_unfused_say_what_they_show(self, model, tmp_path):
        size = (1, 3, 64, 64)
        fused = fastres.plot_model(model, tmp_path / "fused.svg", input_size=size)
        assert texts(fused)[:8] == [
            "input",
            "(1, 3, 64, 64)",
            "conv 7x7/2 3->8 + bias + ReLU",
            "conv1 (1, 8, 32, 32)",
            "max pool",
            "maxpool (1, 8, 16, 16)",
            "conv 1x1 8->8 + bias + ReLU",
            "layer1.0.conv1 (1, 8, 16, 16)",
        ]
        plain = fastres.plot_model(model, tmp_path / "plain.svg", fused=False, input_size=size)
        titles = texts(plain)[::2]
        assert titles.count("batch norm") == 9
        assert titles.count("add") == 2
        assert titles.count("ReLU") == 7
        assert "batch norm" not in texts(fused)[::2]

    def test_every_reading_is_an_arrow(self, model, tmp_path):
        path = fastres.plot_model(model, tmp_path / "model.svg")
        plan = fastres.optimize(model, verify=False).plan()
        arrows = [e for e in ET.parse(path).iter(f"{SVG}path") if e.get("marker-end")]
        assert len(arrows) == sum(len(set(step.inputs)) for step in plan.steps)

    def test_boxes_do_not_overlap(self, model):
        picture = diagram.drawing(diagram._boxes(model, True, None))
        corners = [corner for _, corner in picture.boxes]
        assert len(set(corners)) == len(corners)
        for x, y in corners:
            assert x + diagram.BOX_WIDTH <= picture.size[0]
            assert y + diagram.BOX_HEIGHT <= picture.size[1]
        for curve in picture.curves:
            assert all(x >= 0 for x, _ in (curve.at(i / 8) for i in range(9)))

    def test_png(self, model, tmp_path):
        image_module = pytest.importorskip("PIL.Image")
        path = fastres.plot_model(model, tmp_path / "model.png", input_size=(1, 3, 64, 64))
        with image_module.open(path) as image:
            colours = {c: n for n, c in image.convert("RGB").getcolors(1 << 16)}
            boxes = len(fastres.optimize(model, verify=False).plan().steps)
            fused = tuple(bytes.fromhex(diagram.FUSED[1:]))
            # Each box is filled but for its text, which covers less than a third of it.
            assert colours[fused] > boxes * diagram.BOX_WIDTH * diagram.BOX_HEIGHT * 2 / 3

    def test_png_without_pillow(self, model, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "PIL", None)
        with pytest.raises(MissingDependencyError, match=r"Pillow.*\.svg or \.dot"):
            fastres.plot_model(model, tmp_path / "model.png")

    def test_dot(self, tmp_path):
        model = MnistResNet18()
        model.net.append(nn.Hardswish())
        text = fastres.plot_model(model.eval(), tmp_path / "model.dot").read_text()
        assert text.startswith("digraph model {")
        assert '[label="conv 7x7/2 1->64 + bias + ReLU\\nnet.0.0", fillcolor="#dbeafe"]' in text
        assert 'fillcolor="#fde68a"' in text  # the Hardswish, left to PyTorch
        plan = fastres.optimize(model.eval(), verify=False).plan()
        assert text.count(" -> ") == sum(len(set(step.inputs)) for step in plan.steps)

    def test_mistakes(self, model, tmp_path):
        with pytest.raises(ValueError, match=r"\.svg, \.png, \.dot; got"):
            fastres.plot_model(model, tmp_path / "model.pdf")
        fast = fastres.optimize(model, verify=False)
        with pytest.raises(ValueError, match="draw its source"):
            fastres.plot_model(fast, tmp_path / "model.svg", fused=False)
        fastres.plot_model(fast, tmp_path / "model.svg")


def written_by_keras(path):
    """Images of 12x16 that a Dense layer behind a Flatten insists on."""
    keras = pytest.importorskip("keras_models", exc_type=ImportError).keras
    layers = [
        keras.Input((12, 16, 3)),
        keras.layers.Conv2D(4, 3, activation="relu"),
        keras.layers.BatchNormalization(),
        keras.layers.Flatten(),
        keras.layers.Dense(5, activation="softmax"),
    ]
    keras.Sequential(layers).save(path)
    return path


class TestCommands:
    def test_convert(self, run, model, images, tmp_path):
        checkpoint, target = tmp_path / "weights.safetensors", tmp_path / "fused.safetensors"
        source = adversarial_(fastres.resnet20())
        for module in source.modules():  # a checkpoint does not carry eps
            if hasattr(module, "eps"):
                module.eps = 1e-5
        fastres.save_checkpoint(source, checkpoint)
        code, out, err = run(
            *("convert", "resnet20", target, "--checkpoint", checkpoint, "--size", 32, "--json")
        )
        assert (code, err) == (0, "")
        assert json.loads(out) == {"path": str(target), "fused": 22, "left_to_pytorch": 4}
        with torch.no_grad():
            torch.testing.assert_close(fastres.load(target)(images), source._forward_impl(images))

    def test_a_fused_file_is_a_source_too(self, run, model, images, tmp_path):
        fused = tmp_path / "fused.safetensors"
        fastres.save(fastres.optimize(model, example_input=images), fused)
        code, out, _ = run("export", fused, tmp_path / "model.pt2", "--size", 32)
        assert code == 0
        assert "torch.export gives the same logits" in out
        code, out, _ = run("plot", fused, tmp_path / "model.svg", "--size", 32)
        assert code == 0
        assert texts(tmp_path / "model.svg")[1] == "(1, 3, 32, 32)"

    def test_a_keras_file_says_the_size_itself(self, run, tmp_path):
        keras_file = written_by_keras(tmp_path / "model.keras")
        fused, drawn = tmp_path / "fused.safetensors", tmp_path / "model.svg"
        code, out, _ = run("summary", keras_file, "--json")
        assert code == 0
        # 3x3 convolution 3->4 with bias, its batch norm's two, Dense from 10x14x4 to 5 with bias.
        assert json.loads(out)["parameters"] == (27 * 4 + 4) + 8 + (560 * 5 + 5)
        assert json.loads(out)["input_size"] == [1, 3, 12, 16]
        assert run("convert", keras_file, fused)[0] == 0
        assert run("export", fused, tmp_path / "model.pt2")[0] == 0
        assert run("plot", keras_file, drawn)[0] == 0
        assert texts(drawn)[1] == "(1, 3, 12, 16)"

    def test_a_fused_file_has_a_dtype_and_weights(self, run, model, images, tmp_path):
        fused, target = tmp_path / "fused.safetensors", tmp_path / "again.safetensors"
        fastres.save(fastres.optimize(model, dtype=torch.bfloat16, verify=False), fused)
        for arguments, message in (
            (("convert", fused, target, "--dtype", "float16"), "is folded in torch.bfloat16"),
            (("convert", fused, target, "--checkpoint", fused), "which has weights"),
            (("summary", fused), "summarise its source"),
        ):
            code, _, err = run(*arguments)
            assert code == 2
            assert message in err
        assert run("convert", fused, target)[0] == 0
        assert fastres.load(target).dtype is torch.bfloat16

    def test_mistakes_are_one_line(self, run, tmp_path):
        for arguments, message in (
            (("convert", "resnet20", tmp_path / "m.pth", "--size", 32), "must end in .safetensors"),
            (("convert", "gone.h5", tmp_path / "m.safetensors"), "no Keras file at gone.h5"),
            (("plot", "resnet20", tmp_path / "m.gif"), "path must end in .svg, .png, .dot"),
            (("export", "resnet99", tmp_path / "m.onnx"), "unknown model 'resnet99'"),
        ):
            code, out, err = run(*arguments)
            assert code == 2
            assert out == ""
            last = err.strip().splitlines()[-1]
            assert last.startswith("error: ")
            assert message in " ".join(err.split())

    def test_help_shows_an_example(self, run):
        for command in ("convert", "export", "plot"):
            code, out, _ = run(command, "--help")
            assert code == 0
            assert f"Example: fastres {command}" in " ".join(out.split())
