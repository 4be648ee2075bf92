"""Create the optimiser and compute the learning rate of each step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from trainer.config import LoraSection, TrainSection


def lr_factor(step: int, steps: int, train: TrainSection) -> float:
    """Return the learning rate of a step as a share of the peak: linear warm-up, then the schedule.

    Cosine (Loshchilov and Hutter 2017, arXiv 1608.03983, without restarts) falls to `lr_floor`, 10 % as in
    Hoffmann et al. 2022 (arXiv 2203.15556). Linear falls to 0 after the last step.

    Args:
        step: number of the step, from 0.
        steps: steps of the whole training.
    """
    warm_up = max(1, round(steps * train.warmup)) if train.warmup else 0
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, steps - warm_up)
    if train.schedule == "cosine":
        return train.lr_floor + (1 - train.lr_floor) * 0.5 * (1 + math.cos(math.pi * progress))
    return 1 - progress if train.schedule == "linear" else 1.0


def adamw(
    named: Iterable[tuple[str, torch.nn.Parameter]], train: TrainSection, lora: LoraSection
) -> torch.optim.AdamW:
    """Create AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) for the trainable parameters.

    B matrices get `plus_ratio` times the learning rate (LoRA+, Hayou et al. 2024, arXiv 2402.12354). Each
    group holds its `peak_lr`, which `set_lr` scales. Moments have the parameters' dtype, fp32.

    Args:
        named: parameters with their names.
    """
    if train.method == "full":
        return _adamw_of_all(named, train)
    default: list[torch.nn.Parameter] = []
    lora_plus: list[torch.nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            (lora_plus if "lora_B" in name and lora.plus_ratio != 1 else default).append(parameter)
    groups = [
        {"params": params, "lr": lr, "peak_lr": lr}
        for params, lr in ((default, train.lr), (lora_plus, train.lr * lora.plus_ratio))
        if params
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=train.weight_decay, fused=True)


def _adamw_of_all(named: Iterable[tuple[str, torch.nn.Parameter]], train: TrainSection) -> torch.optim.AdamW:
    """Create AdamW for all weights of a student; biases and the weights of norms don't decay."""
    trained = [parameter for _, parameter in named if parameter.requires_grad]
    groups = [
        {"params": params, "lr": train.lr, "peak_lr": train.lr, "weight_decay": decay}
        for params, decay in (
            ([p for p in trained if p.ndim > 1], train.weight_decay),
            ([p for p in trained if p.ndim <= 1], 0.0),
        )
        if params
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def set_lr(optimiser: torch.optim.Optimizer, factor: float) -> float:
    """Set every group's learning rate to `factor` times its peak; return the first group's rate."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimiser.param_groups[0]["lr"])
