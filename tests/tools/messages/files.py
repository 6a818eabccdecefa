"""Cases: checkpoints, fused models, weights, Keras files, images, pictures and exports."""

from __future__ import annotations

import json
import zipfile
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from fused import images, small
from torch import nn

import fastres
from fastres.cli.files import image_shape
from fastres.formats import plan_json
from fastres.formats.export import export as write_export
from fastres.graph import diagram
from fastres.models import classify, digits, weights
from fastres.models.checkpoint import load_state_dict, read_metadata, state_dict_from_file
from messages.models import fast
from messages.provoke import add, case, without


def written(name: str, data: bytes = b"") -> Path:
    path = Path(name)
    path.write_bytes(data)
    return path


def saved(state: Any, name: str = "weights.pth") -> Path:
    torch.save(state, name)
    return Path(name)


def load(path: Path | str, **kwargs: Any) -> Any:
    return fastres.load_checkpoint(small(), path, **kwargs)


add("load_checkpoint: no such file", lambda: load("gone.safetensors"))
add("load_checkpoint: half a file", lambda: load(written("half.safetensors", b"\x10\0\0")))
add("load_checkpoint: half a pickle", lambda: load(written("half.pth", b"\x80\x02")))
add("load_checkpoint: a pickled model", lambda: load(saved(small(), "model.pth")))
add("load_checkpoint: no tensors", lambda: load(saved({"epoch": 3})))
add(
    "load_checkpoint: an option",
    lambda: load(saved({"a": torch.ones(1)}), num_classes_mismatch="ignore"),
)
add("load_checkpoint: other classes", lambda: load(saved(small(num_classes=7).state_dict())))
add("load_checkpoint: a prefix", lambda: load(saved(under("backbone."))))
add("load_checkpoint: two networks", lambda: load(saved({"a": under(""), "b": under("")})))
add("load_checkpoint: arguments", lambda: load(saved({"model": {}, "args": Namespace(lr=1)})))
add("load_checkpoint: compressed", lambda: load(compressed()))
add("load_checkpoint: on meta", lambda: load(saved(small().to("meta").state_dict())))
add(
    "save_checkpoint: no plain tensor",
    lambda: fastres.save_checkpoint({"fc.weight": torch.eye(3).to_sparse()}, "a.safetensors"),
)


def compressed() -> Path:
    with zipfile.ZipFile("a.pth", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("data.pkl", b"")
    return Path("a.pth")


def under(prefix: str) -> dict[str, Any]:
    return {prefix + name: value for name, value in small().state_dict().items()}


add("read_metadata: half a file", lambda: read_metadata(written("half.safetensors", b"\x10")))
add("state_dict_from_file: a folder", lambda: state_dict_from_file(Path(".")))
add("save_checkpoint: no such folder", lambda: fastres.save_checkpoint({}, "gone/a.safetensors"))
add("save_checkpoint: another suffix", lambda: fastres.save_checkpoint(small(), "weights.pth"))


add("save_checkpoint: a folder", lambda: (Path("a.safetensors").mkdir(), saving())[1])
add("save_checkpoint: a write-protected file", lambda: (saving(), protected())[1])


def saving() -> None:
    fastres.save_checkpoint({}, "a.safetensors")


def protected() -> None:
    with mock.patch("os.access", lambda path, mode: Path(path).is_dir()):
        saving()


@case("load_checkpoint: all problems at once")
def _() -> None:
    state = small().state_dict()
    del state["bn1.weight"], state["bn1.bias"]
    state["stray"], state["bn1.running_mean"] = torch.ones(1), torch.ones(3)
    state["bn1.running_var"] = -state["bn1.running_var"]
    state["conv1.weight"][0, 0, 0, 0] = float("nan")
    state["fc.bias"], state["fc.weight"] = [1, 2], state["fc.weight"].int()
    load(saved(state))


@case("load_checkpoint: a name that is there twice")
def _() -> None:
    state = small().state_dict()
    load(saved(state | {"module.fc.bias": state["fc.bias"]}))


@case("load_checkpoint: what torch itself refuses")
def _() -> None:
    model = small()
    real = type(model).load_state_dict
    answers = iter([RuntimeError("a hook of the model's says no"), None])

    def refusing(self, state):
        said = next(answers)
        if said:
            raise said
        return real(self, state)

    with mock.patch.object(type(model), "load_state_dict", refusing):
        load_state_dict(model, small(seed=1).state_dict())


def fused(change: Callable[[dict[str, Any]], Any] = lambda d: None, source: Any = None) -> Path:
    """A fused model's file whose description was changed."""
    fastres.save(fast(source), "fused.safetensors")
    description = json.loads(read_metadata("fused.safetensors")["fastres"])
    new = change(description)
    text = new if isinstance(new, str) else json.dumps(description)
    state = state_dict_from_file("fused.safetensors")
    fastres.save_checkpoint(state, "forged.safetensors", metadata={"fastres": text})
    return Path("forged.safetensors")


def forged(name: str, change: Callable[[dict[str, Any]], Any], source: Any = None) -> None:
    add(f"load: {name}", lambda: fastres.load(fused(change, source() if source else None)))


def step(kind: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda d: next(s for s in d["plan"]["steps"] if s["kind"] == kind)


class Calls(nn.Module):
    """A module, a function, a method and an attribute that stay with PyTorch."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.conv, self.inner = nn.Conv2d(3, 4, 3), inner or nn.Sigmoid()
        self.size = (8, 8)

    def forward(self, x):
        return self.inner(torch.tanh(self.conv(x)).clamp(-1, 1) * x.shape[0])


def calls() -> nn.Module:
    return Calls().eval()


def call(kind: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def find(d: dict[str, Any]) -> dict[str, Any]:
        fields = [s["fields"] for s in d["plan"]["steps"]]
        return next(f for f in fields if f.get("kind") == kind)

    return find


forged("no description", lambda d: "{")
forged("another format", lambda d: d.update(format=99))
forged("no signature", lambda d: d.pop("signature"))
forged("no steps", lambda d: d["plan"].pop("steps"))
forged("an unknown kind of value", lambda d: d["plan"].update(output={"secret": 1}))
forged("a dtype that is none", lambda d: d.update(dtype={"torch": ["dtype", "nn"]}))
forged("an unknown operation", lambda d: step("Linear")(d).update(kind="Attention"))
forged(
    "a stride of zero",
    lambda d: step("Conv2d")(d)["fields"].update(stride={"tuple": [0, 0]}),
)
forged("a function of the system", lambda d: call("call_method")(d).update(target="open"), calls)
forged("an output of no step", lambda d: d["plan"].update(output={"ref": "nothing"}))
forged("a step before its input", lambda d: d["plan"]["steps"].reverse())
forged(
    "an attribute that is not listed",
    lambda d: call("call_function")(d).update(
        target="builtins.getattr", args={"tuple": [1, "__class__"]}
    ),
    calls,
)
forged("a module of another package", lambda d: d["modules"]["inner"].update(type="Evil"), calls)


@case("load: weights without a model")
def _() -> None:
    fastres.save_checkpoint(small(), "weights.safetensors")
    fastres.load("weights.safetensors")


@case("load: weights of another shape")
def _() -> None:
    fused()
    metadata, state = (
        read_metadata("forged.safetensors"),
        state_dict_from_file("forged.safetensors"),
    )
    state["folded.weight0"] = state["folded.weight0"][:1]
    fastres.save_checkpoint(state, "forged.safetensors", metadata=metadata)
    fastres.load("forged.safetensors")


class Own(nn.Module):
    """Code that no file carries, called whole for its hook."""

    def forward(self, x):
        return x * 2


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda *_: None)
    return module


def user_function(x: torch.Tensor) -> torch.Tensor:
    return x + 1


torch.fx.wrap("user_function")


class CallsOwnFunction(Calls):
    """A function of the user's own."""

    def forward(self, x):
        return user_function(self.conv(x))


class Slices(Calls):
    """An argument that JSON cannot hold."""

    def forward(self, x):
        return torch.sub(self.conv(x), 1, alpha=2 + 1j)


def stored(source: nn.Module) -> None:
    fastres.save(fast(source.eval()), "fused.safetensors")


add("save: a model that is not fused", lambda: fastres.save(small(), "model.safetensors"))
add("save: a shell", lambda: fastres.save(shell_of_parts(), "model.safetensors"))
add("save: a module of one's own", lambda: stored(Calls(hooked(Own()))))
add("save: a layer with a hook", lambda: stored(Calls(hooked(nn.Sigmoid()))))
add("save: a function of one's own", lambda: stored(CallsOwnFunction()))
add("save: a value that cannot be stored", lambda: stored(Slices()))


def shell_of_parts() -> nn.Module:
    from messages.models import Parts

    return fast(Parts().eval())


add("weights: unknown name", lambda: fastres.resnet50(weights="V9"))
add("weights: none published", lambda: fastres.create_model("resnet20", weights="DEFAULT"))
add("weights: of another model", lambda: fastres.resnet50(weights=weights.get_weights("resnet18")))
add("weights: no weights", lambda: fastres.resnet50(weights={"fc.bias": 1}))
add("weights: twice", lambda: fastres.resnet50(weights="DEFAULT", pretrained=True))
add("weights: other classes", lambda: fastres.resnet50(weights="DEFAULT", num_classes=7))
add("weights: no such address", lambda: weights.fetch(Path("gone.pth").absolute().as_uri()))


@case("weights: a file that is damaged")
def _() -> None:
    written("damaged.pth", b"\x80\x02")
    hub = mock.patch.object(torch.hub, "get_dir", return_value=str(Path("hub").absolute()))
    with hub:
        weights.fetch(Path("damaged.pth").absolute().as_uri(), progress=False)


@case("weights: without torchvision")
def _() -> None:
    with without("torchvision"), without("torchvision.models"):
        weights._torchvision("models", "labels")


def read_image(path: str) -> Any:
    return classify.read_image(path, lambda image: torch.zeros(3, 8, 8))


add("classify: no labels wanted", lambda: classify.classify(["photo.jpg"], top=0))
add("classify: no such photograph", lambda: read_image("gone.jpg"))
add("classify: no photograph", lambda: read_image(str(written("text.jpg", b"text"))))


@case("classify: a photograph of floats")
def _() -> None:
    from PIL import Image

    Image.new("F", (8, 8)).save("floats.tiff")
    read_image("floats.tiff")


@case("classify: without Pillow")
def _() -> None:
    with without("PIL"):
        read_image("photo.jpg")


add("plot_model: another suffix", lambda: diagram.plot_model(small(), "model.gif"))
add("plot_model: a fused model unfused", lambda: diagram.plot_model(fast(), "m.svg", fused=False))


@case("plot_model: .png without Pillow")
def _() -> None:
    with without("PIL"):
        diagram.plot_model(small(), "model.png")


add("digits_split: no such part", lambda: digits.digits_split("test"))


@case("digits_split: without scikit-learn")
def _() -> None:
    with without("sklearn.datasets"):
        digits.digits_split()


add("export: a model that is not fused", lambda: write_export(small(), "m.onnx", images()))
add("export: another suffix", lambda: write_export(fast(), "m.pb", images()))
add("export: ONNX of bfloat16", lambda: write_export(half(), "m.onnx", images()))
add("export: a shell", lambda: write_export(shell_of_parts(), "m.pt2", images()))
add("export: an argument too many", lambda: write_export(fast(), "m.pt2", (images(), images())))
add("export: a list as argument", lambda: write_export(fast(), "m.pt2", ([images()],)))
add(
    "export: images and others",
    lambda: write_export(fast(Pairs().eval()), "m.pt2", (images(), images(3))),
)
add("export: a size as output", lambda: write_export(fast(Sized().eval()), "m.pt2", images()))
add("export: a class of one's own", lambda: write_export(fast(Named().eval()), "m.pt2", images()))
add(
    "export: a batch size in forward", lambda: write_export(fast(Fixed().eval()), "m.pt2", images())
)
add("export: one image", lambda: write_export(fast(), "m.onnx", images(1)))
add("export: a model elsewhere", lambda: write_export(elsewhere(), "m.onnx", images()))


class Pairs(Calls):
    def forward(self, x, y):
        return self.conv(x) + self.conv(y)


class Sized(Calls):
    def forward(self, x):
        return self.conv(x), x.shape[0]


class Both(NamedTuple):
    first: torch.Tensor
    second: torch.Tensor


class Named(Calls):
    def forward(self, x):
        return Both(self.conv(x), x)


class Chosen(Calls):
    def forward(self, x):
        return self.conv(x).mean((2, 3)).argmax(1)


class Fixed(Calls):
    def forward(self, x):
        return self.conv(x).view(2, -1)


def half() -> fastres.FastModel:
    return fastres.optimize(small(), dtype=torch.bfloat16, verify=False)


def elsewhere() -> nn.Module:
    model = fast()
    model.register_buffer("there", torch.empty(1, device="meta"))
    return model


@case("export: without onnxscript")
def _() -> None:
    with without("onnxscript"):
        write_export(fast(), "m.onnx", images())


@case("export: a file that answers otherwise")
def _() -> None:
    wrong = (lambda x: torch.zeros(len(x), 5), "the program")
    with mock.patch("fastres.formats.export._runner", return_value=wrong):
        write_export(fast(), "m.pt2", images())


@case("export: a file with other indices")
def _() -> None:
    wrong = (lambda x: torch.full((len(x),), 7), "the program")
    with mock.patch("fastres.formats.export._runner", return_value=wrong):
        write_export(fast(Chosen().eval()), "m.pt2", images())


add("plan_json: a step before its time", lambda: plan_json.decode_plan({}))
add("image_shape: no convolution", lambda: image_shape(nn.Identity(), 8))
add("image_shape: too large", lambda: image_shape(nn.Conv2d(3, 4, 3), 10**5))


def argument(**fields: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda d: d["plan"]["steps"][0]["fields"].update(fields)


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 1


forged("a description that is too long", lambda d: " " * 2**24 + "{}")
forged("JSON that is too deep", lambda d: "[" * 10**5)
forged("a member that is unknown", lambda d: d.update(extra=1))
forged("a plan that is a list", lambda d: d.update(plan=[]))
forged("steps that are text", lambda d: d["plan"].update(steps="abc"))
forged("a plan without steps", lambda d: d["plan"].update(steps=[]))
forged("a parameter that is code", lambda d: d["plan"]["parameters"][0]["dict"][0].reverse())
forged("a signature that is code", lambda d: d["signature"][0].update(name="x=print(1)"))
forged("a signature of stars", lambda d: d["signature"][0].update(kind=2))
forged("a signature of its own", lambda d: d["signature"][0].update(default=[1]))
forged("fields that are a list", lambda d: d["plan"]["steps"][0].update(fields=[]))
forged("a field of another type", argument(groups="1"))
forged("groups that do not divide", argument(groups=2))
forged("values that are too deep", lambda d: d["plan"].update(output=nested(50)))
forged("a number that is too large", lambda d: d["plan"].update(output=2**64))
forged("a slice of two", lambda d: d["plan"].update(output={"slice": [1, 2]}))
forged("a method of a text", lambda d: call("call_method")(d).update(args={"tuple": ["a"]}), calls)
forged("a dtype of whole numbers", lambda d: d.update(dtype={"torch": ["dtype", "int8"]}))
forged("a private attribute", lambda d: d["described"]["dict"].append(["__deepcopy__", 1]))
forged("a backend of its own", lambda d: d.update(backend="rocket"))
forged(
    "a layer with a text",
    lambda d: d["modules"]["inner"]["arguments"].update(num_groups="2"),
    lambda: Calls(nn.GroupNorm(2, 4)).eval(),
)
forged(
    "a layer of no size",
    lambda d: d["modules"]["inner"]["arguments"].update(num_groups=3),
    lambda: Calls(nn.GroupNorm(2, 4)).eval(),
)


@case("save: a module whose name cannot be shown")
def _() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    model.add_module("a\nb", nn.Hardswish())
    fastres.save(fast(model.eval()), "fused.safetensors")
