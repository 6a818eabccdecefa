"""Rows 64, 69, 74 and 75 for fused files: text in a file never runs, and sizes never take memory.

Every string of the format becomes a payload that makes a folder, one place after another, and all
places of a string at once. What still loads is used in every way.
"""

import copy
import json
import pickle
import resource
import struct
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from helpers import adversarial_, real_images
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

import fastres
from fastres import cli
from fastres.errors import CheckpointError
from fastres.graph import ir

MARK = "pwned"
# Without a dot, at which paths are split, and once with each kind of quotation mark.
BOOM = f"getattr(__import__('os'),'mkdir')('{MARK}')"
DOUBLE = BOOM.replace("'", '"')
PAYLOADS = {
    "default": "{}=" + BOOM,
    "keyword": "{}=" + BOOM + ",z",
    "statement": "{}\n    " + BOOM + "\n    z",
    "one line": "{};" + BOOM + ";z",
    "string": '{}"),' + DOUBLE + ',("',
    "comment": "{}=0);" + BOOM + "#",
    "dotted": "os.system",
    "dunder": "__class__.__init__.__globals__",
    "braces": "{{" + BOOM + "}}",
    "bare": BOOM,
}


class Doors(nn.Module):
    """Each thing that a file names: values, arguments, keywords, modules, tensors, functions."""

    def __init__(self):
        super().__init__()
        self.word, self.sizes = "a word", {"a key": (8, 8)}
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.late, self.group = nn.BatchNorm2d(8), nn.GroupNorm(2, 8)
        self.up = nn.Upsample(scale_factor=2.0, mode="bilinear", align_corners=False)
        self.gamma = nn.Parameter(torch.rand(8, 1, 1))
        self.head = nn.Linear(8, 5)

    def forward(self, image, gain=0.5):
        x = F.relu(self.norm(self.conv(image)))
        x = self.group(self.late(x * gain)) * self.gamma
        x = F.interpolate(self.up(x), scale_factor=0.5, mode="bilinear", align_corners=False)
        logits = self.head(x.float().mean((2, 3)).clamp(min=-9.0))
        return OrderedDict(logits=logits, size=x.shape[2])


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """The bytes of a sound file."""
    path = tmp_path_factory.mktemp("good") / "good.safetensors"
    fastres.save(fastres.optimize(adversarial_(Doors()), example_input=real_images(2, 8)), path)
    return path.read_bytes()


def read(data):
    """The header, the description in it, and the tensors' bytes."""
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    return header, json.loads(header["__metadata__"]["fastres"]), data[8 + size :]


def written(path, header, description, tensors):
    header = {**header, "__metadata__": {"fastres": json.dumps(description)}}
    text = json.dumps(header).encode()
    path.unlink(missing_ok=True)  # ext4 waits for the disk where a file is truncated
    path.write_bytes(struct.pack("<Q", len(text)) + text + tensors)
    return path


def places(value, path=()):
    """The places of all strings in a JSON value; a key's ends in None."""
    if isinstance(value, str):
        yield path
    elif isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key, None)
            yield from places(item, (*path, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from places(item, (*path, index))


def at(value, path, new):
    """A copy of a JSON value with another string at a place."""
    if not path:
        return new
    head, *rest = path
    if rest == [None]:
        return {new if key == head else key: item for key, item in value.items()}
    if isinstance(value, dict):
        return {k: at(item, rest, new) if k == head else item for k, item in value.items()}
    return [at(item, rest, new) if i == head else item for i, item in enumerate(value)]


def everywhere(value, renamed, keys=True):
    """A copy of a JSON value whose strings are replaced by this dictionary."""
    if isinstance(value, dict):
        pairs = ((renamed.get(k, k) if keys else k, item) for k, item in value.items())
        return {key: everywhere(item, renamed, keys) for key, item in pairs}
    if isinstance(value, list):
        return [everywhere(item, renamed, keys) for item in value]
    return renamed.get(value, value) if isinstance(value, str) else value


def tensors_renamed(header, renamed):
    """The header with other paths in the names of the tensors that were kept."""
    found = {}
    for name, entry in header.items():
        path = name.removeprefix("kept.")
        for old, new in renamed.items():
            if path == old or path.startswith(f"{old}."):
                path = new + path[len(old) :]
        found[f"kept.{path}" if name.startswith("kept.") else name] = entry
    return found


def strings(value):
    """All strings in a JSON value, keys too."""
    if isinstance(value, str):
        return {value}
    if isinstance(value, dict):
        return set(value).union(*map(strings, value.values()))
    return set().union(*map(strings, value)) if isinstance(value, list) else set()


@pytest.fixture
def unharmed(tmp_path, monkeypatch):
    """A folder of its own; afterwards nothing has run."""
    monkeypatch.chdir(tmp_path)
    ran = []
    for target in ("os.system", "os.popen", "subprocess.Popen"):
        monkeypatch.setattr(target, lambda *a, **k: ran.append(a))
    yield tmp_path
    assert not ran
    assert not (tmp_path / MARK).exists()


def loaded(path):
    """The model of a file, or None where it is refused, in one line of its own kind."""
    try:
        return fastres.load(path)
    except CheckpointError as error:
        said = str(error)
    assert str(path) in said
    assert len(said) < 1000
    return None


def logits(output):
    """The first value of a dictionary, whatever its key is."""
    return next(iter(output.values()))


def use(model, images):
    """Everything that is cheap; whatever is in the labels, the answers are the same."""
    wanted = logits(model(images))
    assert wanted.shape == (2, 5)
    assert str(model.plan())
    assert json.dumps(model.plan().to_dict())
    assert repr(model)
    for suffix in ("svg", "dot"):
        fastres.plot_model(model, f"model.{suffix}", input_size=(1, 3, 8, 8))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(logits(twin(images, 0.5)), wanted, rtol=0, atol=0)
        twin.load_state_dict(model.state_dict())
    mapped = torch.vmap(lambda x: logits(model(x[None])))(images)
    torch.testing.assert_close(mapped.flatten(0, 1), wanted, rtol=1e-4, atol=1e-4)
    fastres.save(model, "again.safetensors")
    again = fastres.load("again.safetensors")
    torch.testing.assert_close(logits(again(images)), wanted, rtol=0, atol=0)
    return wanted


@pytest.mark.sample(2)
@pytest.mark.fault(64)
@pytest.mark.parametrize("form", PAYLOADS)
def test_a_payload_in_every_string_alone_does_not_run(form, good, unharmed):
    header, description, tensors = read(good)
    images, count = real_images(2, 8), 0
    for place in places(description):
        old = place[-2] if place[-1] is None else ""
        forged = at(description, place, PAYLOADS[form].format(old))
        model = loaded(written(unharmed / "forged.safetensors", header, forged, tensors))
        count += 1
        if model is not None and place[-1] is not None:
            given = {"args", "kwargs"} & {*place}
            with suppress(*([RuntimeError] if given else [])):  # such as an unknown mode
                use(model, images) if form == "string" else model(images)
        assert not (unharmed / MARK).exists(), place
    assert count > 400


@pytest.mark.sample(2)
@pytest.mark.fault(64)
@pytest.mark.parametrize("form", PAYLOADS)
def test_a_payload_in_all_places_of_a_string_does_not_run(form, good, unharmed):
    """So that it is consistent: a value and all that read it, a module and its tensors."""
    header, description, tensors = read(good)
    images = real_images(2, 8)
    path = unharmed / "forged.safetensors"
    sound = loaded(written(path, header, description, tensors))
    wanted = use(sound, images)
    harmless = {}
    for old in sorted(strings(description)):
        renamed = {old: PAYLOADS[form].format(old)}
        forged = everywhere(description, renamed)
        model = loaded(written(path, tensors_renamed(header, renamed), forged, tensors))
        if model is not None:
            torch.testing.assert_close(use(model, images), wanted, rtol=0, atol=0)
            harmless |= renamed
        assert not (unharmed / MARK).exists(), old
    if "\n" not in PAYLOADS[form]:
        assert {"conv", "group", "gamma", "late.weight", "a word"} <= {*harmless}
    assert not {"image", "gain", "scale_factor", "call_method"} & {*harmless}


@pytest.fixture
def labelled(good, tmp_path):
    """A file that loads, whose labels are all payloads at once."""
    header, description, tensors = read(good)
    names = {s["name"] for s in description["plan"]["steps"]}
    labels = names | {s["where"] for s in description["plan"]["steps"]} - {""}
    labels |= {*description["modules"], "gamma", *(f"late.{n}" for n in ("weight", "bias"))}
    labels |= {"late.running_mean", "late.running_var", "a word", "a key", "logits"}
    # A keyword's name, a mode and the like must stay themselves; "late" is no path of a tensor.
    renamed = {o: PAYLOADS["string"].format(o) for o in labels - {"mean", "clamp", "float", "late"}}
    forged = everywhere(description, renamed, keys=False)
    forged["modules"] = {renamed[path]: spec for path, spec in description["modules"].items()}
    return written(
        tmp_path / "labels.safetensors", tensors_renamed(header, renamed), forged, tensors
    )


@pytest.mark.fault(64)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("door", ["aot_eager", "fastres", ".pt2", "jit", "fx"])
def test_labels_that_are_payloads_pass_every_compiler(door, labelled, good, unharmed):
    (unharmed / "good.safetensors").write_bytes(good)
    images = real_images(2, 8)
    wanted = logits(fastres.load("good.safetensors")(images))
    model = fastres.load(labelled)
    use(model, images)
    if door == ".pt2":
        program = torch.export.export(model, (images,))
        torch.export.save(program, "model.pt2")
        found = logits(torch.export.load("model.pt2").module()(images))
        assert str(program)
    elif door == "jit":
        found = torch.jit.trace(lambda x: logits(model(x)), images)(images)
    elif door == "fx":
        found = logits(make_fx(model)(images)(images))
    else:
        found = logits(torch.compile(model, backend=door)(images))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.fault(64)
@pytest.mark.parametrize(
    "command",
    [
        *("plot FILE m.svg --size 8", "plot FILE m.dot", "convert FILE copy.safetensors"),
        *("plan FILE", "verify FILE", "classify a.jpg --model FILE", "summary FILE"),
        *("convert FILE copy.safetensors --json", "export FILE m.pt2 --size 8"),
    ],
)
def test_on_the_command_line(command, labelled, unharmed, capsys):
    for path in (labelled, unharmed / f"{BOOM}.safetensors"):
        code = cli.run([str(path) if word == "FILE" else word for word in command.split()])
        said = capsys.readouterr().err.strip()
        assert code == 2 or (code == 0 and path == labelled)
        assert said.startswith("error: ") == (code == 2)
        assert "\n" not in said


def of_parameter(description):
    """A parameter's name with a default: what ran as soon as the file was loaded."""
    evil = f"image={BOOM}"
    return everywhere(description, {"image": evil}), {}


def of_keyword(description):
    """A keyword's name: what ran at the first export."""
    return everywhere(description, {"scale_factor": f"scale_factor=0.5,z={BOOM}"}), {}


def of_module(description):
    """A module's path: what ran at the first export."""
    evil = {"group": f'group"),{DOUBLE},("'}
    return everywhere(description, evil), evil


@pytest.mark.fault(64)
@pytest.mark.parametrize("door", [of_parameter, of_keyword, of_module])
def test_each_known_door_is_shut(door, good, unharmed):
    header, description, tensors = read(good)
    forged, renamed = door(description)
    path = unharmed / "evil.safetensors"
    model = loaded(written(path, tensors_renamed(header, renamed), forged, tensors))
    assert (model is None) == (door is not of_module)
    if model is not None:
        torch.export.export(model, (real_images(2, 8),)).module()
        torch.vmap(lambda x: model(x[None])["logits"])(real_images(2, 8))


@pytest.mark.fault(64)
def test_only_values_of_steps_are_called_and_only_listed_words_looked_up(good, unharmed):
    header, description, tensors = read(good)
    path = unharmed / "forged.safetensors"
    for step in description["plan"]["steps"]:
        fields = step["fields"]
        for key, new in (
            ("target", "__reduce__"),
            ("target", "__class__"),
            ("target", "format"),
            ("target", "builtins.eval"),
            ("target", "torch.hub.load"),
            ("target", "operator.attrgetter"),
            ("args", {"tuple": [step["inputs"][0] if step["inputs"] else "", "__class__"]}),
            ("kind", "placeholder"),
            ("kind", "output"),
        ):
            if step["kind"] != "Call" or fields["kind"] in ("get_attr", "call_module"):
                continue
            forged = copy.deepcopy(description)
            index = description["plan"]["steps"].index(step)
            forged["plan"]["steps"][index]["fields"][key] = new
            assert loaded(written(path, header, forged, tensors)) is None


@pytest.mark.fault(64)
def test_a_file_cannot_make_a_step_overwrite_its_input(good, unharmed):
    """What is overwritten and freed is decided anew, whatever the file says."""
    header, description, tensors = read(good)
    for step in description["plan"]["steps"]:
        step["in_place"], step["frees"] = True, ["image"]
    model = loaded(written(unharmed / "forged.safetensors", header, description, tensors))
    images = real_images(2, 8)
    before = images.clone()
    model(images)
    assert torch.equal(images, before)
    (unharmed / "good.safetensors").write_bytes(good)
    assert model.traced == fastres.load("good.safetensors").traced


@pytest.mark.fault(64)
def test_views_that_are_written_into_come_back(tmp_path):
    """Values that must stay in the source's memory order stay so in a file, too."""

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            y = self.conv(x)
            y.view(y.shape[0], -1).mul_(2)
            return y

    fast = fastres.optimize(adversarial_(Views()), example_input=real_images(2, 8))
    assert fast.traced.source_layout
    fastres.save(fast, tmp_path / "views.safetensors")
    again = fastres.load(tmp_path / "views.safetensors")
    assert again.traced == fast.traced
    assert torch.equal(again(real_images(2, 8)), fast(real_images(2, 8)))


@pytest.mark.fault(64)
def test_files_saved_before_are_read():
    """Written by the release before the reader became strict, with its own answers beside."""
    path = Path(__file__).parent / "old_files" / "format1.safetensors"
    model = fastres.load(path)
    found = model(torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8))
    wanted = torch.tensor(json.loads(path.with_name("format1.json").read_text()))
    torch.testing.assert_close(found["logits"], wanted, rtol=1e-5, atol=1e-5)
    steps = [s.op for s in model.traced.steps if isinstance(s.op, ir.Call)]
    assert {"up", "group", "scale"} <= {op.target for op in steps}


WORDS = ["in", "class", "for", "None", "lambda", "is", "größe", "my-layer", 'a"b', "two words", "1"]


class Named(nn.Module):
    """Layers, a norm and a parameter by any name; arguments by names of our own, too."""

    def __init__(self, name):
        super().__init__()
        self.conv, self.name = nn.Conv2d(3, 8, 3), name
        for index, layer in enumerate((nn.Hardswish(), nn.BatchNorm2d(8), nn.GroupNorm(2, 8))):
            self.add_module(f"{name}{index or ''}", layer)
        self.register_parameter(f"{name}9", nn.Parameter(torch.rand(8, 1, 1)))

    def forward(self, x, ops=1.0, self_=0.0, a0=2.0, kept=0.5):
        x = self.conv(x)
        for index in ("", 1, 2):
            x = getattr(self, f"{self.name}{index}")(x)
        return x * getattr(self, f"{self.name}9") * ops + self_ + a0 * kept


@pytest.mark.fault(75)
@pytest.mark.parametrize("word", WORDS)
def test_modules_and_parameters_named_by_any_word(word, tmp_path):
    source, x = adversarial_(Named(word)), real_images(2, 8)
    wanted = copy.deepcopy(source).double()(x.double(), ops=2.0, kept=3.0).float()
    fast = fastres.optimize(source, example_input=x)
    fastres.save(fast, tmp_path / "m.safetensors")
    for model in (fast, fastres.load(tmp_path / "m.safetensors"), copy.deepcopy(fast)):
        torch.testing.assert_close(model(x, ops=2.0, kept=3.0), wanted, rtol=1e-4, atol=1e-4)
        mapped = torch.vmap(lambda v, m=model: m(v[None], 2.0, kept=3.0)[0])(x)
        torch.testing.assert_close(mapped, wanted, rtol=1e-4, atol=1e-4)
        assert word in str(model.plan())


@pytest.mark.fault(75)
@pytest.mark.parametrize("word", ["in", "None", 'a"b'])
def test_compiled_and_exported(word):
    source, x = adversarial_(Named(word)), real_images(2, 8)
    wanted = copy.deepcopy(source).double()(x.double(), a0=3.0).float()
    fast = fastres.optimize(source, example_input=x)
    compiled = torch.compile(fast, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, a0=3.0), wanted, rtol=1e-4, atol=1e-4)
    program = torch.export.export(fast, (x,), {"a0": 3.0})
    torch.testing.assert_close(program.module()(x, a0=3.0), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.fault(75)
def test_keywords_named_by_pythons_words():
    """A function of the user's own that is left to PyTorch."""

    class Asked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return scaled(self.conv(x), **{"lambda": 2.0, "class": 3.0})

    source, x = adversarial_(Asked()), real_images(2, 8)
    fast = fastres.optimize(source, example_input=x)
    wanted = source(x)
    torch.testing.assert_close(torch.vmap(lambda v: fast(v[None])[0])(x), wanted)
    torch.testing.assert_close(torch.compile(fast, backend="aot_eager")(x), wanted)


def scaled(x, **words):
    return x * words["lambda"] + words["class"]


torch.fx.wrap("scaled")


def bomb(description, layer, arguments):
    """A layer that says it is large, while the file holds next to nothing."""
    step = next(s for s in description["plan"]["steps"] if s["where"] == "group")
    description["modules"]["group"] = {"type": layer, "arguments": arguments}
    step["fields"]["reason"] = f"{layer} is not fused"
    return description


def size(**fields):
    def change(description):
        step = next(s for s in description["plan"]["steps"] if s["where"] == "conv")
        step["fields"].update(fields)
        return description

    return change


BOMBS = {
    "linear": lambda d: bomb(d, "Linear", {"in_features": 40_000, "out_features": 40_000}),
    "linear, past any memory": lambda d: bomb(
        d, "Linear", {"in_features": 2**31, "out_features": 2**31}
    ),
    "conv": lambda d: bomb(
        d, "Conv2d", {"in_channels": 9000, "out_channels": 9000, "kernel_size": 5}
    ),
    "transposed": lambda d: bomb(
        d, "ConvTranspose2d", {"in_channels": 9000, "out_channels": 9000, "kernel_size": 5}
    ),
    "norm": lambda d: bomb(d, "BatchNorm2d", {"num_features": 2**30}),
    "layer norm": lambda d: bomb(d, "LayerNorm", {"normalized_shape": {"tuple": [2**15, 2**15]}}),
    "group norm": lambda d: bomb(d, "GroupNorm", {"num_groups": 1, "num_channels": 2**30}),
    "prelu": lambda d: bomb(d, "PReLU", {"num_parameters": 2**30}),
    "fused conv": size(in_channels=2**30, out_channels=2**30),
    "fused window": size(kernel={"tuple": [2**15, 2**15]}),
    "groups": size(groups=2**30, in_channels=2**30, out_channels=2**30),
    "elsewhere": lambda d: bomb(
        d, "Linear", {"in_features": 40_000, "out_features": 40_000, "device": "cpu"}
    ),
}


@pytest.mark.fault(69)
@pytest.mark.parametrize("name", BOMBS)
def test_declared_sizes_take_no_memory(name, good, unharmed):
    header, description, tensors = read(good)
    path = written(unharmed / "bomb.safetensors", header, BOMBS[name](description), tensors)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert loaded(path) is None
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < 200_000  # kB; the least of these bombs takes gigabytes


@pytest.mark.fault(74)
@pytest.mark.parametrize(
    "said", ['{"a":' * 10**5, "[" * 10**5, "[" * 3000 + "]" * 3000, "7", "null"]
)
def test_json_that_is_deep_or_no_description(said, good, unharmed):
    header, _, tensors = read(good)
    header["__metadata__"] = {"fastres": said}
    text = json.dumps(header).encode()
    (unharmed / "deep.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + tensors)
    assert loaded(unharmed / "deep.safetensors") is None


@pytest.mark.fault(74)
@pytest.mark.parametrize("kind", ["list", "dict", "tuple", "slice"])
@pytest.mark.parametrize("place", ["output", "dtype", "described"])
def test_values_that_are_deep(kind, place, good, unharmed):
    header, description, tensors = read(good)
    value = {"ref": "image"}
    for _ in range(300):
        wrapped = {"tuple": [value], "slice": [value, 1, 2], "dict": [["a", value]]}
        value = [value] if kind == "list" else {kind: wrapped[kind]}
    (description["plan"] if place == "output" else description)[place] = value
    assert loaded(written(unharmed / "deep.safetensors", header, description, tensors)) is None


JUNK = [None, True, -1, 2**70, 1.5, "text", [], [[]], {}, {"a": 1}, {"tuple": 1}, {"ref": 1}]


def inner(value, path=()):
    """The place of everything in a JSON value."""
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield (*path, key)
            yield from inner(item, (*path, key))


@pytest.mark.fault(74)
@pytest.mark.slow
@pytest.mark.parametrize("junk", JUNK, ids=repr)
def test_any_other_type_at_any_place(junk, good, unharmed):
    """Refused in one line, or a model that runs, or that PyTorch refuses to run."""
    header, description, tensors = read(good)
    for place in inner(description):
        path = written(unharmed / "odd.safetensors", header, at(description, place, junk), tensors)
        model = loaded(path)
        if model is not None:
            try:
                model(real_images(2, 8))
            except (RuntimeError, TypeError, ValueError):
                continue


def objects(value, path=()):
    """The place of every JSON object."""
    if isinstance(value, dict):
        yield path
    if isinstance(value, (dict, list)):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from objects(item, (*path, key))


@pytest.mark.fault(64)
def test_members_that_nobody_knows_are_refused(good, unharmed):
    header, description, tensors = read(good)
    for place in objects(description):
        holder = description
        for key in place:
            holder = holder[key]
        forged = at(description, place, {**holder, "extra": 1})
        path = written(unharmed / "extra.safetensors", header, forged, tensors)
        assert loaded(path) is None, place


@pytest.mark.fault(64)
@pytest.mark.parametrize("word", ["class", "None", "lambda"])
def test_an_argument_by_position_is_no_word_of_python_either(word, good, unharmed):
    header, description, tensors = read(good)
    forged = everywhere(description, {"image": word})
    forged["signature"][0]["kind"] = 0
    assert loaded(written(unharmed / "word.safetensors", header, forged, tensors)) is None
