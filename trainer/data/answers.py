"""Choose which answers of a prompt are learned, and how much each of them counts. Loads no torch.

A prompt may have many answers (`samples` of the harvest). `[data] answers` says which of them are learned,
`per_prompt` how many at most, and `weights` how much a row counts in the loss.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

from harvester.export.score import candidate_of
from harvester.quality.verifiers.comparisons import normalise
from harvester.quality.verifiers.verifiers import AnswerVerdict, Verifiers
from harvester.store.shards.schema import Sample
from trainer.config import DataSection

# How answers are ranked by verdict: an answer that nobody can verify comes before one that failed.
_RANK = {AnswerVerdict.PASSED: 0, AnswerVerdict.UNVERIFIABLE: 1, AnswerVerdict.FAILED: 2}

# Version of `shared_by_prompt`. 2: a row that is too long leaves its share to the others of its prompt.
_SHARED_BY_PROMPT = 2


@dataclass(frozen=True, slots=True)
class Chosen:
    """Samples to learn, in their order, with their weights in the loss, and the others counted by reason.

    `weights` are positive; empty: all rows count alike.
    """

    samples: tuple[Sample, ...]
    weights: tuple[float, ...]
    excluded: Mapping[str, int]


def compares_answers(data: DataSection) -> bool:
    """Whether the answers to a prompt are chosen or weighed by comparing them."""
    return data.answers != "all" or data.per_prompt is not None or data.weights != "row"


def choose(
    samples: Sequence[Sample], prompts: Sequence[str], data: DataSection, verifiers: Verifiers
) -> Chosen:
    """Choose the answers to learn, prompt by prompt.

    Args:
        samples: usable answers, those of a prompt in order of their sample numbers.
        prompts: what identifies the prompt of each sample.
    """
    if not compares_answers(data):
        return Chosen(tuple(samples), (), {})
    by_prompt: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        by_prompt.setdefault(prompt, []).append(number)
    weights: dict[int, float] = {}
    excluded: Counter[str] = Counter()
    for numbers in by_prompt.values():
        chosen, reasons = _choose_of_prompt([samples[n] for n in numbers], data, verifiers)
        excluded.update(reasons)
        weights.update({numbers[place]: weight for place, weight in chosen.items()})
    kept = sorted(weights)
    return Chosen(tuple(samples[n] for n in kept), tuple(weights[n] for n in kept), +excluded)


def _choose_of_prompt(
    answers: Sequence[Sample], data: DataSection, verifiers: Verifiers
) -> tuple[dict[int, float], Counter[str]]:
    """Return the weights of the answers of one prompt that are learned, and the reasons for the others."""
    texts = [normalise(answer.completion or "") for answer in answers]
    needs_verdicts = data.answers in {"verified", "best"}
    verdicts = [verifiers.judge(candidate_of(answer)).verdict for answer in answers] if needs_verdicts else ()
    return choose_of_prompt(texts, verdicts, data)


def choose_of_prompt(
    texts: Sequence[Hashable], verdicts: Sequence[AnswerVerdict], data: DataSection
) -> tuple[dict[int, float], Counter[str]]:
    """Choose among the answers to one prompt, by their normalised texts or hashes of these.

    Args:
        verdicts: of the verifiers, where `[data] answers` is "verified" or "best".

    Returns:
        The weights by place of the answers that are learned, and the reasons for the others.
    """
    shares = _shares(texts)
    places = list(range(len(texts)))
    excluded: Counter[str] = Counter()
    if data.answers == "majority":
        # The first of several texts that are equally frequent.
        most_frequent = texts[shares.index(max(shares))]
        places = [place for place in places if texts[place] == most_frequent]
        excluded["minority answer"] = len(texts) - len(places)
    elif data.answers == "verified":
        places = [place for place in places if verdicts[place] == AnswerVerdict.PASSED]
        excluded.update(f"verification: {verdict}" for verdict in verdicts)
        excluded[f"verification: {AnswerVerdict.PASSED}"] = 0
    elif data.answers == "best":
        places.sort(key=lambda place: (_RANK[verdicts[place]], -shares[place], place))
    most_rows = data.per_prompt or (1 if data.answers == "best" else len(places))
    excluded["beyond per_prompt"] = max(0, len(places) - most_rows)
    places = places[:most_rows]
    return {place: _weight(data, shares[place], len(places)) for place in places}, excluded


def _weight(data: DataSection, share: float, rows: int) -> float:
    if data.weights == "agreement":
        return share
    return 1.0 / rows if data.weights == "prompt" else 1.0


def shared_by_prompt(prompts: Sequence[str]) -> tuple[float, ...]:
    """Return the weights of rows whose prompts all count alike.

    A row that turns out to be too long takes nothing from the others of its prompt, so the weights are
    computed once it is known which rows are learned.

    Args:
        prompts: what identifies the prompt of each row; "" for a row that isn't learned.
    """
    rows = Counter(prompts)
    return tuple(1.0 / rows[prompt] for prompt in prompts)


def version_of_weights(data: DataSection) -> dict[str, int]:
    """Return what the key of a training has to hold beside its rows; most keys need nothing.

    The weights of `shared_by_prompt` depend on which rows are too long, so no hash of the rows and their
    weights tells how they are computed.
    """
    return {"weights": _SHARED_BY_PROMPT} if data.weights == "prompt" else {}


def agreement(texts: Sequence[str]) -> list[float]:
    """Return for each text the share of the texts that are equal to it once normalised, in (0, 1]."""
    return _shares([normalise(text) for text in texts])


def _shares(texts: Sequence[Hashable]) -> list[float]:
    counts = Counter(texts)
    return [counts[text] / len(texts) for text in texts]
