"""Checkpoints: what is read, what is refused, and that a refusal changes nothing."""

import argparse
import os
import stat

import pytest
import torch
from helpers import adversarial_, real_images
from safetensors.torch import save_file
from torch import nn

from fastres.errors import CheckpointError
from fastres.models import checkpoint, resnet
from fastres.models.checkpoint import load_checkpoint, save_checkpoint, state_dict_from_file

LAYERS = [1, 1, 1]


def small(num_classes=5, seed=0):
    torch.manual_seed(seed)
    return resnet.ResNet(resnet.BasicBlock, LAYERS, num_classes, planes=8, stem="cifar")


@pytest.fixture
def source():
    return adversarial_(small(), seed=3)


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(state, other):
    assert list(state) == list(other)
    assert [k for k in state if not torch.equal(state[k], other[k])] == []


def refused(model, path, *messages, **kwargs):
    """Loading fails with one error that holds every message; the model stays as it was."""
    before = snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, path, **kwargs)
    assert_same(model.state_dict(), before)
    for message in messages:
        assert message in str(caught.value)
    return str(caught.value)


class Payload:
    """Unpickled carelessly, it makes the file named by ``mark``."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return (os.mkdir, (str(self.mark),))


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.module."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_round_trip(source, tmp_path, prefix, suffix):
    path = tmp_path / f"weights{suffix}"
    state = {prefix + k: v for k, v in source.state_dict().items()}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    model = small(seed=1)
    assert load_checkpoint(model, path) == ()
    assert_same(model.state_dict(), source.state_dict())


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_training_checkpoints_are_unwrapped(source, tmp_path, key, zipped):
    path = tmp_path / "checkpoint.tar"
    whole = {"epoch": 3, key: source.state_dict(), "optimizer": {"state": {}, "param_groups": []}}
    torch.save(whole, path, _use_new_zipfile_serialization=zipped)
    model = small(seed=1)
    load_checkpoint(model, path)
    assert_same(model.state_dict(), source.state_dict())


def test_wrapped_model_keeps_its_own_prefix(source, tmp_path):
    """DataParallel's names are the model's own where the model is a DataParallel."""
    wrapped = nn.ModuleDict({"module": small(seed=1)})
    save_checkpoint(nn.ModuleDict({"module": source}), tmp_path / "w.safetensors")
    load_checkpoint(wrapped, tmp_path / "w.safetensors")
    assert_same(wrapped["module"].state_dict(), source.state_dict())


def test_half_precision_files_load_into_float_models(source, tmp_path):
    halves = {k: v.half() if v.is_floating_point() else v for k, v in source.state_dict().items()}
    save_file(halves, tmp_path / "half.safetensors")
    model = small()
    load_checkpoint(model, tmp_path / "half.safetensors")
    assert model.conv1.weight.dtype == torch.float32
    assert torch.equal(model.conv1.weight, halves["conv1.weight"].float())


def test_old_files_without_counters_load(source, tmp_path):
    state = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    save_file(state, tmp_path / "old.safetensors")
    model = small(seed=1)
    model.bn1.num_batches_tracked.fill_(7)
    load_checkpoint(model, tmp_path / "old.safetensors")
    assert model.bn1.num_batches_tracked == 7
    assert torch.equal(model.layer3[0].bn2.bias, source.layer3[0].bn2.bias)


@pytest.mark.fault(36)
def test_every_problem_is_listed_at_once(source, tmp_path):
    state = snapshot(source)
    del state["layer1.0.conv2.weight"]
    state["layer9.conv.weight"] = torch.ones(3)
    state["bn1.bias"] = torch.ones(9)
    state["layer2.0.conv1.weight"][0, 0, 1, 1] = float("nan")
    state["layer3.0.bn1.weight"][1] = float("inf")
    state["layer1.0.bn1.running_var"][2:4] = -1.0
    state["layer2.0.bn1.bias"] = state["layer2.0.bn1.bias"].to(torch.int64)
    save_file(state, tmp_path / "bad.safetensors")
    refused(
        small(seed=1),
        tmp_path / "bad.safetensors",
        "bad.safetensors does not fit the model, which is unchanged (7 problems)",
        "missing: layer1.0.conv2.weight",
        "unexpected: layer9.conv.weight",
        "shape: bn1.bias is (9,), the model's (8,)",
        "not finite: layer2.0.conv1.weight has 1 NaN",
        "not finite: layer3.0.bn1.weight has 1 NaN or inf",
        "negative variance: layer1.0.bn1.running_var has 2 negative",
        "dtype: layer2.0.bn1.bias is torch.int64, the model's torch.float32",
    )


def test_long_lists_are_cut(tmp_path):
    save_file({f"x{i}": torch.ones(1) for i in range(90)}, tmp_path / "x.safetensors")
    message = refused(small(), tmp_path / "x.safetensors", "more")
    assert len(message.splitlines()) < 30


@pytest.mark.fault(36)
def test_values_that_are_no_tensors_are_named(source, tmp_path):
    torch.save({**source.state_dict(), "bn1.bias": [1.0, 2.0]}, tmp_path / "list.pth")
    refused(small(), tmp_path / "list.pth", "not a tensor: bn1.bias is a list")


def test_a_single_prefix_is_no_list_of_letters(source, tmp_path):
    path = tmp_path / "ema.pth"
    state = {f"ema.{name}": value for name, value in source.state_dict().items()}
    torch.save(state, path)
    assert load_checkpoint(source, path, strip="ema.") == ()
    torch.save(state | {"ema.mean": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match="unexpected: mean$"):
        load_checkpoint(source, path, strip="ema.")


def test_prefixes_that_collide_are_refused(source, tmp_path):
    state = snapshot(source) | {"module.fc.bias": torch.ones(5)}
    save_file(state, tmp_path / "twice.safetensors")
    refused(small(seed=1), tmp_path / "twice.safetensors", "has fc.bias twice")


@pytest.mark.fault(37)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.98])
def test_truncated_files(source, tmp_path, suffix, share):
    path = tmp_path / f"cut{suffix}"
    state = source.state_dict()
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    message = refused(small(seed=1), path, f"cannot read {path}: truncated or not a checkpoint")
    assert "\n" not in message


@pytest.mark.fault(37)
@pytest.mark.parametrize("zipped", [True, False])
def test_malicious_pickle_does_not_run(source, tmp_path, zipped):
    mark, path = tmp_path / "ran", tmp_path / "evil.pth"
    state = {**source.state_dict(), "fc.bias": Payload(mark)}
    torch.save(state, path, _use_new_zipfile_serialization=zipped)
    refused(small(seed=1), path, "asks for the Python object posix.mkdir")
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists(), "the payload must be one that works"


@pytest.mark.fault(37)
def test_other_objects_are_refused_with_advice(source, tmp_path):
    torch.save({"model": source.state_dict(), "args": argparse.Namespace(lr=1)}, tmp_path / "a.pth")
    refused(small(), tmp_path / "a.pth", "argparse.Namespace", "save only model.state_dict()")
    torch.save(source, tmp_path / "whole.pth")
    refused(small(), tmp_path / "whole.pth", "fastres.models.resnet.ResNet", "never unpickled")


@pytest.mark.parametrize("content", [{"epoch": 3}, [1, 2], torch.ones(3), {"model": {}}])
def test_files_without_a_state_dict(tmp_path, content):
    torch.save(content, tmp_path / "none.pth")
    refused(small(), tmp_path / "none.pth", "holds no state dict")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint file at .*nowhere.pth"):
        state_dict_from_file(tmp_path / "nowhere.pth")


def test_other_number_of_classes_is_an_error_that_says_so(source, tmp_path):
    save_checkpoint(source, tmp_path / "five.safetensors")
    hint = "classifier fc has 5 classes, the model's 7; build the model with num_classes=5 or pass"
    refused(small(num_classes=7), tmp_path / "five.safetensors", hint, "(2 problems)")
    with pytest.raises(ValueError, match="must be 'error' or 'reinit', got 'skip'"):
        load_checkpoint(small(), tmp_path / "five.safetensors", num_classes_mismatch="skip")


def test_other_number_of_classes_can_be_initialised_anew(source, tmp_path):
    save_checkpoint(source, tmp_path / "five.safetensors")
    model = small(num_classes=7, seed=1)
    before = snapshot(model)
    fresh = load_checkpoint(model, tmp_path / "five.safetensors", num_classes_mismatch="reinit")
    assert fresh == ("fc.weight", "fc.bias")
    assert model.fc.weight.shape == (7, 32)
    assert not torch.equal(model.fc.weight, before["fc.weight"])
    assert model.fc.weight.abs().max() <= 32**-0.5  # the bound of nn.Linear's initial values
    body = {k: v for k, v in model.state_dict().items() if not k.startswith("fc.")}
    assert_same(body, {k: v for k, v in source.state_dict().items() if not k.startswith("fc.")})


def test_reinit_keeps_a_classifier_that_fits_and_still_checks_the_rest(source, tmp_path):
    save_checkpoint(source, tmp_path / "five.safetensors")
    model = small()
    assert (
        load_checkpoint(model, tmp_path / "five.safetensors", num_classes_mismatch="reinit") == ()
    )
    assert torch.equal(model.fc.weight, source.fc.weight)
    source.bn1.weight.data[0] = float("nan")
    save_checkpoint(source, tmp_path / "nan.safetensors")
    path = tmp_path / "nan.safetensors"
    refused(small(num_classes=7), path, "bn1.weight has 1 NaN", num_classes_mismatch="reinit")


@pytest.mark.fault(36)
def test_failure_inside_torch_restores_the_model(source, tmp_path):
    """A module that refuses half-way, after others have taken their values."""
    save_checkpoint(source, tmp_path / "w.safetensors")
    model = small(seed=1)

    def refuse_once(*_):
        handle.remove()
        raise RuntimeError("not today")

    handle = model.layer3.register_load_state_dict_pre_hook(refuse_once)
    refused(model, tmp_path / "w.safetensors", "not today")


@pytest.mark.fault(38)
def test_saving_is_whole_or_not_at_all(source, tmp_path, monkeypatch):
    path = tmp_path / "w.safetensors"
    save_checkpoint(source, path, metadata={"origin": "first"})
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~_umask()
    first = path.read_bytes()

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(small(seed=9), path)
    assert path.read_bytes() == first
    assert os.listdir(tmp_path) == [path.name]
    assert checkpoint.read_metadata(path) == {"origin": "first"}


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_saving_takes_any_layout_and_shared_storage(source, tmp_path):
    source.to(memory_format=torch.channels_last)
    source.layer1[0].bn2.weight = source.layer1[0].bn1.weight
    save_checkpoint(source, tmp_path / "w.safetensors")
    model = small(seed=1)
    load_checkpoint(model, tmp_path / "w.safetensors")
    for ours, theirs in zip(model.modules(), source.modules(), strict=True):
        if hasattr(theirs, "eps"):
            ours.eps = theirs.eps
    images = real_images(2, 16)
    # channels_last convolutions may add in another order: fp32 rounding of values below 10.
    torch.testing.assert_close(model.eval()(images), source(images), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"must end in .safetensors; got .*w.pth"):
        save_checkpoint(source, tmp_path / "w.pth")
