"""Make log-probabilities as a server would have returned them, for a given tokenizer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from harvester.system.token_bytes import token_bytes
from tests.trainer import tiny


def entry(data: bytes, logprob: float | None, top: Any = ()) -> dict[str, Any]:
    """An element of the column `logprobs`; `top` is a list of (bytes, log-probability)."""
    made = {"token": data.decode(errors="replace"), "bytes": data, "logprob": logprob}
    return {**made, "top": [{"token": b.decode(errors="replace"), "bytes": b, "logprob": p} for b, p in top]}


def of_text(tokenizer: Any, text: str, *, k: int = 4, seed: int = 0, end: str = "") -> list[dict[str, Any]]:
    """Entries for a text: the tokenizer's own tokens, k likeliest of a random distribution at each.

    Args:
        end: a control token that ended the answer, as some servers list it.
    """
    draw = np.random.default_rng([seed, len(text)])
    data = token_bytes(tokenizer)
    special = set(tokenizer.all_special_ids)
    plain = [i for i in range(len(data)) if i not in special and data[i] and b"\xef" not in data[i]]
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    if end:
        ids = [*ids, tokenizer.convert_tokens_to_ids(end)]
    entries = []
    for chosen in ids:
        logits = 2 * draw.standard_normal(len(data))
        logits[chosen] += 6
        log_probs = logits - np.log(np.exp(logits).sum())
        drawn = {*draw.choice(plain, k - 1, replace=False).tolist(), chosen}
        listed = sorted(drawn, key=lambda i: -log_probs[i])
        entries.append(
            entry(data[chosen], float(log_probs[chosen]), [(data[i], float(log_probs[i])) for i in listed])
        )
    return entries


def by_pairs(text: str, *, seed: int = 0) -> list[dict[str, Any]]:
    """Entries for a text by a teacher whose tokens are two characters, with one alternative to each."""
    draw = np.random.default_rng([seed, len(text)])
    entries = []
    for begin in range(0, len(text), 2):
        share, data = float(draw.uniform(0.5, 0.9)), text[begin : begin + 2].encode()
        listed = [(data, float(np.log(share))), (b"~", float(np.log((1 - share) / 2)))]
        entries.append(entry(data, float(np.log(share)), listed))
    return entries


def skill(count: int, *, held_out: int = 0, k: int = 4, **more: Any) -> list[Any]:
    """Rows as `tiny.skill` makes them, with log-probabilities by a teacher with the student's tokenizer."""
    tokenizer = tiny.tokenizer()
    return [
        replace(row, logprobs=of_text(tokenizer, row.completion, k=k, seed=i, **more))
        for i, row in enumerate(tiny.skill(count, held_out=held_out))
    ]
