"""Correct the estimate of input tokens by what the teacher reported for answers that are stored. For `plan`.

Before any answer the estimate is one token for each four bytes of text and four for each message. What a chat
template adds, and how a tokenizer divides other languages, is known only from reported counts.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from harvester.api.replies.usage import BYTES_PER_TOKEN
from harvester.api.request_builder import TOKENS_PER_MESSAGE, estimated_tokens_of
from harvester.api.scoring.request_forms import way_of
from harvester.api.types import USAGE_REPORTED
from harvester.config.config import HarvestConfig
from harvester.errors import StoreError

# With fewer answers nothing is learned; more than these are not read.
FEWEST_ANSWERS, MOST_ANSWERS = 20, 2000
# Tokens of a request per estimated token: outside this range the sizes of the prompts say nothing.
LEAST_FACTOR, MOST_FACTOR = 0.2, 8.0
_COLUMNS = ("request_json", "request_model", "input_tokens", "usage_source", "prompt_id", "created_at")


@dataclass(frozen=True, slots=True)
class InputCorrection:
    """Input tokens of a request: `factor` times the estimate, and `per_request` more.

    `answers` is the number of stored answers it was learned from, 0 for none.
    """

    factor: float = 1.0
    per_request: float = 0.0
    answers: int = 0

    def total(self, estimated: int, requests: int) -> int:
        """Return the corrected sum for requests whose estimates add up to `estimated`."""
        return max(0, round(self.factor * estimated + self.per_request * requests))

    def basis(self) -> str:
        """Say what the figure rests on."""
        if self.answers:
            return f"as the teacher counted {self.answers:,} stored answers"
        return (
            f"estimated: a token for each {BYTES_PER_TOKEN} bytes and {TOKENS_PER_MESSAGE} for each message; "
            "the teacher's chat template may add more"
        )


def learn(store: Path, config: HarvestConfig) -> InputCorrection:
    """Learn the correction from answers of this model in the store; none where it can't be read.

    The answers to one request with `n` have parts of its input tokens, one prompt and one time: they count
    together.
    """
    from harvester.store.reader import Corpus

    pairs: dict[tuple[str, datetime], tuple[int, int]] = {}
    with contextlib.suppress(StoreError):
        for sample in itertools.islice(Corpus.open(store).samples(_COLUMNS), MOST_ANSWERS):
            if (sample.request_model, sample.usage_source) == (config.teacher.model, USAGE_REPORTED):
                body = json.loads(sample.request_json)
                if way_of(body) is not None:
                    continue
                request = sample.prompt_id, sample.created_at
                _, tokens = pairs.get(request, (0, 0))
                estimate = estimated_tokens_of(body["messages"])
                pairs[request] = estimate, tokens + sample.input_tokens
    return fit(list(pairs.values()))


def fit(pairs: Sequence[tuple[int, int]]) -> InputCorrection:
    """Fit the correction to (estimated, reported) tokens by least squares."""
    if len(pairs) < FEWEST_ANSWERS:
        return InputCorrection()
    estimates, reported = zip(*pairs, strict=True)
    factor = 1.0
    if len(set(estimates)) > 1:
        factor = statistics.linear_regression(estimates, reported).slope
        factor = min(MOST_FACTOR, max(LEAST_FACTOR, factor))
    per_request = statistics.fmean(reported) - factor * statistics.fmean(estimates)
    return InputCorrection(factor, per_request, len(pairs))
