"""Run our trainer on a task of `lora_task`: python our_side.py TASK.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import lora_task
import numpy as np
import torch

from trainer import config as settings
from trainer.data.chat_template import Example
from trainer.data.collator import padding_share
from trainer.model import model, structure
from trainer.model.forward import (
    compile,
    fused_norms,
    hopper_attention,
    lora_forward,
    segment_attention,
    varlen_attention,
)
from trainer.model.forward.losses import loss_and_gradient
from trainer.training import flops, optim
from trainer.training.distributed import World
from trainer.training.step import Stepper
from trainer.training.student import TrainableStudent

WINDOW = 10


def configured(task: lora_task.Task) -> settings.TrainConfig:
    """The task as a train.toml would say it."""
    values = {
        "student": {"base": task.base or "random"},
        "data": {"corpus": "none"},
        "lora": {"rank": task.rank, "alpha": task.alpha},
        "train": {
            "lr": task.lr,
            "clip": task.clip,
            "seed": task.seed,
            "schedule": "constant",
            "warmup": 0.0,
            "threads": task.threads,
        },
    }
    return settings.parse(values, root=Path(task.folder), place="task")


def main() -> None:
    task = lora_task.load(sys.argv[1])
    config = configured(task)
    model.set_threads(config.train)
    attention = varlen_attention.register() if task.device == "cuda" else segment_attention.register()
    student = lora_task.adapted(task, lora_task.base(task, attention)).train()
    first = lora_task.fingerprint(student)
    lora_forward.replace_lora_forward(student)
    fuses = task.device == "cuda" and not task.compile  # as `trainer.training.student` does
    norms = fused_norms.fuse_norms(student) if fuses else 0
    if task.device == "cuda":
        varlen_attention.prepare(
            structure.text_config(structure.base_model_of(student)), torch.device("cuda")
        )
    row_loss = compile.compile_student(student, backend=task.backend) if task.compile else loss_and_gradient
    named = model.trainable_parameters(student)
    optimiser = optim.adamw(named.items(), config.train, config.lora)
    stepper = Stepper(TrainableStudent(student, named, row_loss), optimiser, config.train, World())
    count = flops.flop_counter(student)
    clock, losses, per_step, work = lora_task.Clock(task.device), [], [], 0.0
    since = torch.zeros((), device=task.device)
    for number, packs in enumerate(task.steps()[: task.total]):
        examples = [[Example(np.asarray(ids, np.int32), n) for ids, n in pack] for pack in packs]
        optim.set_lr(optimiser, 1.0)
        learned = stepper.learn(number, examples)
        since += learned.loss
        work += sum(map(count, examples)) if number >= task.warm else 0.0
        if (number + 1) % WINDOW == 0:
            losses.append(float(since) / WINDOW)
            print(f"step {number + 1}: loss {losses[-1]:.4f}", file=sys.stderr, flush=True)
            padding_share(examples)
            stepper.check(number, task.folder)
            since.zero_()
        per_step.append((learned.tokens, learned.supervised))
        clock.mark()
    values = lora_task.told(task, clock, losses, per_step, first)
    third = task.device == "cuda" and hopper_attention.is_active()
    print(
        values[:-1] + f', "flop": {work}, "fused_norms": {norms}, "flash_attention_3": {json.dumps(third)}}}'
    )


if __name__ == "__main__":
    main()
