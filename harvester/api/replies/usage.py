"""Read the token counts of an answer, and check them against the answer itself. Pure.

A count that its own answer disproves (0 tokens for a page of text) is no count: it is replaced by an
estimate, and the counts are marked as corrected. Budgets and bills would otherwise trust it. What a teacher
counts beside prompt and answer is added to them: it is billed too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from harvester.api.types import USAGE_CORRECTED, USAGE_ESTIMATED, USAGE_REPORTED, Usage

# No model has a context anywhere near this.
MAX_PLAUSIBLE_TOKENS = 10_000_000
BYTES_PER_TOKEN = 4
# The longest tokens of today's vocabularies (runs of blanks or dashes) have 128 characters.
MAX_CHARS_PER_TOKEN = 128
# Tokenizers don't join words, but for a few that join some: a text has at least half as many tokens as words.
MAX_WORDS_PER_TOKEN = 2
# Members of `usage`, by what they count; the first that is there counts.
INPUT_MEMBERS = (
    "prompt_tokens",
    "input_tokens",
    "promptTokens",
    "inputTokens",
    "promptTokenCount",
    "prompt_eval_count",
)
OUTPUT_MEMBERS = (
    "completion_tokens",
    "output_tokens",
    "completionTokens",
    "outputTokens",
    "candidatesTokenCount",
    "eval_count",
)
CACHED_MEMBERS = (
    "prompt_tokens_details.cached_tokens",
    "input_tokens_details.cached_tokens",
    "prompt_cache_hit_tokens",
    "cache_read_input_tokens",
    "cached_tokens",
    "cachedContentTokenCount",
    "cacheReadInputTokens",
)
REASONING_MEMBERS = (
    "completion_tokens_details.reasoning_tokens",
    "output_tokens_details.reasoning_tokens",
    "reasoning_tokens",
    "thoughtsTokenCount",
)
# Prompt tokens read from a cache and written into one, which Anthropic leaves out of `input_tokens`.
ANTHROPIC_CACHE_MEMBERS = ("cache_read_input_tokens", "cache_creation_input_tokens")
_WRITTEN_MEMBERS = (ANTHROPIC_CACHE_MEMBERS[1], "cacheWriteInputTokens")
TOTAL_MEMBERS = ("total_tokens", "totalTokens", "totalTokenCount")
# Member that the body of one choice of several has: how its answer was asked for, and the whole bill.
SHARE = "harvester_share"
# Members of the body that hold the counts.
USAGE_MEMBERS = ("usage", "usageMetadata", "usage_metadata", "token_usage")


def estimate_tokens(text_bytes: int) -> int:
    """Estimate the tokens of a text from its UTF-8 bytes: one per four bytes, rounded up."""
    return -(-text_bytes // BYTES_PER_TOKEN)


def fewest_tokens(text: str) -> int:
    """Return the fewest tokens that a text can be: a lower bound for every tokenizer known to us."""
    if not text:
        return 0
    words = len(text.split()) // MAX_WORDS_PER_TOKEN
    return max(1, words, len(text) // MAX_CHARS_PER_TOKEN)


def apportion(total: int, weights: Sequence[int]) -> list[int]:
    """Split an amount into whole parts in proportion to weights, by the method of the largest remainder.

    The parts add up to `total`. Each is its exact share rounded down; what is left goes, one each, to those
    with the largest remainders, the first ones among equals. Without any weight all parts count alike.
    """
    if not any(weights):
        weights = [1] * len(weights)
    whole = sum(weights)
    parts = [total * weight // whole for weight in weights]
    by_remainder = sorted(range(len(weights)), key=lambda at: -(total * weights[at] % whole))
    for at in by_remainder[: total - sum(parts)]:
        parts[at] += 1
    return parts


def usage_members(*holders: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the object with the counts, in the first holder that has one; empty where none has."""
    for holder in holders:
        for value in (*(holder.get(name) for name in USAGE_MEMBERS), _usage_of_groq(holder)):
            if isinstance(value, Mapping) and value:
                inner = value.get("tokens")
                return inner if isinstance(inner, Mapping) else value
        if "eval_count" in holder or "prompt_eval_count" in holder:
            return holder
    return {}


def _usage_of_groq(holder: Mapping[str, Any]) -> Any:
    """The counts in the last chunk of Groq's streams."""
    inner = holder.get("x_groq")
    return inner.get("usage") if isinstance(inner, Mapping) else None


def read_usage(fields: Mapping[str, Any], input_estimate: int, text: str, reasoning: str = "") -> Usage:
    """Return the counts of an answer: as reported where they can be true, else estimates that say so.

    Args:
        fields: the object with the counts; see `usage_members`.
        input_estimate: estimated tokens of the request; 0 where nothing is known of it.
        text: what of the answer was received besides reasoning: text, refusal, tool calls.
        reasoning: reasoning that was received; some teachers count it apart.
    """
    reported_input, reported_output = _first(fields, INPUT_MEMBERS), _first(fields, OUTPUT_MEMBERS)
    cached = _first(fields, CACHED_MEMBERS) or 0
    thought = _first(fields, REASONING_MEMBERS) or 0
    if not any(name in fields for name in OUTPUT_MEMBERS) and _first(fields, TOTAL_MEMBERS):
        reported_output = 0  # Gemini, where the answer is cut in its reasoning
    if reported_input is not None and reported_output is not None:
        reported_input, reported_output = _whole(fields, reported_input, reported_output, cached, thought)
    input_tokens, output_tokens = reported_input, reported_output
    if input_tokens is not None and input_tokens + cached < _fewest_input(input_estimate):
        input_tokens = None
    if output_tokens is not None and (
        output_tokens < fewest_tokens(text) or output_tokens + thought < fewest_tokens(text + reasoning)
    ):
        output_tokens = None
    if input_tokens is not None and output_tokens is not None:
        return Usage(input_tokens, output_tokens, cached_tokens=cached, reasoning_tokens=thought)
    is_reported = reported_input is not None and reported_output is not None
    written = len(text.encode("utf-8", "replace")) + len(reasoning.encode("utf-8", "replace"))
    return Usage(
        input_tokens=input_estimate if input_tokens is None else input_tokens,
        output_tokens=estimate_tokens(written) if output_tokens is None else output_tokens,
        source=USAGE_CORRECTED if is_reported else USAGE_ESTIMATED,
    )


def _whole(
    fields: Mapping[str, Any], input_tokens: int, output_tokens: int, cached: int, thought: int
) -> tuple[int, int]:
    """Return both counts with what the teacher counts beside them, and bills all the same.

    Gemini and xAI leave reasoning out of the output tokens, Anthropic and Bedrock their cache out of the
    input tokens. A total that is larger than both shows the first; a part that is larger than its whole shows
    either.
    """
    written = _first(fields, _WRITTEN_MEMBERS) or 0
    total = _first(fields, TOTAL_MEMBERS) or 0
    beside = total - input_tokens - output_tokens
    is_anthropic = "input_tokens" in fields and "prompt_tokens" not in fields
    is_apart = is_anthropic and any(name in fields for name in ANTHROPIC_CACHE_MEMBERS)
    if is_apart or cached > input_tokens or (beside > 0 and beside == cached + written):
        input_tokens += cached + written
    if thought > output_tokens:
        output_tokens += thought
    return input_tokens, max(output_tokens, total - input_tokens)


def share_members(usage: Usage) -> dict[str, Any]:
    """Return the object with the counts that `read_share` reads."""
    return {
        "prompt_tokens": usage.input_tokens,
        "completion_tokens": usage.output_tokens,
        "total_tokens": usage.input_tokens + usage.output_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.reasoning_tokens},
    }


def read_share(fields: Mapping[str, Any], share: Mapping[str, Any]) -> Usage:
    """Return the counts of one choice of several: its part of a bill that was checked as a whole."""
    source = share.get("source")
    return Usage(
        input_tokens=_first(fields, INPUT_MEMBERS) or 0,
        output_tokens=_first(fields, OUTPUT_MEMBERS) or 0,
        cached_tokens=_first(fields, CACHED_MEMBERS) or 0,
        reasoning_tokens=_first(fields, REASONING_MEMBERS) or 0,
        source=source if source in (USAGE_ESTIMATED, USAGE_CORRECTED) else USAGE_REPORTED,
    )


def split_usage(usage: Usage, weights: Sequence[int], reasoning_weights: Sequence[int]) -> list[Usage]:
    """Split the bill of one request over its rows, so that the sums of all counts are those of the bill.

    Args:
        weights: of the rows; what was written is split in proportion. Prompt tokens are split evenly.
        reasoning_weights: the same for reasoning.
    """
    evenly = [1] * len(weights)
    counts = zip(
        apportion(usage.input_tokens, evenly),
        apportion(usage.output_tokens, weights),
        apportion(usage.cached_tokens, evenly),
        apportion(usage.reasoning_tokens, reasoning_weights),
        strict=True,
    )
    return [Usage(*each, source=usage.source) for each in counts]


def _fewest_input(estimate: int) -> int:
    """Return the fewest tokens that a request with this estimate can have."""
    return max(1, estimate * BYTES_PER_TOKEN // MAX_CHARS_PER_TOKEN) if estimate > 0 else 0


def _first(fields: Mapping[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        if "." not in name:
            value = fields.get(name)
        else:
            group, _, member = name.rpartition(".")
            holder = fields.get(group)
            value = holder.get(member) if holder is not None and isinstance(holder, Mapping) else None
        if value is not None:
            return _count(value)
    return None


def _count(value: Any) -> int | None:
    """A count of tokens; None for what is none. Some servers write 12 as 12.0, or as text (protobuf)."""
    if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) < 10:
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_PLAUSIBLE_TOKENS:
        return None
    return value
