"""Compare an answer with a reference text, as shares from 0 to 1. Works on any language; loads no torch.

chrF comes from sacrebleu, the longest common subsequence from rapidfuzz; both are in the extra `eval`.
Without them those two metrics are left out.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

from harvester.quality.verifiers import comparisons

_WORD = re.compile(r"\w+")
# A number that is all of a reference, or nearly: "42", "$1,200.50", "75 %".
_NUMBER_ONLY = re.compile(r"[$€£]?\s?[-+]?[\d,]*\.?\d+(?:[eE][-+]?\d+)?\s?[%$€£]?\.?")
# Letters of a multiple choice: all, as the reference does not say how many there are.
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
# Largest relative difference of two numbers that count as equal.
NUMBER_TOLERANCE = 1e-9
_LETTER_ONLY = re.compile(r"\(?[A-Z]\)?\.?")
# A piece that is repeated to the end this often or more is a loop; at least so many characters in all.
_LOOP_TIMES, _LOOP_CHARACTERS, _LOOP_PIECE = 4, 24, 200

Metric = Callable[[str, str], float | None]


def words(text: str) -> list[str]:
    """Return the words of a text in lower case; in scripts without spaces each character is one.

    Unlike rouge-score's tokenizer, which drops all letters but a to z.
    """
    folded = unicodedata.normalize("NFKC", text).casefold()
    found: list[str] = []
    for match in _WORD.finditer(folded):
        run = ""
        for character in match.group():
            if comparisons.has_no_spaces(character):
                found += [run, character] if run else [character]
                run = ""
            else:
                run += character
        if run:
            found.append(run)
    return found


def token_f1(answer: str, reference: str) -> float:
    """Return the F1 of words, repetitions counted (Rajpurkar et al. 2016, SQuAD, but with articles)."""
    ours, theirs = words(answer), words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    common = (Counter(ours) & Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))


def rouge_l(answer: str, reference: str) -> float:
    """Return ROUGE-L (Lin 2004): F1 of the longest common subsequence of words."""
    from rapidfuzz.distance import LCSseq

    ours, theirs = words(answer), words(reference)
    if not ours or not theirs:
        return float(ours == theirs)
    return 2 * LCSseq.similarity(ours, theirs) / (len(ours) + len(theirs))


def chrf(answer: str, reference: str) -> float:
    """Return chrF2 (Popović 2015): F2 of character n-grams up to 6, white space left out."""
    if not reference.strip():
        return float(not answer.strip())
    return float(_chrf().sentence_score(answer, [reference]).score) / 100


@cache
def _chrf() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


def _number(answer: str, reference: str) -> float | None:
    if not _NUMBER_ONLY.fullmatch(reference.strip()):
        return None
    is_right = comparisons.is_number_near(answer, reference, 0, NUMBER_TOLERANCE)
    return None if is_right is None else float(is_right)


def _choice(answer: str, reference: str) -> float | None:
    if not _LETTER_ONLY.fullmatch(reference.strip()):
        return None
    is_right = comparisons.is_choice(answer, reference, LETTERS)
    return None if is_right is None else float(is_right)


def _contains(answer: str, reference: str) -> float | None:
    is_right = comparisons.contains_reference(answer, reference)
    return None if is_right is None else float(is_right)


def available_metrics() -> Mapping[str, Metric]:
    """Return the metrics by name. A metric that does not apply to a reference returns None."""
    metrics: dict[str, Metric] = {
        "exact": lambda answer, reference: float(comparisons.is_exact(answer, reference)),
        "normalised": lambda answer, reference: float(comparisons.is_normalised_equal(answer, reference)),
        "contains": _contains,
        "numeric": _number,
        "choice": _choice,
        "token_f1": token_f1,
    }
    if find_spec("sacrebleu") is not None:
        metrics["chrf"] = chrf
    if find_spec("rapidfuzz") is not None:
        metrics["rouge_l"] = rouge_l
    return metrics


def missing_metrics() -> list[str]:
    """Return the packages of the extra `eval` that are not installed."""
    return [name for name in ("sacrebleu", "rapidfuzz") if find_spec(name) is None]


def ends_in_loop(text: str) -> bool:
    """Whether an answer ends with one piece of up to 200 characters, repeated four times or more."""
    for length in range(1, min(_LOOP_PIECE, len(text) // _LOOP_TIMES) + 1):
        times = max(_LOOP_TIMES, -(-_LOOP_CHARACTERS // length))
        piece = text[-length:]
        if piece.strip() and text.endswith(piece * times):
            return True
    return False
