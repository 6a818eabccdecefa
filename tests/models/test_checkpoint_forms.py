"""Checkpoints as training scripts write them, and values in them that are no plain tensors.

What is taken is judged by timm's own loader; what timm does not know, by the tensors themselves.
"""

import argparse
import io
import pickle
import re
import types
import warnings
import zipfile
from datetime import datetime
from pathlib import Path

import pytest
import torch
from fused import small
from torch import nn
from torch.optim.swa_utils import AveragedModel

import fastres
from fastres import cli
from fastres.errors import CheckpointError
from fastres.models.checkpoint import load_checkpoint, save_checkpoint, state_dict_from_file
from fastres.models.pretrained import arguments_from


def weights(seed):
    return small(seed=seed).state_dict()


def prefixed(state, prefix):
    return {prefix + name: value for name, value in state.items()}


def averaged(seed):
    """As torchvision's references keep it: of an AveragedModel, with its counter."""
    return AveragedModel(small(seed=seed)).state_dict()


def assert_same(state, other):
    assert set(state) == set(other)
    assert [k for k in state if not torch.equal(state[k], other[k])] == []


def by_timm(path, **kwargs):
    timm = pytest.importorskip("timm")
    with torch.serialization.safe_globals([argparse.Namespace]):
        found = timm.models.load_state_dict(path, **kwargs)
    return {name: value for name, value in found.items() if name != "n_averaged"}


def loaded(path, **kwargs):
    """The state of a model after loading, and what was said."""
    model = small(seed=9)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load_checkpoint(model, path, **kwargs)
    return model.state_dict(), [str(w.message) for w in said]


def torch_save(tmp_path, content, name="a.pth"):
    torch.save(content, tmp_path / name)
    return tmp_path / name


FORMS = {
    "timm's script": {"epoch": 3, "state_dict": weights(1), "state_dict_ema": weights(2)},
    "torchvision's script": {"model": weights(1), "model_ema": averaged(2), "epoch": 3},
    "an average that is None": {"state_dict": weights(1), "state_dict_ema": None},
    "both of timm's": {"model_ema": weights(3), "state_dict_ema": weights(2), "model": weights(1)},
    "both plain ones": {"model": weights(1), "state_dict": weights(2)},
    "an average and DDP": {"state_dict_ema": prefixed(weights(2), "module."), "state_dict": {}},
    "PyTorch's ImageNet": {
        "state_dict": prefixed(weights(1), "module."),
        "best_acc1": torch.tensor(0.5),
        "arch": "resnet18",
    },
    "compiled": {"model": prefixed(weights(1), "_orig_mod.")},
    "compiled in DDP": {"model": prefixed(weights(1), "module._orig_mod.")},
    "an average alone": {"model_ema": averaged(2)},
    "weights themselves": weights(1),
}


@pytest.mark.fault(56)
@pytest.mark.parametrize("use_ema", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_what_timm_takes_is_taken(tmp_path, form, use_ema):
    path = torch_save(tmp_path, FORMS[form])
    if form == "an average alone" and not use_ema:
        pytest.skip("timm takes the whole dictionary for a state dict")
    if form == "an average and DDP" and not use_ema:
        pytest.skip("timm takes the empty state dict")
    state, _ = loaded(path, use_ema=use_ema)
    assert_same(state, by_timm(path, use_ema=use_ema))


@pytest.mark.fault(56)
@pytest.mark.parametrize(
    ("form", "use_ema", "wanted"),
    [
        ("timm's script", True, ["averaged weights under 'state_dict_ema', as timm does; use_ema"]),
        ("timm's script", False, ["the weights under 'state_dict', not 'state_dict_ema'"]),
        (
            "torchvision's script",
            True,
            ["'model_ema', as timm does; use_ema=False takes .*'model'"],
        ),
        ("an average that is None", True, []),
        ("both plain ones", True, ["the weights under 'state_dict', not 'model'"]),
        ("PyTorch's ImageNet", True, []),
        ("an average alone", True, ["averaged weights under 'model_ema', as timm does$"]),
        ("weights themselves", True, []),
    ],
)
def test_a_choice_is_said_once(tmp_path, form, use_ema, wanted):
    _, said = loaded(torch_save(tmp_path, FORMS[form]), use_ema=use_ema)
    assert len(said) == len(wanted)
    for text, pattern in zip(said, wanted, strict=True):
        assert re.search(pattern, text), text
        assert str(tmp_path / "a.pth") in text


@pytest.mark.fault(56)
def test_files_of_timms_own_saver(tmp_path):
    utils = pytest.importorskip("timm.utils")
    model, ema = small(seed=1), utils.ModelEmaV3(small(seed=2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    args = argparse.Namespace(model="resnet", lr=0.1)
    saver = utils.CheckpointSaver(model, optimizer, args, ema, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(3, 0.5)
    path = tmp_path / "last.pth.tar"
    with pytest.raises(CheckpointError, match="argparse.Namespace"):
        load_checkpoint(small(), path)
    with torch.serialization.safe_globals([argparse.Namespace]):
        state, said = loaded(path)
        assert_same(state, by_timm(path))
    assert_same(state, weights(2))
    assert len(said) == 1


KEYS = {
    "net": ({"net": prefixed(weights(1), "module."), "acc": 93.1, "epoch": 3}, 0),
    "model_state_dict": ({"model_state_dict": weights(1), "optimizer_state_dict": {}}, 0),
    "an unknown key": ({"backbone_weights": weights(1), "epoch": torch.tensor(3)}, 1),
    "two levels": ({"checkpoint": 1, "model": {"state_dict": weights(1), "epoch": 1}}, 0),
    "an optimizer beside": (
        {
            "net": weights(1),
            "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": []},
            "rng_state": torch.zeros(5, dtype=torch.uint8),
        },
        0,
    ),
}


@pytest.mark.fault(56)
@pytest.mark.parametrize("key", KEYS)
def test_other_keys(tmp_path, key):
    content, messages = KEYS[key]
    state, said = loaded(torch_save(tmp_path, content))
    assert_same(state, weights(1))
    assert len(said) == messages


@pytest.mark.fault(56)
def test_several_unknown_keys_are_named(tmp_path):
    path = torch_save(tmp_path, {"student": weights(1), "teacher": weights(2)})
    with pytest.raises(CheckpointError, match="several state dicts, under 'student', 'teacher'"):
        state_dict_from_file(path)


@pytest.mark.fault(56)
def test_a_state_dict_with_a_dictionary_in_it_is_not_taken_apart(tmp_path):
    content = weights(1) | {"head._extra_state": {"scale": torch.ones(3)}}
    assert set(state_dict_from_file(torch_save(tmp_path, content))) == set(content)


@pytest.mark.fault(56)
def test_a_dictionary_that_holds_itself_ends(tmp_path):
    content = {}
    content["model"] = content
    with pytest.raises(CheckpointError, match="holds no state dict"):
        state_dict_from_file(torch_save(tmp_path, content))


NAMESPACES = {
    "torchvision": argparse.Namespace(lr=0.5, data_path="/data"),
    "with a path": argparse.Namespace(output=Path("out")),
    "with a date": argparse.Namespace(config=types.SimpleNamespace(day=datetime(2026, 1, 1))),
}


@pytest.mark.fault(56)
@pytest.mark.parametrize("name", NAMESPACES)
def test_the_advice_for_namespaces_works_as_written(tmp_path, name):
    content = {"model": weights(1), "model_ema": averaged(2), "args": NAMESPACES[name]}
    path = torch_save(tmp_path, content)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(small(), path)
    message = str(caught.value)
    assert "\n" not in message
    (call,) = re.findall(r"torch\.serialization\.add_safe_globals\(\[.*?\]\)", message)
    before = torch.serialization.get_safe_globals()
    try:
        exec(f"import argparse, datetime, pathlib, types\n{call}", {"torch": torch})
        state, _ = loaded(path)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(before)
    assert_same(state, weights(2))


@pytest.mark.fault(56)
def test_objects_that_run_code_get_no_such_advice(tmp_path):
    for content in (
        {"model": weights(1), "args": argparse.Namespace(), "x": print},
        {"model": small()},
    ):
        with pytest.raises(CheckpointError, match=r"save only model\.state_dict\(\)") as caught:
            load_checkpoint(small(), torch_save(tmp_path, content))
        assert "add_safe_globals" not in str(caught.value)
        assert "weights_only=False" not in str(caught.value)


@pytest.mark.fault(56)
@pytest.mark.parametrize(
    "prefix", ["model.", "backbone.", "encoder.", "module.encoder_q.", "net.model.", "a.b.c.d."]
)
def test_a_prefix_is_hinted_and_the_hint_works(tmp_path, prefix):
    others = {"criterion.weight": torch.ones(3)} if prefix == "model." else {}
    path = torch_save(tmp_path, {"state_dict": prefixed(weights(1), prefix) | others})
    model = small(seed=9)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, path)
    message = str(caught.value)
    assert f"unexpected: {prefix.removeprefix('module.')}conv1.weight" in message
    assert "missing: conv1.weight" in message
    strip = eval(re.search(r"pass strip=(\(.*?\))", message).group(1))
    if others:
        with pytest.raises(
            CheckpointError, match=r"\(1 problems\)\n  unexpected: criterion.weight"
        ):
            load_checkpoint(model, path, strip=strip)
        return
    load_checkpoint(model, path, strip=strip)
    assert_same(model.state_dict(), weights(1))


@pytest.mark.fault(56)
def test_a_model_inside_another_is_hinted(tmp_path):
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = small(seed=9)

    path = torch_save(tmp_path, weights(1))
    with pytest.raises(CheckpointError, match=r"begin with 'backbone\.': load into its backbone"):
        load_checkpoint(Wrapper(), path)


@pytest.mark.fault(56)
def test_names_of_another_network_get_no_hint(tmp_path):
    path = torch_save(tmp_path, {f"blocks.{i}.weight": torch.ones(2) for i in range(30)})
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(small(), path)
    assert "strip" not in str(caught.value)
    assert "unexpected: blocks.0.weight" in str(caught.value) or "more" in str(caught.value)


@pytest.mark.fault(56)
def test_the_command_line_takes_and_says_the_same(tmp_path, capsys):
    first, second = fastres.resnet20(), fastres.resnet20(num_classes=7)
    content = {"model": first.state_dict(), "model_ema": AveragedModel(second).state_dict()}
    path = torch_save(tmp_path, content)
    with pytest.warns(UserWarning, match="took the averaged weights under 'model_ema'"):
        code = cli.run(["plan", "resnet20", "--checkpoint", str(path), "--size", "32"])
    assert code == 0
    assert "linear 64->7" in capsys.readouterr().out


def nested():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])


def jagged():
    return torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)


def quantized():
    return torch.quantize_per_tensor(torch.ones(5, 16), 0.1, 0, torch.qint8)


ODD = {
    "meta": (lambda: torch.ones(5, 16, device="meta"), "on the meta device, without values"),
    "sparse": (lambda: torch.eye(5, 16).to_sparse(), "sparse"),
    "sparse rows": (lambda: torch.eye(5, 16).to_sparse_csr(), "sparse"),
    "nested": (nested, "nested"),
    "jagged": (jagged, "nested"),
    "quantized": (quantized, "quantized"),
    "float8": (lambda: torch.ones(5, 16).to(torch.float8_e4m3fn), "torch.float8_e4m3fn"),
    "float8 of scales": (
        lambda: torch.ones(5, 16).to(torch.float8_e8m0fnu),
        "torch.float8_e8m0fnu",
    ),
    "complex": (lambda: torch.ones(5, 16, dtype=torch.complex64), "torch.complex64"),
    "uint16": (lambda: torch.ones(5, 16, dtype=torch.uint16), "torch.uint16"),
    "lazy": (lambda: nn.LazyLinear(5).weight, "not initialised"),
    "a list": (lambda: [1.0] * 5, "a list"),
    "a dictionary": (lambda: {"weight": 1.0}, "a dict"),
    "None": (lambda: None, "a NoneType"),
    "text": (lambda: "weights", "a str"),
}


@pytest.mark.fault(74)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", ODD)
def test_odd_values_in_a_checkpoint_are_one_error(tmp_path, name, legacy):
    make, word = ODD[name]
    state = weights(1) | {"fc.weight": make()}
    path = tmp_path / "odd.pth"
    try:
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    except Exception as error:
        pytest.skip(f"torch does not save it: {error}")
    model = small(seed=9)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, path)
    assert_same(model.state_dict(), weights(9))
    lines = str(caught.value).splitlines()
    if "cannot read" in lines[0]:  # torch itself refuses it
        assert len(lines) == 1
        return
    assert len(lines) == 2
    assert "(1 problems)" in lines[0]
    assert "fc.weight" in lines[1]
    assert word in lines[1]


@pytest.mark.fault(74)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ODD)
def test_the_command_line_says_it_in_one_line(tmp_path, capsys, name):
    make, _ = ODD[name]
    state = fastres.resnet20().state_dict() | {"fc.weight": make(), "conv1.weight": make()}
    assert cli.run(["plan", "resnet20", "--checkpoint", str(torch_save(tmp_path, state))]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1


@pytest.mark.fault(74)
def test_odd_values_in_safetensors(tmp_path):
    from safetensors.torch import save_file

    state = weights(1) | {"fc.weight": torch.ones(5, 16).to(torch.float8_e5m2)}
    save_file(state, tmp_path / "odd.safetensors")
    with pytest.raises(CheckpointError, match=r"dtype: fc\.weight is torch\.float8_e5m2"):
        load_checkpoint(small(), tmp_path / "odd.safetensors")


def nest(depth, opening, closing):
    """A pickle of protocol 2 that is nested ``depth`` deep, which pickle itself cannot write."""
    return b"\x80\x02" + opening * depth + b"]" + closing * depth + b"."


DEEP = {
    "lists": (b"]", b"a"),
    "tuples": (b"", b"\x85"),
    "dictionaries": (b"}X\x05\x00\x00\x00model", b"s"),
}


@pytest.mark.fault(74)
@pytest.mark.parametrize("kind", DEEP)
@pytest.mark.parametrize("depth", [3, 100_000])
def test_deeply_nested_containers(tmp_path, kind, depth):
    buffer = io.BytesIO()
    torch.save({}, buffer)
    path = tmp_path / "deep.pth"
    with zipfile.ZipFile(buffer) as old, zipfile.ZipFile(path, "w") as new:
        for entry in old.namelist():
            inside = entry.endswith("data.pkl")
            new.writestr(entry, nest(depth, *DEEP[kind]) if inside else old.read(entry))
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(small(), path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.fault(74)
def test_deeply_nested_values_and_keys(tmp_path):
    deep = []
    for _ in range(100):
        deep = [deep]
    state = weights(1) | {"fc.bias": deep, (1, 2): torch.ones(1), 7: torch.ones(1)}
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(small(), torch_save(tmp_path, state))
    assert "not a tensor: fc.bias is a list" in str(caught.value)
    assert "unexpected: <a tuple>" in str(caught.value)
    assert "unexpected: 7" in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.fault(74)
def test_a_model_without_values_is_an_error_too(tmp_path):
    path = torch_save(tmp_path, weights(1))
    with torch.device("meta"):
        model = fastres.ResNet(fastres.BasicBlock, [1, 1], num_classes=5, stem="cifar", planes=8)
    with pytest.raises(CheckpointError, match="the model's conv1.weight is on the meta device"):
        load_checkpoint(model, path)


@pytest.mark.fault(74)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "name", [n for n in ODD if n not in ("float8", "float8 of scales", "uint16")]
)
def test_odd_values_are_not_saved(tmp_path, name):
    make, word = ODD[name]
    with pytest.raises(CheckpointError, match="cannot save fc.weight in .*: it is ") as caught:
        save_checkpoint(weights(1) | {"fc.weight": make()}, tmp_path / "a.safetensors")
    assert word in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.fault(74)
def test_shapes_without_stored_values_build_no_model():
    wide = torch.ones(1, 1).expand(10**9, 64)
    assert arguments_from({"fc.weight": wide}) == {}
    assert arguments_from({"fc.weight": torch.ones(7, 64).t().contiguous().t()}) == {
        "num_classes": 7
    }


@pytest.mark.fault(74)
def test_pickles_of_plain_python(tmp_path):
    for content in (pickle.dumps({"a": 1}), b"", b"\0" * 100, b"PK\x03\x04", b"text"):
        (tmp_path / "a.pth").write_bytes(content)
        with pytest.raises(CheckpointError) as caught:
            load_checkpoint(small(), tmp_path / "a.pth")
        assert "\n" not in str(caught.value)


@pytest.mark.fault(74)
def test_compressed_entries_are_refused_before_they_are_read(tmp_path, monkeypatch):
    whole, path = torch_save(tmp_path, {"model": {"w": torch.zeros(10**6)}}), tmp_path / "b.pth"
    with (
        zipfile.ZipFile(whole) as old,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for entry in old.namelist():
            new.writestr(entry, old.read(entry))
    assert torch.load(path, weights_only=True)["model"]["w"].numel() == 10**6
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(CheckpointError, match="it is compressed, as torch.save never does"):
        state_dict_from_file(path)
