"""The network in a Triton Inference Server's Python backend; see :mod:`.triton_repo`."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from .fused_file import load


class TritonPythonModel:
    """What the backend asks of a ``model.py``: one input, any number of outputs, no state."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load ``fused.safetensors``, which lies beside the model.py, onto the instance's GPU."""
        config = json.loads(args["model_config"])
        (self.input,), self.outputs = config["input"], [out["name"] for out in config["output"]]
        gpu = args["model_instance_kind"] == "GPU"
        self.device = f"cuda:{args['model_instance_device_id']}" if gpu else "cpu"
        folder = Path(args["model_repository"]) / args["model_version"]
        self.model = load(folder / "fused.safetensors", device=self.device)

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response for each: those that fit are computed together, the others get an error."""
        import triton_python_backend_utils as backend

        name, kind = self.input["name"], self.input["data_type"]
        sides = tuple(map(int, self.input["dims"]))
        images, errors = [], []
        for request in requests:
            given = backend.get_input_tensor_by_name(request, name)
            x = torch.empty(0) if given is None else torch.from_dlpack(given.to_dlpack())
            got = (data_type(str(x.dtype)), tuple(x.shape[1:]))
            errors.append(
                "" if got == (kind, sides) else f"{name} must be {kind} of {sides}; got {got}"
            )
            images.append(x)
        good = [x for x, error in zip(images, errors, strict=True) if not error]
        answers = iter(self._run(good) if good else ())
        return [
            backend.InferenceResponse([], backend.TritonError(error))
            if error
            else backend.InferenceResponse(
                [*map(backend.Tensor.from_dlpack, self.outputs, next(answers))]
            )
            for error in errors
        ]

    def _run(self, images: list[Tensor]) -> Iterable[tuple[Tensor, ...]]:
        """The outputs of each request, float32 where they are no whole numbers."""
        with torch.inference_mode():
            found = tree_leaves(self.model(torch.cat(images).to(self.device)))
        floats = [x.float() if x.is_floating_point() else x for x in found]
        return zip(*(x.cpu().split([len(x) for x in images]) for x in floats), strict=True)


def data_type(dtype: str) -> str:
    """Triton's word for a dtype of numpy or torch: TYPE_FP32 for float32 or torch.float32."""
    word = dtype.removeprefix("torch.").upper()
    return "TYPE_" + word.replace("BFLOAT", "BF").replace("FLOAT", "FP")
