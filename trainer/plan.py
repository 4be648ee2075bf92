"""What a training will cost, before a weight is moved: rows, tokens, steps, memory by part."""

from __future__ import annotations

import json
from dataclasses import dataclass

import torch

from trainer import dataset, model
from trainer.config import TrainConfig
from trainer.order import Order
from trainer.render import Renderer
from trainer.weights import shapes_of, vocabulary_of


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """Counts and estimates; memory in bytes."""

    examples: int
    held_out: int
    excluded: dict[str, int]
    tokens_per_epoch: int
    supervised_per_epoch: int
    steps: int
    packs_per_step: int
    pack_waste: float
    base_parameters: int
    adapter_parameters: int
    memory: dict[str, int]


def plan(config: TrainConfig) -> TrainPlan:
    """Read corpus and shapes, load no weights.

    Raises:
        DataError, StudentError: as `trainer train` would.
    """
    rows = dataset.read(config)
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    data = dataset.render(rows, renderer, config, vocabulary_of(config.base))
    order = Order(data.lengths, config.train)
    shapes = shapes_of(config.base)
    parameters = sum(_size(shape) for shape in shapes.values())
    adapter = sum(
        config.lora.rank * (shape[0] + shape[1]) for name, shape in shapes.items() if _is_linear(name, shape)
    )
    return TrainPlan(
        examples=len(data.examples),
        held_out=len(rows.held_out),
        excluded=dict(data.excluded),
        tokens_per_epoch=sum(data.lengths),
        supervised_per_epoch=sum(e.supervised for e in data.examples),
        steps=order.steps,
        packs_per_step=config.train.packs_per_step,
        pack_waste=order.waste,
        base_parameters=parameters,
        adapter_parameters=adapter,
        memory=_memory(config, parameters, adapter),
    )


def _memory(config: TrainConfig, parameters: int, adapter: int) -> dict[str, int]:
    facts = json.loads((config.base / "config.json").read_text(encoding="utf-8"))
    width, wide = int(facts.get("hidden_size", 0)), int(facts.get("intermediate_size", 0))
    layers, vocabulary = int(facts.get("num_hidden_layers", 0)), int(facts.get("vocab_size", 0))
    element = model.dtype_of(model.device_of(config.train)).itemsize
    tokens = config.train.pack_budget
    return {
        "base": parameters * element,
        "adapter": adapter * 4,
        "gradients": adapter * 4,
        "moments": adapter * 8,
        # ~10 H + 3 F values a token and layer are kept for the backward pass without checkpointing
        "activations": (10 * width + 3 * wide) * layers * tokens * element,
        "logits": vocabulary * tokens * 4 * 3,  # the upper bound: every position supervised
    }


def _is_linear(name: str, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and not any(part in name for part in ("embed", "lm_head", "wte", "wpe"))


def _size(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
