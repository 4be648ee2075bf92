"""Choose the rows of the token store that are learned, and the held-out prompts. Loads no torch.

The rules are those of `dataset.read` and `dataset.select`, on arrays: which split, which prompt was held out
under another id, which answer is shared, which answers of a prompt count. Some tens of bytes of each
row are held.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from harvester.quality.verifiers.verifiers import AnswerVerdict
from trainer.config import DataSection
from trainer.data import answers
from trainer.data.tokens.part_reader import PartReader, RowNumbers
from trainer.data.tokens.row_order import sorted_rows
from trainer.data.tokens.row_record import RECORD, RowFlag, has

_VERDICTS = tuple(AnswerVerdict)


@dataclass(frozen=True, slots=True)
class Selection:
    """Rows by number, in the order in which they are counted: by prompt id, sample number and key.

    Attributes:
        chosen: rows to learn, those too long included.
        weights: [chosen] of the rows in the loss; None: all count alike.
        respelled: [chosen] whether the prompt is a held-out one in another spelling.
        with_shared_question: how many of `chosen` ask the question of a held-out prompt under another system
            prompt.
        held_out: the first row of each held-out prompt that is text; prompts are known by id and content.
        excluded: rows in neither part, by reason.
    """

    chosen: RowNumbers
    weights: npt.NDArray[np.float64] | None
    respelled: npt.NDArray[np.bool_]
    with_shared_question: int
    held_out: RowNumbers
    excluded: Mapping[str, int]


def select(reader: PartReader, data: DataSection, only: npt.NDArray[np.bool_] | None = None) -> Selection:
    """Choose rows; `chosen` is empty where none can be learned.

    Args:
        only: whether each row of the training split is taken at all; None: all are. Held-out rows are.
    """
    flags = reader.column("flags")
    excluded = _reasons(reader, only)
    excluded["not chosen by where"] += sum(facts.left_out for facts in reader.facts)
    order = sorted_rows(reader)
    is_candidate = (flags & RowFlag.LEARNABLE) != 0
    if only is not None:
        is_candidate &= only
    leaked = _mask_of(reader, is_candidate, _leaked(reader))
    excluded["leaked"] += int(leaked.sum())
    is_candidate &= ~leaked
    del leaked
    chosen = order[is_candidate[order]]
    shared = _shared(reader, chosen)
    excluded["shared answer"] += int(shared.sum())
    chosen = chosen[~shared]
    is_text = (flags & (RowFlag.HELD_OUT | RowFlag.TEXT)) == (RowFlag.HELD_OUT | RowFlag.TEXT)
    held_out = order[is_text[order]]
    held_out = held_out[_is_first_of_prompt(reader, held_out)]
    del order, flags, is_candidate, is_text
    weights = None
    if answers.compares_answers(data) and len(chosen):
        chosen, weights, reasons = _compared(reader, chosen, data)
        excluded.update(reasons)
    respelled, shared_question = (
        _repeats(reader, chosen, held_out, name) for name in ("spelling", "question")
    )
    return Selection(
        chosen, weights, respelled, int((shared_question & ~respelled).sum()), held_out, +excluded
    )


def _reasons(reader: PartReader, only: npt.NDArray[np.bool_] | None) -> Counter[str]:
    """Count the rows that something in themselves keeps from being learned, by reason."""
    excluded: Counter[str] = Counter()
    for number, first, records in reader.records():
        reasons = records["reason"]
        if only is not None:
            reasons = reasons[only[first : first + len(records)] | has(records, RowFlag.HELD_OUT)]
        counts = np.bincount(reasons, minlength=len(reader.facts[number].reasons))
        excluded.update(dict(zip(reader.facts[number].reasons, counts.tolist(), strict=True)))
    del excluded[""]
    return excluded


def _mask_of(
    reader: PartReader, candidates: npt.NDArray[np.bool_], held_out: npt.NDArray[Any]
) -> npt.NDArray[np.bool_]:
    """Return for each row whether it is a candidate whose prompt is among the held-out ones."""
    mask = np.zeros(len(reader), dtype=bool)
    for _, first, records in reader.records():
        part = slice(first, first + len(records))
        mask[part] = candidates[part] & is_in(records["prompt"], held_out)
    return mask


def _leaked(reader: PartReader) -> npt.NDArray[Any]:
    """Return the prompts of all held-out rows, sorted."""
    parts = [records["prompt"][has(records, RowFlag.HELD_OUT)] for _, _, records in reader.records()]
    return np.unique(np.concatenate(parts)) if parts else np.zeros(0, dtype="S16")


def is_in(values: npt.NDArray[Any], known: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which values are among sorted ones."""
    if not len(known):
        return np.zeros(len(values), dtype=bool)
    places = np.minimum(np.searchsorted(known, values), len(known) - 1)
    return np.asarray(known[places] == values)


def _shared(reader: PartReader, rows: RowNumbers) -> npt.NDArray[np.bool_]:
    """Return which rows have the key of an earlier one."""
    short = reader.short_keys()[rows]
    ordered = np.sort(short)
    repeated = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    is_shared = np.zeros(len(rows), dtype=bool)
    if not len(repeated):
        return is_shared
    places = np.flatnonzero(is_in(short, repeated))
    _, firsts = np.unique(reader.gather(rows[places], "key"), return_index=True)
    is_shared[places] = True
    is_shared[places[firsts]] = False
    return is_shared


def _is_first_of_prompt(reader: PartReader, rows: RowNumbers) -> npt.NDArray[np.bool_]:
    """Return which of the sorted rows is the first of its prompt."""
    is_first = np.zeros(len(rows), dtype=bool)
    is_first[np.unique(ids_and_contents(reader, rows), return_index=True)[1]] = True
    return is_first


def ids_and_contents(reader: PartReader, rows: RowNumbers) -> npt.NDArray[Any]:
    """Return what held-out prompts are known by: [rows] bytes, hashes of prompt id and content."""
    joined = np.empty((len(rows), 2), dtype=RECORD["id"])
    joined[:, 0], joined[:, 1] = reader.gather(rows, "id"), reader.gather(rows, "prompt")
    return joined.view(f"S{2 * RECORD['id'].itemsize}")[:, 0]


def _repeats(
    reader: PartReader, chosen: RowNumbers, held_out: RowNumbers, name: str
) -> npt.NDArray[np.bool_]:
    """Return which of the chosen rows have a hash, of this name, that a held-out prompt has, too."""
    known = np.unique(reader.gather(held_out, name))
    known = known[known != b""]
    if not len(known):
        return np.zeros(len(chosen), dtype=bool)
    mask = np.zeros(len(reader), dtype=bool)
    for _, first, records in reader.records():
        mask[first : first + len(records)] = is_in(records[name], known)
    return np.asarray(mask[chosen])


def _compared(
    reader: PartReader, chosen: RowNumbers, data: DataSection
) -> tuple[RowNumbers, npt.NDArray[np.float64], Counter[str]]:
    """Choose among the answers to each prompt; return the rows, their weights, and the others by reason."""
    weights = np.zeros(len(chosen), dtype=np.float64)
    excluded: Counter[str] = Counter()
    texts, verdicts = reader.gather(chosen, "answer"), reader.gather(chosen, "verdict")
    for places in places_by_prompt(reader.gather(chosen, "prompt")):
        of_rows = [_VERDICTS[number] for number in verdicts[places].tolist() if number < len(_VERDICTS)]
        of_prompt, reasons = answers.choose_of_prompt(texts[places].tolist(), of_rows, data)
        excluded.update(reasons)
        for place, weight in of_prompt.items():
            weights[places[place]] = weight
    is_kept = weights > 0
    return chosen[is_kept], weights[is_kept], excluded


def places_by_prompt(prompts: npt.NDArray[Any]) -> Iterator[npt.NDArray[np.int64]]:
    """Yield the places of the rows of each prompt, in their order."""
    order = np.argsort(prompts, kind="stable")
    ordered = prompts[order]
    bounds = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1], [True]]))
    del ordered
    for begin, end in pairwise(bounds):
        yield order[begin:end]
