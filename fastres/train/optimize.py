"""What a run steps with: optimizer, schedule, scaler and average, all of torch's own."""

from __future__ import annotations

import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from .config import Config

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def optimizer_of(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """SGD or AdamW, with another weight decay for the norms where that is wanted."""
    norms = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, NORMS) and config.norm_weight_decay is not None
        for parameter in module.parameters(recurse=False)
    }
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [{"params": [p for p in trained if id(p) not in norms]}]
    if norms:
        of_norms = [p for p in trained if id(p) in norms]
        groups.append({"params": of_norms, "weight_decay": config.norm_weight_decay})  # type: ignore[dict-item]
    if config.opt == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay)
    return torch.optim.SGD(
        groups,
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=config.nesterov,
    )


def schedule_of(
    optimizer: torch.optim.Optimizer, config: Config, steps: int
) -> lr_scheduler.LRScheduler:
    """The learning rate by epochs, as torchvision's script has it; onecycle by ``steps`` each."""
    warmup = config.lr_warmup_epochs
    if config.lr_scheduler == "onecycle":
        total = config.epochs * steps
        return lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=total)
    main: lr_scheduler.LRScheduler
    if config.lr_scheduler == "cosine":
        main = lr_scheduler.CosineAnnealingLR(optimizer, config.epochs - warmup, config.lr_min)
    elif config.lr_scheduler == "step":
        main = lr_scheduler.StepLR(optimizer, config.lr_step_size, config.lr_gamma)
    else:
        main = lr_scheduler.ConstantLR(optimizer, factor=1.0)
    if not warmup:
        return main
    rise = lr_scheduler.LinearLR(optimizer, config.lr_warmup_decay, total_iters=warmup)
    return lr_scheduler.SequentialLR(optimizer, [rise, main], [warmup])


def average_of(model: nn.Module, config: Config, world: int) -> AveragedModel | None:
    """The exponential average of weights and statistics; its decay is scaled as torchvision's."""
    if not config.model_ema:
        return None
    scale = world * config.batch_size * config.model_ema_steps / config.epochs
    decay = 1.0 - min(1.0, (1.0 - config.model_ema_decay) * scale)
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
