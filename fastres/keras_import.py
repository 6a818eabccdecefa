"""Keras models as PyTorch modules: :func:`from_keras`.

The model's graph becomes a torch.fx program that calls a module per layer. Every number comes from
the stored configuration; what would only be approximated is refused by the layer's name.
"""

from __future__ import annotations

import operator
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn

from .errors import CheckpointError, FastresError
from .keras_file import KerasFile, layer_name, sublayers
from .keras_layers import LAYERS, MERGES, NO_SIDES, KerasImportError, Layer, Pair, Value


def from_keras(path: str | os.PathLike[str], *, input_size: Pair | None = None) -> fx.GraphModule:
    """A Keras model from its ``.h5`` or ``.keras`` file, as a PyTorch module in eval mode.

    It takes (N, C, H, W) float32 images where Keras takes (N, H, W, C), and returns what Keras
    returns: probabilities if the model ends in a softmax. Its ``input_size`` is the height and
    width that the file asks for, None where it leaves them open. Keras is not needed, h5py is.

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

    def build(self) -> fx.GraphModule:
        """The whole model."""
        config = self.file.config
        outputs = self.model(Layer((), config["class_name"], config["config"]), config, None)
        nodes = [self.finished(value) for value in outputs]
        self.graph.output(nodes[0] if len(nodes) == 1 else nodes)
        assert self.input is not None
        module = fx.GraphModule(self.root, self.graph, "KerasModel").eval()
        module.input_size = self.input.size  # type: ignore[assignment]
        return module

    def model(
        self, layer: Layer, config: Mapping[str, Any], given: Sequence[Value] | None
    ) -> list[Value]:
        """The outputs of the model, or of a model inside it, for its input."""
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
        inputs = list(_references(layer.config["input_layers"]))
        if len(inputs) != 1:
            raise layer.refuse(f"has {len(inputs)} inputs; one is supported")
        name, index, _ = inputs[0]
        values = {(name, index): list(given or [self._input(_inner(layer, entries[name]), {})])}
        waiting = [
            (entry, index, node)
            for entry in layer.config["layers"]
            for index, node in enumerate(entry["inbound_nodes"])
        ]
        while waiting:
            ready = [w for w in waiting if all(r[:2] in values for r in _references(w[2]))]
            if not ready:
                raise _inner(layer, waiting[0][0]).refuse("has an input that no layer gives")
            for entry, index, node in ready:
                operands = [values[name, i][output] for name, i, output in _references(node)]
                inner = _inner(layer, entry)
                _refuse_training(inner, node)
                values[layer_name(entry), index] = self._call(inner, entry, operands)
            waiting = [w for w in waiting if w not in ready]
        outputs = _references(layer.config["output_layers"])
        return [values[name, index][output] for name, index, output in outputs]

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
        self, layer: Layer, entry: Mapping[str, Any], operands: Sequence[Value]
    ) -> list[Value]:
        if sublayers(entry):
            return self.model(layer, entry, operands)
        if layer.kind not in LAYERS:
            raise layer.refuse(f"is not supported; these are: {', '.join(sorted(LAYERS))}")
        if layer.config.get("data_format") not in (None, "channels_last"):
            raise layer.refuse("has data_format='channels_first'; 'channels_last' is supported")
        if layer.kind not in MERGES and len(operands) != 1:
            raise layer.refuse(f"has {len(operands)} inputs; one is supported")
        return [LAYERS[layer.kind](self, layer, operands)]

    def emit(
        self, layer: Layer, module: nn.Module, value: Value, suffix: str = "", **changes: Any
    ) -> Value:
        """Call ``module``, kept under the layer's own path, on ``value``."""
        names = [_identifier(name) for name in layer.path]
        names[-1] += suffix
        holder = self.root
        for name in names[:-1]:
            if name not in holder._modules:
                holder.add_module(name, nn.Module())
            holder = holder.get_submodule(name)
        holder.add_module(names[-1], module)
        node = self.graph.create_node("call_module", ".".join(names), (value.node,))
        return replace(value, node=node, **{"positive": False, **changes})

    def padded(self, layer: Layer, value: Value) -> Value:
        """The value with its pending zeros around it."""
        if value.pending == NO_SIDES:
            return value
        module = nn.ZeroPad2d(value.pending)
        positive = value.positive
        return self.emit(layer, module, value, "_pad", pending=NO_SIDES, positive=positive)

    def finished(self, value: Value) -> fx.Node:
        """The node of an output of the model."""
        if value.interleaved is not None:
            raise KerasImportError("the model ends in a Flatten; a Dense layer must follow it")
        if value.pending != NO_SIDES:
            raise KerasImportError("the model ends in a ZeroPadding2D")
        return value.node

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
    return Layer((*layer.path, layer_name(entry)), entry["class_name"], config)


def _identifier(name: str) -> str:
    name = re.sub(r"\W", "_", name)
    return name if name.isidentifier() else f"_{name}"


def _references(node: Any) -> Iterator[tuple[str, int, int]]:
    """(layer, call, output) of each tensor in an inbound node, in the notation of any Keras."""
    if isinstance(node, Mapping):
        if node.get("class_name") == "__keras_tensor__":
            name, call, output = node["config"]["keras_history"]
            yield name, call, output
            return
        for value in node.values():
            yield from _references(value)
    elif isinstance(node, (list, tuple)):
        if len(node) >= 3 and isinstance(node[0], str) and isinstance(node[1], int):
            yield node[0], node[1], node[2]
            return
        for value in node:
            yield from _references(value)


def _refuse_training(layer: Layer, node: Any) -> None:
    """Calls with ``training=True`` normalise by the batch, which no folded network can."""
    if isinstance(node, Mapping):
        options = [node.get("kwargs", {})]
    else:
        options = [entry[3] for entry in node if isinstance(entry, list) and len(entry) > 3]
    if any(option.get("training") for option in options):
        raise layer.refuse("is called with training=True")
