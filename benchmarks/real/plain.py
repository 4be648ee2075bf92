"""Compute what the trainer reports a second time, by plain transformers and PEFT, one row at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer


@dataclass(frozen=True, slots=True)
class Row:
    """A prompt, and the teacher's whole answer."""

    prompt: Sequence[Mapping[str, str | None]]
    answer: str


@dataclass(frozen=True, slots=True)
class PlainFigures:
    """How well a model predicts the teacher's answers, their end of turn included.

    Attributes:
        loss: nats per token.
        bits_per_byte: bits per UTF-8 byte of the answers.
        agreement: share of the tokens that are the model's most likely ones.
        tokens: number of tokens.
    """

    loss: float
    bits_per_byte: float
    agreement: float
    tokens: int


def figures(base: Path, adapter: Path | None, rows: Sequence[Row]) -> PlainFigures:
    """Compare a base, or a base with an adapter, with a teacher's answers."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter))
    model.eval()
    nats = 0.0
    agreed = tokens = size = 0
    for row in rows:
        head = tokenizer.apply_chat_template(row.prompt, tokenize=False, add_generation_prompt=True)
        ids = tokenizer(head, add_special_tokens=False)["input_ids"]
        taught = tokenizer(row.answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            logits = model(torch.tensor([ids + taught])).logits[0, len(ids) - 1 : -1]
        targets = torch.tensor(taught)
        nats += float(torch.nn.functional.cross_entropy(logits, targets, reduction="sum"))
        agreed += int((logits.argmax(dim=-1) == targets).sum())
        tokens += len(taught)
        size += len(row.answer.encode())
    return PlainFigures(nats / tokens, nats / math.log(2) / size, agreed / tokens, tokens)
