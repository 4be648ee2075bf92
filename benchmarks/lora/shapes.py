"""Define the shapes of Qwen2.5 that are measured on a GPU, with random weights, and a task for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lora_task
import rows


def qwen(*sizes: int) -> dict[str, Any]:
    """Return the values of a Qwen2Config: width, inner width, layers, heads, key-value heads."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    family = {"max_position_embeddings": 32_768, "vocab_size": 151_936, "tie_word_embeddings": True}
    return {**family, **dict(zip((*names, "num_key_value_heads"), sizes, strict=True))}


SHAPES: dict[str, dict[str, Any]] = {
    "0.5b": qwen(896, 4864, 24, 14, 2),
    "1.5b": qwen(1536, 8960, 28, 12, 2),
    "7b": {**qwen(3584, 18_944, 28, 28, 4), "vocab_size": 152_064, "tie_word_embeddings": False},
    "tiny": {**qwen(64, 128, 2, 4, 2), "vocab_size": 1024},
}
# Warm and timed steps of each: ten minutes in all.
STEPS = {
    "0.5b": (20, 50),
    "1.5b": (10, 30),
    "7b": (4, 16),
    "tiny": (4, 16),
}
GOAL = {"0.5b": (35, 1.35), "1.5b": (45, 1.25), "7b": (52, 1.12)}  # MFU in %, ratio to tuned TRL
PEAK = 989e12  # dense bf16 FLOP/s of H100 and H200, vendor's sheet


def lay(folder: Path, steps: list[rows.Step]) -> str:
    """Write the documents of each step where both sides look; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "steps.json").write_text(json.dumps(steps), encoding="utf-8")
    return str(folder)


def task_of(name: str, folder: Path, device: str, *, pack_tokens: int, tokenizer: str = "") -> lora_task.Task:
    """Write documents of random ids for a shape; return its task, bf16 on CUDA and fp32 on the CPU."""
    warm, timed = STEPS[name]
    pack, mean = (512, 48) if name == "tiny" else (pack_tokens, 1024)
    values = SHAPES[name]
    examples = rows.drawn(
        (warm + timed + 2) * pack * 11 // 10, mean=mean, longest=4 * mean, vocabulary=values["vocab_size"]
    )
    on_cpu = device == "cpu"
    return lora_task.Task(
        lay(folder, rows.steps(examples, warm + timed, pack_tokens=pack, packs_per_step=1)),
        shape=values,
        rank=16,
        alpha=32,
        lr=2e-4,
        warm=warm,
        timed=timed,
        pack_tokens=pack,
        device=device,
        dtype="float32" if on_cpu else "bfloat16",
        threads=2 if on_cpu else 8,
        tokenizer=tokenizer,
        attention="sdpa" if on_cpu else "varlen",
    )
