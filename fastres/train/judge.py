"""What a network is on the validation images, and whether it fits the data at all."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from .batches import Batches
from .config import Config

NOT_JUDGED = {"loss": None, "accuracy": None, "top5": None}


def autocast(config: Config, device: torch.device) -> Any:
    """The context of a forward pass in the run's precision."""
    kind = torch.float16 if config.amp == "fp16" else torch.bfloat16
    return torch.autocast(device.type, kind, enabled=config.amp != "none")


def check_labels(model: nn.Module, batches: Batches) -> None:
    """Raises ValueError for a label that the network has no logit for."""
    with torch.inference_mode():
        logits = model.eval()(batches.sample())
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError("model must give (N, classes) logits for (N, C, H, W) images")
    parts = {"training": batches.data.train, "validation": batches.data.validation}
    for name, part in parts.items():
        labels = part.labels if part else torch.zeros(0)
        wrong = ((labels < 0) | (labels >= logits.shape[1])).nonzero().flatten()
        if len(wrong):
            raise ValueError(
                f"{name} labels must be below the model's {logits.shape[1]} logits; "
                f"got {int(labels[wrong[0]])} at index {int(wrong[0])}"
            )


def dtype_of(model: nn.Module) -> torch.dtype:
    """That of a network's weights; float32 where it has none."""
    kinds = (parameter.dtype for parameter in model.parameters())
    return next((kind for kind in kinds if kind.is_floating_point), torch.float32)


def judge(model: nn.Module, batches: Batches) -> dict[str, float]:
    """``loss``, ``accuracy`` and ``top5`` over all processes, each image counted once."""
    model.eval()
    if batches.world > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, 0)
    found = torch.zeros(4, dtype=torch.float64, device=batches.device)
    with torch.inference_mode(), autocast(batches.config, batches.device):
        for x, y in batches.validation():
            logits = model(x).float()
            close = logits.topk(min(5, logits.shape[1])).indices == y[:, None]
            loss = F.cross_entropy(logits, y, reduction="sum")
            counts = (loss, close[:, 0].sum(), close.sum(), torch.tensor(len(x)).to(loss))
            found += torch.stack([count.double() for count in counts])
    loss, right, near, total = over_ranks(found, batches.world).tolist()
    return {"loss": loss / total, "accuracy": right / total, "top5": near / total}


def over_ranks(counts: Tensor, world: int) -> Tensor:
    """The sum of every process' counts."""
    if world > 1:
        dist.all_reduce(counts)
    return counts
