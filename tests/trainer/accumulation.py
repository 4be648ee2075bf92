"""Learn one step of eight packs at once, one by one, or spread over ranks; write its gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from trainer import config as settings
from trainer.data import dataset
from trainer.data.chat_template import Renderer
from trainer.model import model
from trainer.model.weights import vocabulary_size
from trainer.training import optim
from trainer.training.distributed import join_world
from trainer.training.step import Stepper
from trainer.training.student import TrainableStudent


def examples(config: settings.TrainConfig) -> list[Any]:
    renderer = Renderer(model.load_tokenizer(config.base))
    return list(dataset.render(dataset.read(config), renderer, config, vocabulary_size(config.base)).examples)


def write(request: dict[str, Any]) -> None:
    """Cut the corpus into `packs` packs, learn one step, write gradients (before clipping), loss and norm."""
    config = settings.load(Path(request["toml"]))
    made = examples(config)
    packs = [made[number :: request["packs"]] for number in range(request["packs"])]
    with join_world() as world:
        student = model.load_new_student(config, torch.device("cpu"))
        with torch.no_grad():  # B starts at zero and would hide A's gradient
            for name, p in student.named_parameters():
                if "lora_B" in name:
                    p.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
        named = model.trainable_parameters(student)
        optimiser = optim.adamw(named.items(), config.train, config.lora)
        stepper = Stepper(TrainableStudent(student, named), optimiser, config.train, world)
        kept: dict[str, torch.Tensor] = {}
        original = torch.nn.utils.clip_grad_norm_

        def noting(parameters: Any, bound: float) -> torch.Tensor:
            kept.update({name: p.grad.clone() for name, p in named.items()})
            return original(list(parameters), bound)

        torch.nn.utils.clip_grad_norm_ = noting
        try:
            learned = stepper.learn(0, packs)
        finally:
            torch.nn.utils.clip_grad_norm_ = original
        if world.is_leader:
            save_file({**kept, "loss": learned.loss, "norm": learned.norm}, request["out"])
