"""Measure what a student's answers cost on this machine, next to what the teacher's cost over the network."""

from __future__ import annotations

import re
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.evaluation import intervals
from trainer.model import four_bit, generate, structure

# Columns of the corpus that say what the teacher took.
COLUMNS = ("prompt_id", "latency_s", "output_tokens", "cost_microusd")
# Resamples for the intervals of a few timings.
_RESAMPLES = 1000


@dataclass(frozen=True, slots=True)
class Timing:
    """Hold how long one answer took: to its first token, and in all; in seconds."""

    first_s: float
    total_s: float
    tokens: int


def time_answers(model: Any, prompts: Sequence[Sequence[int]], limits: generate.Limits) -> list[Timing]:
    """Answer prompts one at a time, each once to its first token and once to its end.

    The first prompt warms up and is left out. Tokens are generated as in the evaluation.
    """
    if len(prompts) < 2:
        return []
    alone = replace(limits, batch=1)
    # Prompts are answered in the order of their lengths.
    ordered = sorted(prompts, key=len)
    ordered = [ordered[0], *ordered]
    first, _ = _clocked(model, ordered, replace(alone, max_new_tokens=1))
    total, answers = _clocked(model, ordered, alone)
    return [
        Timing(min(first_s, total_s), total_s, len(answer.ids) + (not answer.is_cut))
        for first_s, total_s, answer in zip(first[1:], total[1:], answers[1:], strict=True)
    ]


def _clocked(
    model: Any, prompts: Sequence[Sequence[int]], limits: generate.Limits
) -> tuple[list[float], list[generate.Answer]]:
    at = [time.perf_counter()]

    def note(_done: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        at.append(time.perf_counter())

    answers = generate.generate(model, prompts, limits, on_done=note)
    return [later - earlier for earlier, later in pairwise(at)], answers


def student_facts(
    model: Any,
    timings: Sequence[Timing],
    in_batches: Timing,
    base: Path,
    adapter: Path,
    usd_per_hour: float | None,
) -> dict[str, Any]:
    """Return what the student takes on this machine.

    Args:
        timings: of answers one at a time.
        in_batches: seconds and tokens of all held-out answers, in batches; `first_s` is seconds an answer.
        usd_per_hour: price of this machine; None: unknown.
    """
    device = next(model.parameters()).device
    # A merged student has the parameters of its base. Weights in 4 bits are buffers.
    added = re.compile(r"lora_|\.modules_to_save\.")
    base_model = structure.base_model_of(model)
    own = [p for name, p in base_model.named_parameters() if not added.search(name)]
    packed = four_bit.layers_of(base_model)
    packed_bytes = sum(b.numel() * b.element_size() for layer in packed for b in layer.buffers())
    after_first = [(t.tokens - 1, t.total_s - t.first_s) for t in timings if t.tokens > 1]
    per_answer = in_batches.first_s
    return {
        "answers_timed": len(timings),
        "device": str(device),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "first_token_s": _mean([t.first_s for t in timings]),
        "answer_s": _mean([t.total_s for t in timings]),
        "tokens_per_s": intervals.ratio([n for n, _ in after_first], [s for _, s in after_first], _RESAMPLES),
        "tokens_per_s_in_batches": in_batches.tokens / in_batches.total_s if in_batches.total_s else None,
        "answer_s_in_batches": per_answer,
        "parameters": sum(p.numel() for p in own) + sum(x.in_features * x.out_features for x in packed),
        "weight_bytes": sum(p.numel() * p.element_size() for p in own) + packed_bytes,
        "process_peak_bytes": _peak_bytes(device),
        "disk_bytes": _size(base, "*.safetensors") + _size(adapter, "*.safetensors"),
        "usd_per_1000_answers": None if usd_per_hour is None else per_answer / 3600 * usd_per_hour * 1000,
    }


def _peak_bytes(device: torch.device) -> int:
    """Return the most memory so far: of the device on CUDA, else of the process, evaluation included."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _size(folder: Path, pattern: str) -> int:
    return sum(file.stat().st_size for file in folder.glob(pattern))


def _mean(values: Sequence[float]) -> dict[str, float] | None:
    return intervals.means({"x": values}, _RESAMPLES)["x"] if values else None


def teacher_facts(config: TrainConfig, prompt_ids: frozenset[str]) -> dict[str, Any]:
    """Return what the teacher's stored answers to some prompts took: latency, tokens, dollars.

    Latency is that of the last attempt, from sending to the last byte, while the harvest had other requests
    in flight; an idle teacher may be faster. The time to the first token, size and memory of a teacher behind
    an API are not known. Answers that were asked otherwise than `[data] where` says don't count.
    """
    seconds: list[float] = []
    tokens: list[float] = []
    dollars: list[float] = []
    for sample in dataset.paid_samples(config, COLUMNS):
        if sample.prompt_id not in prompt_ids:
            continue
        dollars.append(sample.cost_microusd / 1e6 * 1000)
        if sample.latency_s > 0 and sample.output_tokens > 0:
            seconds.append(sample.latency_s)
            tokens.append(float(sample.output_tokens))
    return {
        "answers": len(dollars),
        "measured": "during the harvest, under its load",
        "answer_s": _mean(seconds),
        "tokens_per_s": intervals.ratio(tokens, seconds, _RESAMPLES) if tokens else None,
        "usd_per_1000_answers": _mean(dollars),
    }


def compared(student: Mapping[str, Any], teacher: Mapping[str, Any]) -> dict[str, Any]:
    """Return both with the ratios that a reader looks for; None where a part is not known."""
    ours, theirs = student["usd_per_1000_answers"], teacher["usd_per_1000_answers"]
    speed = (student["tokens_per_s"], teacher["tokens_per_s"])
    return {
        "student": dict(student),
        "teacher": dict(teacher),
        "speed_ratio": speed[0]["value"] / speed[1]["value"] if all(speed) else None,
        "cost_ratio": ours / theirs["value"] if ours is not None and theirs and theirs["value"] else None,
    }
