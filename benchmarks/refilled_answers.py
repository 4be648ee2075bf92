"""Compare answers whose rows leave and join a batch with batches that last as long as their longest answer.

    python benchmarks/refilled_answers.py [--prompts 128] [--batch 16] [--longest 256] [--hidden 256]

The student is a Llama of random weights whose layers add nothing to their input, and whose output layer gives
token t the successor t - 1: it counts down from the prompt's last token to 0, which ends the answer. So the
lengths are ours to choose: drawn from a log-normal distribution and cut at the longest. All products of
matrices are computed as in a student that learned. Prints rows that pass through the forward for each new
token (prompts counted apart), steps, and CPU seconds; both ways answer in turn, and the answers are compared.
Last, the same with the lengths of all answers known before.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.model import generate, generation_mode


def countdown_student(vocabulary: int, hidden: int) -> Any:
    """Return a model that answers token t with t - 1."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=6,
        num_attention_heads=hidden // 64,
        num_key_value_heads=max(1, hidden // 128),
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        embedding = torch.nn.functional.normalize(torch.randn(vocabulary, hidden), dim=1)
        model.model.embed_tokens.weight.copy_(embedding)
        model.lm_head.weight.copy_(embedding.roll(-1, dims=0))  # row t is that of t + 1
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return model


class Counter:
    """Counts what passes through a model: steps, tokens of prompts, rows of one token."""

    def __init__(self, model: Any) -> None:
        self.steps = self.prompt_tokens = self.rows = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _model: Any, _args: Any, kwargs: dict[str, Any]) -> None:
        rows, columns = kwargs["input_ids"].shape
        self.steps += 1
        if columns == 1:
            self.rows += rows
        else:
            self.prompt_tokens += rows * columns

    def clear(self) -> None:
        """Begin anew."""
        self.steps = self.prompt_tokens = self.rows = 0


def measured(
    model: Any, counter: Counter, prompts: Sequence[Sequence[int]], limits: generate.Limits, refills: bool
) -> tuple[list[generate.Answer], dict[str, float]]:
    """Answer one way; return the answers and what they took."""
    modes = generation_mode.MODES
    generation_mode.MODES = tuple(mode for mode in modes if mode.refills == refills)
    counter.clear()
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
    try:
        answers = generate.generate(model, prompts, limits)
    finally:
        generation_mode.MODES = modes
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    facts = {
        "steps": counter.steps,
        "rows": counter.rows,
        "prompt_tokens": counter.prompt_tokens,
        "cpu_s": cpu,
        "wall_s": time.perf_counter() - started,
    }
    return answers, facts


def main() -> None:
    """Run the comparison and print its table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--longest", type=int, default=256)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    draw = np.random.default_rng(0)
    lengths = draw.lognormal(mean=np.log(arguments.longest / 10), sigma=1.0, size=arguments.prompts)
    lengths = np.clip(lengths, 1, arguments.longest - 1).astype(int).tolist()
    prompts = [
        [*draw.integers(1, arguments.longest, size=int(size)).tolist(), length]
        for size, length in zip(draw.integers(8, 64, size=arguments.prompts), lengths, strict=True)
    ]
    model = countdown_student(arguments.longest, arguments.hidden)
    counter = Counter(model)
    limits = generate.Limits(stop_id=0, max_new_tokens=arguments.longest, batch=arguments.batch)
    known = generate.Limits(
        stop_id=0, max_new_tokens=arguments.longest, batch=arguments.batch, expected=lengths
    )
    ways = {"whole batches": (limits, False), "refilled": (limits, True), "lengths known": (known, True)}
    took: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    for _ in range(arguments.rounds):
        for way, (asked, refills) in ways.items():
            answers, facts = measured(model, counter, prompts, asked, refills)
            if [len(answer.ids) for answer in answers] != [length - 1 for length in lengths]:
                raise SystemExit(f"{way}: other answers than the student gives")
            took[way].append(facts)
    tokens = sum(lengths)
    result: dict[str, Any] = {"new_tokens": tokens, "mean": tokens / len(lengths), "longest": max(lengths)}
    for way, rounds in took.items():
        facts = {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        result[way] = {**facts, "rows_per_token": facts["rows"] / tokens}
    first, second = result["whole batches"], result["refilled"]
    result["ratios"] = {name: first[name] / second[name] for name in ("rows", "steps", "cpu_s", "wall_s")}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
