"""Define the filters of `harvester curate`: functions from a Sample to None (keep) or a Drop with a reason.

A filter with state (duplicates) is built anew for each curation. No filter reads a clock, a file or a random
number.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from harvester.errors import ConfigError
from harvester.export.score import candidate_of
from harvester.similarity.duplicates import DEFAULT_THRESHOLD, LEAST_THRESHOLD, Duplicates
from harvester.store.shards.schema import Sample
from harvester.store.where import Where
from harvester.verify.verifiers import AnswerVerdict, Verifiers


@dataclass(frozen=True, slots=True)
class Drop:
    """Why a sample is dropped; `reason` is a short stable name that is counted, `detail` is for people."""

    reason: str
    detail: str = ""


# Returns None to keep the sample.
Filter = Callable[[Sample], Drop | None]


def chain(filters: Sequence[Filter]) -> Filter:
    """Combine filters: the first one that drops a sample decides."""

    def chained(sample: Sample) -> Drop | None:
        return next((drop for each in filters if (drop := each(sample)) is not None), None)

    return chained


def finished(sample: Sample) -> Drop | None:
    """Drop answers that are truncated, filtered, refused, empty or only a tool call."""
    return None if sample.outcome == "ok" else Drop(f"outcome_{sample.outcome}")


def not_blank(sample: Sample) -> Drop | None:
    """Drop completions of white space only."""
    return None if (sample.completion or "").strip() else Drop("blank")


def agrees_with_reference(sample: Sample) -> Drop | None:
    """Drop answers that differ from the prompt's reference, where it has one (rejection sampling)."""
    if sample.reference is None or (sample.completion or "").strip() == sample.reference.strip():
        return None
    return Drop("differs_from_reference")


def verified(verifiers: Verifiers) -> Filter:
    """Build a filter that keeps the answers that pass the verifier of their task.

    Answers that nobody can verify are dropped under a reason of their own.
    """

    def check(sample: Sample) -> Drop | None:
        verdict = verifiers.judge(candidate_of(sample)).verdict
        return None if verdict == AnswerVerdict.PASSED else Drop(f"verify_{verdict}")

    return check


def longest(characters: int) -> Filter:
    """Build a filter that drops completions longer than `characters`."""

    def check(sample: Sample) -> Drop | None:
        return Drop("too_long") if len(sample.completion or "") > characters else None

    return check


def of_runs(run_ids: Collection[str]) -> Filter:
    """Build a filter that drops answers of other runs than these."""
    kept = frozenset(run_ids)

    def check(sample: Sample) -> Drop | None:
        return None if sample.run_id in kept else Drop("other_run")

    return check


def chosen_by(where: Where) -> Filter:
    """Build a filter that drops the rows that a condition does not choose."""

    def check(sample: Sample) -> Drop | None:
        return None if where.matches(sample) else Drop("where")

    return check


def no_duplicates() -> Filter:
    """Build a filter that drops a repeated (conversation, completion), with NFKC, case and space folded."""
    seen: set[bytes] = set()

    def check(sample: Sample) -> Drop | None:
        parts = [str(message.get("content")) for message in sample.messages] + [sample.completion or ""]
        text = "\x1f".join(" ".join(unicodedata.normalize("NFKC", part).casefold().split()) for part in parts)
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if digest in seen:
            return Drop("duplicate")
        seen.add(digest)
        return None

    return check


def near_duplicates(threshold: float, of: str = "row") -> Filter:
    """Build a filter that drops what nearly repeats an earlier row, its prompt or its answer.

    Args:
        threshold: least Jaccard similarity of the sets of character shingles, 0 to 1.
        of: "row" compares conversation and answer, "answer" the answer alone. "prompt" compares
            conversations; further samples of one prompt are kept.
    """
    duplicates = Duplicates("near", threshold)

    def check(sample: Sample) -> Drop | None:
        turns = [str(message.get("content") or "") for message in sample.messages]
        parts = {
            "row": [*turns, sample.completion or ""],
            "prompt": turns,
            "answer": [sample.completion or ""],
        }
        match = duplicates.find("\n".join(parts[of]), sample.prompt_id)
        if match is None or (of == "prompt" and match.similarity == 1.0):
            return None
        return Drop("near_duplicate", f"of the row of {match.label} ({match.similarity:.2f})")

    return check


def named(name: str, value: object = None, verifiers: Verifiers | None = None) -> Filter:
    """Return the filter of that name in curate.toml.

    Args:
        value: the parameter of a filter that has one.
        verifiers: those of `[verify]`, for `verified`.

    Raises:
        ConfigError: the name is unknown, `longest` without a positive number, `run` without run ids, or
            `verified` without a verifier.
    """
    if name == "longest":
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise ConfigError("filter 'longest' needs a positive number of characters")
        return longest(value)
    if name == "run":
        run_ids = [value] if isinstance(value, str) else value
        if not isinstance(run_ids, list) or not run_ids or not all(isinstance(one, str) for one in run_ids):
            raise ConfigError("filter 'run' needs the id of a run, or a list of them")
        return of_runs(run_ids)
    if name == "verified":
        if not verifiers:
            remedy = 'add [verify.TASK] kind = "exact"; `*` is every task'
            raise ConfigError("filter 'verified' needs a table [verify]", remedy=remedy)
        return verified(verifiers)
    if name == "no_duplicates":
        return no_duplicates()
    if name == "near_duplicates":
        return _near_duplicates(value)
    plain: dict[str, Filter] = {
        "finished": finished,
        "not_blank": not_blank,
        "agrees_with_reference": agrees_with_reference,
    }
    if name not in plain:
        raise ConfigError(f"unknown filter {name!r}", remedy=f"known: {', '.join(FILTER_NAMES)}")
    return plain[name]


def _near_duplicates(value: object) -> Filter:
    given = DEFAULT_THRESHOLD if value is None else value
    table: dict[str, Any] = value if isinstance(value, dict) else {"threshold": given}
    threshold, of = table.get("threshold", DEFAULT_THRESHOLD), table.get("of", "row")
    is_number = isinstance(threshold, int | float) and not isinstance(threshold, bool)
    if table.keys() - {"threshold", "of"} or of not in {"row", "prompt", "answer"} or not is_number:
        raise ConfigError(
            "filter 'near_duplicates' takes a threshold, and what is compared",
            remedy='{near_duplicates = {threshold = 0.8, of = "row"}}, or of "prompt" or "answer"',
        )
    if not LEAST_THRESHOLD <= threshold <= 1:
        raise ConfigError(f"filter 'near_duplicates' needs a threshold from {LEAST_THRESHOLD} to 1")
    return near_duplicates(threshold, of)


FILTER_NAMES = (
    "finished",
    "not_blank",
    "agrees_with_reference",
    "verified",
    "longest",
    "no_duplicates",
    "near_duplicates",
    "run",
)
