"""Fused models in files: the same answers bit for bit, and nothing in a file that could run."""

import json
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from helpers import adversarial_, real_images
from torch import nn
from zoo import CASES

import fastres
from fastres.errors import CheckpointError

STORABLE = (
    "timm-resnet26d",
    "timm-seresnet50",
    "timm-ecaresnet50d",
    "timm-resnet50_gn",
    "timm-resnet50, features_only",
    "tutorial-MNIST ResNet-18",
)


class Small(nn.Module):
    """Every kind of step, options, and what is not a tensor."""

    def __init__(self):
        super().__init__()
        self.width = 8
        self.names = ["a", "b"]
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=2), nn.Sigmoid())
        self.late = nn.BatchNorm2d(8)
        self.scale = nn.Parameter(torch.rand(8, 1, 1))
        self.up = nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False)
        self.head = nn.Linear(8, 5)

    def forward(self, x, gain=0.5, *, bias=1.0):
        x = self.stem(x)
        x = self.late(x * self.branch(x) * gain + x) * self.scale
        pooled = nn.functional.avg_pool2d(nn.functional.max_pool2d(x, 2), 2).mean((2, 3))
        logits = self.head(pooled) + bias
        return OrderedDict(logits=logits, maps=[self.up(x), x[..., 1:]])


@pytest.fixture
def images():
    return real_images(2, 64)


@pytest.fixture
def fast(images):
    return fastres.optimize(adversarial_(Small()), example_input=(images,))


@pytest.fixture
def path(fast, tmp_path):
    fastres.save(fast, tmp_path / "small.safetensors")
    return tmp_path / "small.safetensors"


@pytest.mark.sample(2)
@pytest.mark.parametrize("case", [c for c in CASES if str(c) in STORABLE], ids=str)
def test_models_come_back_bit_for_bit(case, tmp_path):
    fast = fastres.optimize(case.model(), verify=False)
    fastres.save(fast, tmp_path / "model.safetensors")
    loaded = fastres.load(tmp_path / "model.safetensors")
    (images,) = case.inputs()
    wanted, found = fast(images), loaded(images)
    assert type(found) is type(wanted)
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    assert str(loaded.plan()) == str(fast.plan())


def test_all_that_makes_a_model_comes_back(fast, path, images):
    loaded = fastres.load(path)
    for arguments, options in [((images,), {}), ((images, 2.0), {"bias": 3.0})]:
        wanted, found = fast(*arguments, **options), loaded(*arguments, **options)
        assert list(found) == ["logits", "maps"]
        torch.testing.assert_close(dict(found), dict(wanted), rtol=0, atol=0)
    assert loaded.signature == fast.signature
    assert loaded.verification == fast.verification
    assert loaded.verification.ok
    assert (loaded.width, loaded.names) == (8, ["a", "b"])
    assert isinstance(loaded, fastres.FastModel)
    nhwc = images.contiguous(memory_format=torch.channels_last)
    assert loaded(nhwc)["maps"][0].stride() == fast(nhwc)["maps"][0].stride()
    compiled = torch.compile(loaded, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(images)["logits"], fast(images)["logits"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype, images, tmp_path):
    fast = fastres.optimize(adversarial_(Small()), dtype=dtype, verify=False)
    fastres.save(fast, tmp_path / "m.safetensors")
    loaded = fastres.load(tmp_path / "m.safetensors")
    found = loaded(images)["logits"]
    assert found.dtype is dtype
    assert torch.equal(found, fast(images)["logits"])


def test_another_process_needs_no_source(path, images, fast, tmp_path):
    torch.save(images, tmp_path / "x.pt")
    code = (
        "import torch, fastres; model = fastres.load('small.safetensors')\n"
        "torch.save(dict(model(torch.load('x.pt')))['logits'], 'y.pt')"
    )
    root = Path(__file__).parents[2]
    environment = {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, env=environment)
    torch.testing.assert_close(torch.load(tmp_path / "y.pt"), fast(images)["logits"])


class TestRefusedToSave:
    def test_other_modules(self, tmp_path):
        with pytest.raises(TypeError, match=r"fastres\.optimize"):
            fastres.save(Small(), tmp_path / "m.safetensors")

    def test_shells(self, tmp_path):
        class Branching(nn.Module):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

            def forward(self, x, twice=None):
                return self.net(x) if twice is None else self.net(x) * 2

        fast = fastres.optimize(Branching().eval(), verify=False)
        with pytest.raises(TypeError, match="own Python cannot be stored"):
            fastres.save(fast, tmp_path / "m.safetensors")

    def test_suffix(self, fast, tmp_path):
        with pytest.raises(ValueError, match=r"\.safetensors"):
            fastres.save(fast, tmp_path / "m.pth")

    def test_unknown_modules(self, tmp_path):
        class Odd(nn.Hardsigmoid):
            pass

        model = nn.Sequential(nn.Conv2d(3, 4, 3), Odd())
        model[1].register_forward_hook(lambda *_: None)
        fast = fastres.optimize(model.eval(), verify=False)
        with pytest.raises(ValueError, match="1 cannot be stored without pickle"):
            fastres.save(fast, tmp_path / "m.safetensors")
        assert not list(tmp_path.iterdir())

    def test_unknown_functions(self, tmp_path):
        class Cumulative(nn.Module):
            def __init__(self):
                super().__init__()
                self.conv = nn.Conv2d(3, 4, 3)

            def forward(self, x):
                return torch.cumsum(self.conv(x), 1)

        fast = fastres.optimize(Cumulative().eval(), verify=False)
        with pytest.raises(ValueError, match="step cumsum cannot be stored.*function cumsum"):
            fastres.save(fast, tmp_path / "m.safetensors")


def rewrite(path, change):
    """Change the description inside a file; its tensors stay."""
    data = path.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    description = json.loads(header["__metadata__"]["fastres"])
    change(description)
    header["__metadata__"]["fastres"] = json.dumps(description)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])


def call(kind, target, *args):
    return {
        "name": "evil",
        "inputs": [],
        "where": "",
        "in_place": False,
        "frees": [],
        "kind": "Call",
        "fields": {
            "kind": kind,
            "target": target,
            "args": {"tuple": list(args)},
            "kwargs": {"dict": []},
            "reason": "",
            "mutates": False,
            "any_layout": True,
        },
    }


EVIL = {
    "function": lambda d: d["plan"]["steps"].append(call("call_function", "os.system", "echo")),
    "torch.load": lambda d: d["plan"]["steps"].append(call("call_function", "torch.load", "x")),
    "method": lambda d: d["plan"]["steps"].append(call("call_method", "__reduce__", {"ref": "x"})),
    "getattr": lambda d: d["plan"]["steps"].append(
        call("call_function", "builtins.getattr", {"ref": "x"}, "__class__")
    ),
    "opcode": lambda d: d["plan"]["steps"].append(call("call_anything", "x")),
    "module": lambda d: d["modules"]["up"].update(type="Module"),
    "parallel module": lambda d: d["modules"]["up"].update(type="DataParallel"),
    "operation": lambda d: d["plan"]["steps"][0].update(kind="Evil"),
    "value": lambda d: d["plan"]["steps"][0]["fields"].update(stride={"eval": "1"}),
    "torch attribute": lambda d: d.update(dtype={"torch": ["dtype", "hub"]}),
}
BROKEN = {
    "reference": lambda d: d["plan"]["steps"][1].update(inputs=["nowhere"]),
    "output": lambda d: d["plan"].update(output={"ref": "nowhere"}),
    "duplicate": lambda d: d["plan"]["steps"].append(d["plan"]["steps"][0]),
    "stride": lambda d: d["plan"]["steps"][0]["fields"].update(stride={"tuple": [0, 1]}),
    "channels": lambda d: d["plan"]["steps"][0]["fields"].update(out_channels=9),
    "dtype": lambda d: d.update(dtype={"torch": ["dtype", "float16"]}),
    "format": lambda d: d.update(format=99),
    "missing": lambda d: d.pop("plan"),
    "backend": lambda d: d.update(backend="rocket"),
}


@pytest.mark.fault(37)
@pytest.mark.parametrize("name", EVIL)
def test_files_that_name_what_they_must_not_are_refused(name, path, monkeypatch):
    ran = []
    for target in ("os.system", "torch.load", "torch.hub.load"):
        monkeypatch.setattr(target, lambda *a, **k: ran.append(a))
    rewrite(path, EVIL[name])
    with pytest.raises(CheckpointError, match="not allowed|must not|unknown|is no dtype"):
        fastres.load(path)
    assert not ran


@pytest.mark.fault(37)
@pytest.mark.parametrize("name", BROKEN)
def test_files_that_do_not_hold_together_are_refused(name, path):
    rewrite(path, BROKEN[name])
    with pytest.raises(CheckpointError, match=str(path)):
        fastres.load(path)


@pytest.mark.fault(37)
def test_truncated_missing_and_plain_files(path, tmp_path, fast):
    with pytest.raises(FileNotFoundError):
        fastres.load(tmp_path / "none.safetensors")
    data = path.read_bytes()
    for keep in (0, 7, 200, len(data) - 1):
        path.write_bytes(data[:keep])
        with pytest.raises(CheckpointError):
            fastres.load(path)
    weights = tmp_path / "weights.safetensors"
    fastres.save_checkpoint(Small(), weights)
    with pytest.raises(CheckpointError, match="load_checkpoint"):
        fastres.load(weights)
