"""Parameter groups and the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from trainer.config import LoraSection, TrainSection


def lr_factor(step: int, steps: int, train: TrainSection) -> float:
    """Share of the peak rate at `step` (0-based) of `steps`: linear warm-up, then the schedule.

    Cosine falls to `lr_floor` (10 % in Hoffmann et al. 2022), linear to 0 after the last step.
    """
    warm = max(1, round(steps * train.warmup)) if train.warmup else 0
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    if train.schedule == "cosine":
        return train.lr_floor + (1 - train.lr_floor) * 0.5 * (1 + math.cos(math.pi * done))
    return 1 - done if train.schedule == "linear" else 1.0


def adamw(
    named: Iterable[tuple[str, torch.nn.Parameter]], train: TrainSection, lora: LoraSection
) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; B matrices get `plus_ratio` times the rate (LoRA+, 2402.12354).

    Each group carries `peak_lr`; `set_lr` scales it. Moments are kept in the parameter's dtype (fp32).
    """
    slow: list[torch.nn.Parameter] = []
    fast: list[torch.nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            (fast if "lora_B" in name and lora.plus_ratio != 1 else slow).append(parameter)
    groups = [
        {"params": params, "lr": lr, "peak_lr": lr}
        for params, lr in ((slow, train.lr), (fast, train.lr * lora.plus_ratio))
        if params
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=train.weight_decay, fused=True)


def set_lr(optimiser: torch.optim.Optimizer, factor: float) -> float:
    """Scale every group's peak rate by `factor`; returns the first group's rate."""
    for group in optimiser.param_groups:
        group["lr"] = group["peak_lr"] * factor
    return float(optimiser.param_groups[0]["lr"])
