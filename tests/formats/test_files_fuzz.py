"""Row 37: whatever a file of weights holds, it is read right or refused whole; nothing in it runs.

Each example starts from a good file and damages it: cut, bytes changed, headers that lie, names
that point elsewhere, pickles that ask for code.
"""

import io
import json
import os
import pickle
import struct
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

pytest.importorskip("hypothesis")

from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from fastres.errors import CheckpointError
from fastres.models.checkpoint import load_checkpoint, read_metadata, state_dict_from_file
from fastres.models.pretrained import load_network

SIZES = {"weight": (4, 3), "bias": (4,)}


def good() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {k: torch.randn(size, generator=generator) for k, size in SIZES.items()}


def model() -> nn.Linear:
    net = nn.Linear(3, 4)
    net.load_state_dict({k: -v for k, v in good().items()})
    return net


def pickled(content, zipped=True) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


SAFE = save(good(), {"origin": "a test"})
FILES = {".safetensors": SAFE, ".pth": pickled(good()), ".tar": pickled(good(), zipped=False)}


def load(data: bytes, suffix: str) -> dict[str, torch.Tensor] | None:
    """What ``data`` gave the model; None where it was refused, in one line, all or nothing."""
    net = model()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"weights{suffix}")
        path.write_bytes(data)
        try:
            load_checkpoint(net, path)
        except CheckpointError as error:
            head = str(error).splitlines()[0]
            assert str(path) in head
            assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
            return None
        finally:
            assert os.listdir(folder) == [path.name]
    return net.state_dict()


def check(data: bytes, suffix: str) -> None:
    """Refused, or finite tensors of the model's own sizes."""
    loaded = load(data, suffix)
    if loaded is not None:
        assert {k: tuple(v.shape) for k, v in loaded.items()} == SIZES
        assert all(bool(v.isfinite().all()) for v in loaded.values())


@pytest.mark.fault(37)
@pytest.mark.parametrize("suffix", FILES)
def test_good_files_load(suffix):
    loaded = load(FILES[suffix], suffix)
    assert all(torch.equal(loaded[k], v) for k, v in good().items())


damage = st.fixed_dictionaries(
    {
        "suffix": st.sampled_from(list(FILES)),
        "changes": st.lists(st.lists(st.integers(0, 2**16), min_size=2, max_size=2), max_size=8),
        "share": st.floats(0, 1),
    }
)


def check_damage(case: dict) -> None:
    """A good file with some bytes changed, whole and cut."""
    data = bytearray(FILES[case["suffix"]])
    for position, value in case["changes"]:
        data[position % len(data)] = value % 256
    check(bytes(data[: round(case["share"] * len(data))]), case["suffix"])
    check(bytes(data), case["suffix"])


@pytest.mark.fault(37)
@settings(max_examples=200)
@given(damage)
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damaged_files_are_read_or_refused(case):
    check_damage(case)


@pytest.mark.fault(37)
@settings(max_examples=100)
@given(suffix=st.sampled_from(list(FILES)), data=st.binary(max_size=200))
def test_any_bytes_are_refused(suffix, data):
    assert load(data, suffix) is None


def safetensors_file(header, payload: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + payload


ENTRY = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
numbers = st.one_of(st.integers(-(2**65), 2**65), st.floats(allow_nan=False), st.none(), st.text())
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "X", ""]),
        "shape": st.lists(st.one_of(st.integers(0, 8), numbers), max_size=5),
        "data_offsets": st.lists(st.one_of(st.integers(0, 64), numbers), max_size=3),
    }
)


@pytest.mark.fault(37)
@settings(max_examples=150)
@given(
    header=st.dictionaries(st.sampled_from(["weight", "bias", "__metadata__"]), entries),
    payload=st.integers(0, 80),
    length=st.one_of(st.none(), st.integers(0, 2**64 - 1)),
)
@example(header={"bias": ENTRY}, payload=16, length=2**63)
@example(header={"bias": ENTRY}, payload=16, length=10**8)
@example(header={"bias": {**ENTRY, "shape": [2**31, 2**31, 2**31]}}, payload=16, length=None)
@example(header={"bias": ENTRY, "weight": ENTRY}, payload=16, length=None)
def test_headers_that_lie(header, payload, length):
    """Lengths beyond the file, offsets that overlap or point outside, sizes past any memory."""
    check(safetensors_file(header, bytes(range(payload)), length), ".safetensors")


@pytest.mark.fault(37)
@pytest.mark.parametrize(
    "data",
    [
        safetensors_file(b"{" * 10_000),
        safetensors_file(b'{"bias":' * 10_000),
        safetensors_file(b"\xff\xfe{}"),
        safetensors_file(b'{"bias": %s, "bias": %s}' % ((json.dumps(ENTRY).encode(),) * 2)),
        safetensors_file({"__metadata__": {"a": 1}}),
        b"\x00" * 7,
    ],
    ids=["deep", "deeper", "not text", "a name twice", "metadata of numbers", "no header"],
)
def test_headers_that_are_no_headers(data, tmp_path):
    assert load(data, ".safetensors") is None
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="truncated or not a checkpoint"):
        read_metadata(path)


class Calls:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


def payloads(mark: str):
    """Ways of making a file or folder named ``mark`` while unpickling."""
    write = f"open({mark!r}, 'w').close()"
    return {
        "os.mkdir": Calls(os.mkdir, mark),
        "os.system": Calls(os.system, f"mkdir {mark}"),
        "exec": Calls(exec, write),
        "eval": Calls(eval, f"__import__('os').mkdir({mark!r})"),
        "open": Calls(open, mark, "w"),
        "a method": Calls(Path(mark).mkdir),
        "torch.save": Calls(torch.save, {}, mark),
        "inside a list": [1, {"a": (Calls(os.mkdir, mark),)}],
    }


@pytest.mark.fault(37)
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", payloads("x"))
def test_a_payload_does_not_run(name, zipped, tmp_path):
    mark = tmp_path / "ran"
    data = pickled({**good(), "extra": payloads(str(mark))[name]}, zipped)
    for suffix in (".pth", ".tar", ".bin", ".safetensors"):
        assert load(data, suffix) is None
        path = tmp_path / f"weights{suffix}"
        path.write_bytes(data)
        with pytest.raises(CheckpointError):
            load_network("resnet18", checkpoint=path)
    assert not mark.exists()
    torch.load(io.BytesIO(data), weights_only=False)
    assert mark.exists(), "the payload must be one that works"


@pytest.mark.fault(37)
@settings(max_examples=100)
@given(
    module=st.sampled_from(["os", "posix", "builtins", "subprocess", "shutil", "torch", "nt.."]),
    name=st.sampled_from(["system", "exec", "Popen", "rmtree", "save", "load", "_utils.x", ""]),
    protocol=st.sampled_from(["GLOBAL", "STACK_GLOBAL", "INST"]),
    argument=st.text(max_size=5),
)
def test_hand_made_pickles_are_refused(module, name, protocol, argument):
    """Opcodes that no pickler would write in this order, in a file that is otherwise a zip."""
    if protocol == "GLOBAL":
        code = f"c{module}\n{name}\n".encode()
    elif protocol == "INST":
        code = b"(" + pickle.dumps(argument, 0)[:-1] + f"i{module}\n{name}\n".encode()
    else:
        code = b"".join(b"\x8c" + bytes([len(s)]) + s.encode() for s in (module, name)) + b"\x93"
    call = code + b"(" + pickle.dumps(argument, 0)[:-1] + b"tR."
    assert load(rezipped({"data.pkl": b"\x80\x02" + call}), ".pth") is None


def rezipped(changed: dict[str, bytes], renamed: dict[str, str] | None = None) -> bytes:
    """The good zip with other content or names of its members."""
    renamed = renamed or {}
    buffer = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(FILES[".pth"])) as source,
        zipfile.ZipFile(buffer, "w") as target,
    ):
        for member in source.namelist():
            folder, _, short = member.partition("/")
            data = changed.pop(short, None)
            name = renamed.get(short, f"{folder}/{short}")
            target.writestr(name, source.read(member) if data is None else data)
        for name, data in changed.items():
            target.writestr(name, data)
    return buffer.getvalue()


@pytest.mark.fault(37)
@pytest.mark.parametrize("name", ["../evil", "../../evil", "{}/evil", "a/../../evil", "C:\\evil"])
@pytest.mark.parametrize("how", ["added", "renamed"])
def test_names_that_point_elsewhere_write_nothing(name, how, tmp_path, monkeypatch):
    """Neither above the file, nor above the working directory, nor at an absolute path."""
    folders = work, temporary = tmp_path / "work" / "a", tmp_path / "temporary" / "a"
    for folder in folders:
        folder.mkdir(parents=True)
    monkeypatch.chdir(work)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))  # where ``load`` puts the file
    before, name = sorted(tmp_path.rglob("*")), name.format(tmp_path)
    if how == "added":
        check(rezipped({name: b"evil"}), ".pth")
    else:
        check(rezipped({}, {"data/0": name}), ".pth")
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.fault(37)
@pytest.mark.parametrize("size", [0, 1, 15, 17, 4096])
def test_storages_of_another_size_are_refused(size):
    assert load(rezipped({"data/1": bytes(size)}), ".pth") is None


@pytest.mark.fault(37)
def test_a_symlink_loop_or_a_folder_is_no_checkpoint(tmp_path):
    loop = tmp_path / "loop.pth"
    loop.symlink_to(loop)
    for path in (loop, tmp_path):
        with pytest.raises(OSError, match="no checkpoint file|symbolic links"):
            state_dict_from_file(path)
