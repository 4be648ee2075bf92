"""Invent log-probabilities for generated tokens, consistent and repeatable.

The chosen token has a probability in [0.5, 0.98); each further alternative holds half of what is
left, so the listed probabilities fall and sum to less than 1, as those of a real model do.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

# At least as many as the most alternatives a request may ask for.
_OTHERS = (*"0123456789,.-aesü日", "\n", " the", " a", " is", " SELECT", "ab", "ing")


def _entry(token: str, probability: float) -> dict[str, Any]:
    return {"token": token, "logprob": math.log(probability), "bytes": list(token.encode())}


def token_logprobs(pieces: Sequence[str], top: int, digest: bytes) -> list[dict[str, Any]]:
    """Return one entry of `logprobs.content` for each token, with `top` alternatives, chosen one first."""
    chance = random.Random(digest)
    entries = []
    for piece in pieces:
        probability = 0.5 + 0.48 * chance.random()
        entry = _entry(piece, probability)
        alternatives = [_entry(piece, probability)] if top else []
        left = 1 - probability
        start = chance.randrange(len(_OTHERS))
        for step in range(len(_OTHERS)):
            if len(alternatives) >= top:
                break
            other = _OTHERS[(start + step) % len(_OTHERS)]
            if other != piece:
                left /= 2
                alternatives.append(_entry(other, left))
        entry["top_logprobs"] = alternatives
        entries.append(entry)
    return entries
