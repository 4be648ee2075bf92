"""Join requests for several samples of one prompt into one request with `n`. Pure.

The keys stay those of the samples: `n` says how many answers travel together, not what they are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from harvester.api.request_builder import cost_microusd
from harvester.api.scoring.request_forms import way_of
from harvester.api.types import Request
from harvester.config.teacher_section import PriceSection


def may_join(first: Request, other: Request) -> bool:
    """Whether two requests differ in nothing but their sample number.

    Samples with seeds of their own don't: each seed is another body. Requests that score a text stay alone.
    """
    is_same = first.prompt is other.prompt and first.path == other.path and first.body == other.body
    return is_same and "n" not in first.body and way_of(first.body) is None


def joined(requests: Iterable[Request], most: int, price: PriceSection | None) -> Iterator[Request]:
    """Join neighbours that may be joined, up to `most` at a time; yield the others as they are."""
    group: list[Request] = []
    for request in requests:
        if group and (len(group) >= most or not may_join(group[0], request)):
            yield join(group, price)
            group = []
        group.append(request)
    if group:
        yield join(group, price)


def join(rows: Sequence[Request], price: PriceSection | None) -> Request:
    """Return one request for all of these, which may be joined: their prompt once, their answers together."""
    first = rows[0]
    if len(rows) == 1:
        return first
    output, budget_output = first.output_tokens * len(rows), first.budget_output_tokens * len(rows)
    budget_input = first.budget_tokens - first.budget_output_tokens
    return replace(
        first,
        body={**first.body, "n": len(rows)},
        output_tokens=output,
        estimated_microusd=cost_microusd(price, first.input_tokens, output),
        budget_tokens=budget_input + budget_output,
        budget_microusd=cost_microusd(price, budget_input, budget_output),
        budget_output_tokens=budget_output,
        rows=tuple(rows),
    )


def idempotency_key(request: Request) -> str:
    """Return what a provider may know this request by again: the same for all attempts at the same rows."""
    if not request.rows:
        return request.key.hex()
    return hashlib.sha256(b"".join(row.key for row in request.rows)).hexdigest()
