"""Keras models as PyTorch modules: :func:`from_keras`.

The model's graph becomes a torch.fx program that calls a module per layer. Every number comes from
the stored configuration; what would only be approximated is refused by the layer's name.
"""

from __future__ import annotations

import keyword
import operator
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import fx, nn

from ..errors import CheckpointError, FastresError
from .keras_file import KerasFile, layer_name, sublayers
from .keras_layers import (
    AUGMENTATIONS,
    LAYERS,
    MERGES,
    NO_SIDES,
    Layer,
    Pair,
    Value,
    Weights,
    filled,
)

# What a module cannot be called: Python's words, and attributes of a module or of ours.
TAKEN = {
    *keyword.kwlist,
    *dir(fx.GraphModule(nn.Module(), fx.Graph())),
    "input_size",
    "input_channels",
    "self",
}
OPERANDS = ("", "inputs", "x", "x1", "x2", "y")
MOST_CALLS = 20_000  # models in models may multiply; ResNet-152 has 500


def from_keras(path: str | os.PathLike[str], *, input_size: Pair | None = None) -> fx.GraphModule:
    """A Keras model from its ``.h5`` or ``.keras`` file, as a PyTorch module in eval mode.

    It takes (N, C, H, W) float32 images where Keras takes (N, H, W, C), and returns what Keras
    returns: probabilities if the model ends in a softmax, flattened images in the order (H, W, C),
    a dictionary by its keys; images as (N, C, H, W). Its ``input_size`` is the height and width
    that the file asks for, None where it leaves them open, ``input_channels`` its C. A layer keeps
    its name where that is free and an attribute that a module can have. Keras is not needed, h5py
    is; with Keras, ``fastres verify model.keras`` compares the two.

    Args:
        path: the file, as ``model.save`` wrote it.
        input_size: height and width, for models that leave them open but pad by them.

    Raises:
        FileNotFoundError, MissingDependencyError, CheckpointError: as :class:`KerasFile`; also for
            a configuration that no Keras would write.
        KerasImportError: a layer or an option that is not supported; the message names the layer.
    """
    builder = Builder(KerasFile(path), input_size)
    try:
        return builder.build()
    except FastresError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise CheckpointError(f"{path} does not describe a Keras model ({reason})") from error


class Builder:
    """Emits a torch.fx program, layer by layer, and keeps the modules that it calls."""

    def __init__(self, file: KerasFile, input_size: Pair | None) -> None:
        self.file = file
        self.input_size = input_size
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.input: Value | None = None
        self.size_checked = False
        self.calls = 0
        self.holders: dict[tuple[str, ...], str] = {(): ""}
        self.modules: dict[tuple[object, ...], str] = {}
        self.weights: dict[tuple[object, ...], nn.Module] = {}

    def build(self) -> fx.GraphModule:
        """The whole model."""
        config = self.file.config
        layer = Layer((), _kind(config), config["config"])
        outputs = self.model(layer, config, None)
        form = layer.config.get("output_layers") if layer.kind != "Sequential" else None
        nodes = iter([self.finished(value) for value in outputs])
        found = _in_form(form, nodes) if isinstance(form, Mapping) else list(nodes)
        self.graph.output(found[0] if isinstance(found, list) and len(found) == 1 else found)
        assert self.input is not None
        module = fx.GraphModule(self.root, self.graph, "KerasModel").eval()
        module.input_size = self.input.size  # type: ignore[assignment]
        module.input_channels = self.input.channels  # type: ignore[assignment]
        return module

    def model(
        self, layer: Layer, config: Mapping[str, Any], given: Sequence[Value] | None
    ) -> list[Value]:
        """The outputs of the model, or of a model inside it, for its inputs."""
        names = [layer_name(entry) for entry in sublayers(config)]
        if len(set(names)) < len(names):
            raise layer.refuse("has several layers of one name")
        if layer.kind == "Sequential":
            return [self._sequential(layer, config, given)]
        if layer.kind in ("Functional", "Model"):
            return self._functional(layer, given)
        raise layer.refuse("is neither Functional nor Sequential")

    def _sequential(
        self, layer: Layer, config: Mapping[str, Any], given: Sequence[Value] | None
    ) -> Value:
        value = given[0] if given else None
        for entry in sublayers(config):
            inner = _inner(layer, entry)
            if value is None:
                value = self._input(inner, layer.config)
            if inner.kind != "InputLayer":
                (value,) = self._call(inner, entry, [value])
        if value is None:
            raise layer.refuse("has no layers")
        return value

    def _functional(self, layer: Layer, given: Sequence[Value] | None) -> list[Value]:
        entries = {layer_name(entry): entry for entry in layer.config["layers"]}
        inputs = list(_leaves(layer.config["input_layers"]))
        wanted = 1 if given is None else len(given)
        if len(inputs) != wanted:
            raise layer.refuse(f"has {len(inputs)} inputs; {wanted} is supported here")
        given = given or [self._input(_inner(layer, entries[inputs[0][0]]), {})]
        values = {inputs[i][:2]: [value] for i, value in enumerate(given)}
        nodes = {
            (name, index): node
            for name, entry in entries.items()
            for index, node in enumerate(entry["inbound_nodes"])
        }
        outputs = list(_leaves(layer.config["output_layers"]))
        firsts = {n: _first_calls(_inner(layer, e), e, nodes, outputs) for n, e in entries.items()}
        waiting = {
            key: [(n, i - firsts.get(n, (0, 0))[0], output) for n, i, output in _references(node)]
            for key, node in nodes.items()
        }
        while waiting:
            ready = [k for k, given in waiting.items() if all(r[:2] in values for r in given)]
            if not ready:
                raise _inner(layer, entries[next(iter(waiting))[0]]).refuse(
                    "has an input that no layer gives"
                )
            for key in ready:
                operands = [values[name, i][output] for name, i, output in waiting.pop(key)]
                entry = entries[key[0]]
                values[key] = self._call(_inner(layer, entry), entry, operands, nodes[key])
        return [values[name, index - firsts[name][1]][output] for name, index, output in outputs]

    def _input(self, layer: Layer, enclosing: Mapping[str, Any]) -> Value:
        keys = ("batch_shape", "batch_input_shape")
        shape = next((layer.config[k] for k in keys if layer.config.get(k)), None)
        shape = shape or enclosing.get("build_input_shape")
        if shape is None or len(shape) != 4 or shape[3] is None:
            raise layer.refuse(f"must say that it takes (N, H, W, C) with C known; got {shape}")
        given = self.input_size or (None, None)
        size = tuple(given[i] if shape[1 + i] is None else shape[1 + i] for i in (0, 1))
        self.input = Value(self.graph.placeholder("x"), shape[3], size)
        return self.input

    def _call(
        self, layer: Layer, entry: Mapping[str, Any], operands: Sequence[Value], node: Any = ()
    ) -> list[Value]:
        self.calls += 1
        if self.calls > MOST_CALLS:
            raise layer.refuse(f"is called after {MOST_CALLS} other calls, more than are supported")
        if not sublayers(entry):
            _refuse_unknown(layer)
        _refuse_options(layer, node)
        if sublayers(entry):
            return self.model(layer, entry, operands)
        if layer.kind not in MERGES and len(operands) != 1:
            raise layer.refuse(f"has {len(operands)} inputs; one is supported")
        return [LAYERS[layer.kind](self, layer, operands)]

    def emit(
        self,
        layer: Layer,
        module: nn.Module,
        value: Value,
        suffix: str = "",
        *,
        weights: Weights | None = None,
        **changes: Any,
    ) -> Value:
        """Call ``module``, kept under the layer's own path, on ``value``.

        Another call of the layer gets the same module, or where it differs (in its padding) one
        with the same parameters.

        Args:
            weights: what the module has of the file, in place of tensors on the meta device.
        """
        same_weights = (*layer.path, suffix, value.interleaved)
        key = (*same_weights, repr(module))
        if key not in self.modules:
            if weights and same_weights not in self.weights:
                shapes = dict(weights.values())
                found = self.file.read(layer.path, shapes)
                values = {name: found[variable] for name, (variable, _) in weights.items()}
                self.weights[same_weights] = filled(module, values, value.interleaved)
            elif weights:
                first = self.weights[same_weights]
                for name in [*dict(first.named_parameters()), *dict(first.named_buffers())]:
                    setattr(module, name, getattr(first, name))
            holder = self._holder(layer.path[:-1])
            self.modules[key] = self._place(holder, layer.path[-1] + suffix, module)
        node = self.graph.create_node("call_module", self.modules[key], (value.node,))
        return replace(value, node=node, **{"positive": False, **changes})

    def _holder(self, path: tuple[str, ...]) -> str:
        """The place of the modules of a model inside the model."""
        if path not in self.holders:
            self.holders[path] = self._place(self._holder(path[:-1]), path[-1], nn.Module())
        return self.holders[path]

    def _place(self, holder: str, name: str, module: nn.Module) -> str:
        """Add the module under its name or, where that is taken or no name, the next free one."""
        parent = self.root.get_submodule(holder)
        base = name = _identifier(name)
        count = 0
        while name in TAKEN or name in parent._modules:
            count += 1
            name = f"{base}_{count}"
        parent.add_module(name, module)
        return f"{holder}.{name}".lstrip(".")

    def in_keras_order(self, value: Value) -> Value:
        """The value with flattened images in the order (H, W, C)."""
        if value.interleaved is None:
            return value
        node = value.node
        for method, *arguments in (
            ("unflatten", 1, (value.interleaved, -1)),
            ("transpose", 1, 2),
            ("flatten", 1),
        ):
            node = self.graph.call_method(str(method), (node, *arguments))
        return replace(value, node=node, interleaved=None)

    def padded(self, layer: Layer, value: Value) -> Value:
        """The value with its pending zeros around it."""
        if value.pending == NO_SIDES:
            return value
        module = nn.ZeroPad2d(value.pending)
        positive = value.positive
        return self.emit(layer, module, value, "_pad", pending=NO_SIDES, positive=positive)

    def finished(self, value: Value) -> fx.Node:
        """The node of an output of the model."""
        return self.in_keras_order(self.padded(Layer(("output",), "", {}), value)).node

    def known_size(self, layer: Layer, value: Value) -> Pair:
        """The size of a layer's input; images that would change it are refused from here on."""
        height, width = value.size
        if height is None or width is None:
            raise layer.refuse(
                "pads by the size of its input, which the model leaves open: give input_size=(H, W)"
            )
        if not self.size_checked:
            assert self.input is not None
            shape = self.graph.call_function(getattr, (self.input.node, "shape"))
            size = self.graph.call_function(operator.getitem, (shape, slice(2, None)))
            same = self.graph.call_function(operator.eq, (size, self.input.size))
            text = f"the model's padding is for images of {self.input.size} pixels"
            self.graph.call_function(torch._assert, (same, text))
            self.size_checked = True
        return height, width


def _inner(layer: Layer, entry: Mapping[str, Any]) -> Layer:
    config = entry["config"] if isinstance(entry["config"], Mapping) else entry
    return Layer((*layer.path, layer_name(entry)), _kind(entry), config)


def _kind(entry: Mapping[str, Any]) -> str:
    """See :class:`Layer`: what a class is called does not say whose it is."""
    kind, module = str(entry["class_name"]), str(entry.get("module") or "keras.layers")
    if kind == "TFOpLambda":
        return f"tf.{entry['config']['function']}"
    registered = str(entry.get("registered_name") or kind)
    if module.partition(".")[0] not in ("keras", "tf_keras", "tensorflow") or ">" in registered:
        return f"{module}.{kind}"
    return f"ops.{kind}" if module.startswith(("keras.src.ops", "keras.ops")) else kind


def _identifier(name: str) -> str:
    name = re.sub(r"\W", "_", name)
    return name if name.isidentifier() else f"_{name}"


class Reference(NamedTuple):
    """A tensor of the configuration: which output of which call of a layer."""

    layer: str
    call: int
    output: int


def _arguments(node: Any) -> Iterator[tuple[str, Any]]:
    """(keyword or "", :class:`Reference` or constant) of a call, in the notation of any Keras."""
    if isinstance(node, Mapping):
        yield from (("", leaf) for leaf in _leaves(node["args"]))
        yield from ((k, leaf) for k, v in node["kwargs"].items() for leaf in _leaves(v))
        return
    for name, call, output, *more in [node] if node and isinstance(node[0], str) else node:
        yield "", output if name == "_CONSTANT_VALUE" else Reference(name, call, output)
        yield from ((k, leaf) for m in more for k, v in m.items() for leaf in _leaves(v))


def _leaves(value: Any) -> Iterator[Any]:
    """References and constants in a structure; of a dictionary in the order of its keys, as Keras
    flattens it."""
    if isinstance(value, Mapping):
        if value.get("class_name") == "__keras_tensor__":
            yield Reference(*value["config"]["keras_history"])
        elif value.get("class_name") == "__tuple__":
            yield from _leaves(value["config"])
        else:
            for key in sorted(value):
                yield from _leaves(value[key])
    elif isinstance(value, (list, tuple)):
        if len(value) == 3 and [type(v) for v in value] == [str, int, int]:
            yield Reference(*value)
        else:
            for inner in value:
                yield from _leaves(inner)
    else:
        yield value


def _references(node: Any) -> list[Reference]:
    return [leaf for _, leaf in _arguments(node) if isinstance(leaf, Reference)]


def _in_form(form: Any, nodes: Iterator[fx.Node]) -> Any:
    """The outputs as the model returns them: one, a list, or a dictionary."""
    if isinstance(form, Mapping):
        return {key: _in_form(form[key], nodes) for key in sorted(form)}
    if isinstance(form[0], str):
        return next(nodes)
    return [_in_form(part, nodes) for part in form]


def _first_calls(
    layer: Layer,
    entry: Mapping[str, Any],
    nodes: Mapping[tuple[str, int], Any],
    outputs: Sequence[Reference],
) -> tuple[int, int]:
    """The number of a layer's first call, as inbound nodes and as the model's outputs give it.

    A model is born with a call of its own. tf.keras 2 counts it everywhere, except of Sequential
    models that got their input late; Keras 3 counts it in the outputs only, and of no Sequential.
    Each call is used by something, so that the numbers in use tell which it was.
    """
    if not sublayers(entry):
        return 0, 0
    here = layer.path[-1]
    inside = {c for n in nodes.values() for name, c, _ in _references(n) if name == here}
    outside = {call for name, call, _ in outputs if name == here}
    calls = set(range(len(entry["inbound_nodes"])))
    if any(isinstance(node, Mapping) for node in entry["inbound_nodes"]):
        choices = [(0, 0) if layer.kind == "Sequential" else (0, 1)]
    else:
        choices = [(1, 1), (0, 0)]
    for a, b in choices:
        if {call - a for call in inside} | {call - b for call in outside} == calls:
            return a, b
    raise layer.refuse(f"has {len(calls)} calls, not those that others refer to")


def _refuse_unknown(layer: Layer) -> None:
    if layer.kind not in LAYERS:
        why = f"is not supported; these are: {', '.join(sorted(LAYERS))}"
        if layer.kind.startswith(AUGMENTATIONS):
            why = "draws at random in training and is not supported: save a model without it"
        raise layer.refuse(why)
    if layer.config.get("data_format") not in (None, "channels_last"):
        raise layer.refuse("has data_format='channels_first'; 'channels_last' is supported")


def _refuse_options(layer: Layer, node: Any) -> None:
    """Calls with more than tensors; with ``training=True`` a norm is of the batch, for one."""
    for name, leaf in _arguments(node):
        tensor = isinstance(leaf, Reference) and name in OPERANDS
        if not (tensor or leaf is None or leaf is False or name == "name"):
            what = f"{name}={leaf}" if name else f"the constant {leaf!r}"
            raise layer.refuse(f"is called with {what}")
    inputs = layer.config.get("input_layers")
    given = node["args"] if isinstance(node, Mapping) else ()
    named = any(isinstance(g, Mapping) and "class_name" not in g for g in given)
    if named and not isinstance(inputs, Mapping):
        raise layer.refuse("is called with a dictionary; a list is supported")
