"""Find the limit on an answer's tokens in a request body. Pure.

OpenAI renamed `max_tokens` to `max_completion_tokens`; servers accept one or both. Where a body has both, the
newer name counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_FIELDS = ("max_completion_tokens", "max_tokens")


def max_tokens_fields(body: Mapping[str, Any]) -> dict[str, int]:
    """Return the fields of a body that limit the answer, with their integers, the deciding one first."""
    return {name: value for name in _FIELDS if isinstance(value := body.get(name), int)}


def max_tokens_of(body: Mapping[str, Any]) -> int | None:
    """Return the limit as the body states it, also 0; None for none. The journal stores this value."""
    return next(iter(max_tokens_fields(body).values()), None)


def positive_max_tokens_of(body: Mapping[str, Any]) -> int:
    """Return the limit for estimates of time and tokens: 0 where the body states none, or none above 0."""
    return max(0, max_tokens_of(body) or 0)
