"""Open a token store, and write the file that says which of its rows a training learns. Loads no torch.

A store is a folder for one way of rendering: one tokenizer, one template, the same settings. `parts/` has the
rendered rows of each part of a corpus (`part`). `selections/` has a folder for each corpus and each way of
choosing among its rows: arrays of row numbers, and `selection.json`, written last.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from harvester.store.mixing import Mixing
from harvester.system import failpoints
from harvester.terms.lineage import Lineage
from trainer.config import TrainConfig
from trainer.data import array_file, dataset, row_rules, shared_questions
from trainer.data.chat_template import ROLES_REMEDY
from trainer.data.data_checks import Check, RowFaults, RowKinds
from trainer.data.dataset import Dataset
from trainer.data.soft_targets import SoftReport
from trainer.data.split_names import UnknownSplits
from trainer.data.tokens import part, soft_files
from trainer.data.tokens.part_reader import PartReader, RowNumbers, StoredExamples, not_as_written, unreadable
from trainer.data.tokens.row_record import RowFlag
from trainer.data.tokens.selection import Selection, select
from trainer.data.tokens.soft_files import ChosenRows, SoftTargetFiles
from trainer.data.tokens.stored_rows import StoredRendered, StoredRows, mask_of, teachers_of
from trainer.errors import StudentError

PARTS, SELECTIONS, FACTS = "parts", "selections", "selection.json"
# Threads that compare the files of parts with their hashes; hashing gives other threads time to run.
_HASHING_THREADS = 8
# `soft_files.write`, told the settings.
SoftWriter = Callable[[PartReader, ChosenRows, Path], tuple[SoftReport, dict[str, str]]]
# Arrays that are held in memory; those of "chosen.npz" also has lengths, which the parts tell, too.
_LOADED = {
    "learned.npz": ("rows", "lengths", "weights"),
    "chosen.npz": ("rows",),
    "held_out.npz": ("rows",),
}


@dataclass(frozen=True, slots=True)
class TokenStore:
    """A corpus as token ids, with what its rows were found to be.

    Attributes:
        data: the examples that are learned, read when they are asked for.
        rows: all rows to learn, and the held-out prompts.
        checks: what `data_checks.run_checks` finds, but for control tokens.
        control: control tokens that occur in the rows.
        highest_id: largest token id, where one is outside the student's vocabulary; else 0.
        folder: of the selection; packs are kept there, too.
        soft: how much of the teacher's log-probabilities is learned; None without `[train] soft_targets`.
    """

    data: Dataset
    rows: StoredRows
    rendered: StoredRendered
    checks: tuple[Check, ...]
    control: frozenset[int]
    highest_id: int
    terms: CorpusTerms
    folder: Path
    soft: SoftReport | None = None


@dataclass(frozen=True, slots=True)
class CorpusTerms:
    """What the terms of a corpus are checked by: teachers, and distinct values of `FACT_COLUMNS`."""

    lineages: Sequence[Lineage]
    facts: Sequence[dict[str, Any]]


def open_selection(home: Path, folder: Path) -> TokenStore | None:
    """Open a selection of a store; every byte of it is compared with its checksum.

    Args:
        home: the store. folder: of the selection.

    Returns:
        None where it is absent or damaged.
    """
    stored = part.read_checked(folder / FACTS)
    if stored is None:
        return None
    folders = [home / PARTS / name for name in stored["parts"]]
    facts = read_parts(folders)
    arrays = {name: array_file.read(folder / name, fields) for name, fields in _LOADED.items()}
    if any(each is None for each in facts) or any(each is None for each in arrays.values()):
        return None
    reader = PartReader(folders, [each for each in facts if each is not None])
    learned, chosen, held_out = (arrays[name] or {} for name in _LOADED)
    soft = soft_of_learned = places = None
    if stored["soft"] is not None:
        soft = soft_files.read(folder, stored["soft_files"])
        if soft is None:
            return None
        soft_of_learned = soft
    if len(learned["rows"]) == len(chosen["rows"]):
        learned["rows"] = chosen["rows"]  # all are learned
    else:
        places = _places(learned["rows"], chosen["rows"])
        soft_of_learned = None if soft is None else soft.of(places)
    weights = learned["weights"] if len(learned["weights"]) else None
    counts = {(teacher, terms, mock): rows for teacher, terms, mock, rows in stored["teachers"]}
    lineages = tuple(Lineage(lineage) for lineage in stored["lineages"])
    rows = StoredRows(
        reader,
        chosen["rows"],
        held_out["rows"],
        lineages,
        counts,
        tuple(stored["mixed"]),
    )
    return TokenStore(
        Dataset(
            StoredExamples(reader, learned["rows"], weights, soft_of_learned),
            learned["lengths"],
            stored["supervised"],
            Counter(stored["excluded"]),
            stored["sha256"],
            places,
        ),
        rows,
        StoredRendered(
            rows,
            StoredExamples(reader, chosen["rows"], None, soft),
            RowKinds(**stored["kinds"]),
            soft,
        ),
        tuple(Check(**check) for check in stored["checks"]),
        frozenset(stored["control"]),
        stored["highest_id"],
        CorpusTerms(lineages, stored["terms_facts"]),
        folder,
        None if stored["soft"] is None else SoftReport(**stored["soft"]),
    )


def _places(rows: RowNumbers, among: RowNumbers) -> npt.NDArray[np.int32]:
    """Return the place of each row among others that have all of them."""
    place_of = np.zeros(int(among.max()) + 1, dtype=np.int32)
    place_of[among] = np.arange(len(among), dtype=np.int32)
    return place_of[rows]


def read_parts(folders: Sequence[Path]) -> list[part.PartFacts | None]:
    """Check parts, several at a time; None for each that is absent or damaged."""
    with ThreadPoolExecutor(min(_HASHING_THREADS, os.cpu_count() or 1)) as threads:
        return list(threads.map(part.read_facts, folders))


def write_selection(  # noqa: PLR0913 - each is a fact of the corpus or of the settings
    home: Path,
    folder: Path,
    names: Sequence[str],
    config: TrainConfig,
    fault_names: Sequence[str],
    terms: CorpusTerms,
    write_soft: SoftWriter | None = None,
    only: npt.NDArray[np.bool_] | None = None,
) -> None:
    """Choose the rows of a corpus and write the selection.

    Args:
        folder: of the selection; what is in it is replaced.
        names: of the corpus's parts, in their order; all are whole.
        fault_names: `RowChecker.names`.
        only: see `selection.select`.
        write_soft: computes soft targets and writes them to the folder; None without.

    Raises:
        DataError: no row can be learned. StudentError: the chat template refuses rows.
        StoreError: a part was damaged since it was checked.
        OSError: the disk is full or refuses.
    """
    folders = [home / PARTS / name for name in names]
    read = list(read_parts(folders))
    for folder_of_part, facts in zip(folders, read, strict=True):
        if facts is None:  # hours may lie between the check of the parts and an audit's last fold
            raise unreadable(folder_of_part, "it is damaged, or was removed")
    reader = PartReader(folders, [facts for facts in read if facts is not None])
    _require_rows(reader, config)
    selection = select(reader, config.data, only)
    _require_learnable(reader, selection, config)
    lengths = reader.column("length")[selection.chosen]
    prompts = reader.column("prompt_length")[selection.chosen]
    too_long = lengths > row_rules.longest_row(config)
    nothing = ~too_long & ~((lengths > prompts) & (prompts > 0))
    fits = ~(too_long | nothing)
    excluded = Counter(selection.excluded)
    excluded.update({"too long": int(too_long.sum()), "nothing supervised": int(nothing.sum())})
    if not fits.any():
        raise dataset.nothing_fits(config)
    weights = None if selection.weights is None else selection.weights[fits]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    learned = selection.chosen if fits.all() else selection.chosen[fits]
    if config.data.weights == "prompt":
        weights = _shared_by_prompt(reader, learned)
    array_file.write(
        folder / "learned.npz",
        {
            "rows": learned,
            "lengths": lengths[fits] - 1,
            "weights": np.zeros(0) if weights is None else weights,
        },
    )
    array_file.write(
        folder / "chosen.npz",
        {"rows": selection.chosen, "lengths": lengths, "supervised": lengths - prompts},
    )
    supervised = int(((lengths - prompts) * fits).sum(dtype=np.int64))
    del lengths, prompts, too_long, nothing
    report, files, soft = None, dict[str, str](), None
    if write_soft is not None:
        report, files = write_soft(reader, ChosenRows(selection.chosen, fits), folder)
        failpoints.reach("tokens.soft_written")
        soft = _soft_of(folder, files)
        soft = soft if fits.all() else soft.of(fits)
    digest = hashlib.sha256()
    for example in StoredExamples(reader, learned, weights, soft):
        dataset.hash_example(digest, example)
    flags = reader.column("flags")[selection.chosen]
    bits = reader.column("faults")[selection.chosen]
    control = _control_tokens(reader, selection.chosen)
    ends = (flags & RowFlag.TERMINATED) != 0
    faults = RowFaults(bits, selection.respelled, control, bool(ends.any()), int(fits.sum()))
    checks = faults.checks(fault_names, lambda place: reader.prompt_id(int(selection.chosen[place])))
    settings, splits = Mixing(config.corpus), UnknownSplits(config.data.split_field)
    for facts in reader.facts:
        settings.add_counts(facts.settings)
        splits.add_counts(facts.splits)
    kinds = RowKinds(
        int(((flags & RowFlag.THINKING) != 0).sum()),
        int(((flags & RowFlag.REASONING) != 0).sum()),
        int((~ends).sum()),
    )
    array_file.write(folder / "held_out.npz", {"rows": selection.held_out})
    failpoints.reach("tokens.before_selection")
    part.write_checked(
        folder / FACTS,
        {
            "parts": list(names),
            "sha256": digest.hexdigest(),
            "supervised": supervised,
            "excluded": +excluded,
            "teachers": [[*teacher, rows] for teacher, rows in teachers_of(reader, selection.chosen).items()],
            "lineages": [dict(lineage.stored) for lineage in terms.lineages],
            "terms_facts": list(terms.facts),
            "mixed": [
                *settings.notes(),
                *splits.notes(),
                *shared_questions.notes(selection.with_shared_question, len(selection.chosen)),
            ],
            "kinds": asdict(kinds),
            "soft": None if report is None else asdict(report),
            "soft_files": files,
            "checks": [asdict(check) for check in checks],
            "control": sorted(control),
            "highest_id": _highest_outside(reader, learned, bits[fits], fault_names),
        },
    )
    failpoints.reach("tokens.selection_written")


def _shared_by_prompt(reader: PartReader, rows: RowNumbers) -> npt.NDArray[np.float64]:
    """Return the weights of rows as `answers.shared_by_prompt` does."""
    _, prompts, counts = np.unique(reader.gather(rows, "prompt"), return_inverse=True, return_counts=True)
    return np.asarray(1.0 / counts[prompts], dtype=np.float64)


def _soft_of(folder: Path, files: Mapping[str, str]) -> SoftTargetFiles:
    """Return the soft targets that were just written."""
    soft = soft_files.read(folder, files, check=False)
    if soft is None:
        raise not_as_written(folder)
    return soft


def _require_rows(reader: PartReader, config: TrainConfig) -> None:
    """Refuse a corpus of which no row was chosen, as `dataset.read` does."""
    if not len(reader):
        left_out = sum(facts.left_out for facts in reader.facts)
        raise dataset.nothing_chosen(config, left_out)


def _require_learnable(reader: PartReader, selection: Selection, config: TrainConfig) -> None:
    """Refuse a selection without a row to learn, or with rows that the chat template refuses."""
    if not len(selection.chosen):
        raise dataset.nothing_to_learn(config, selection.excluded)
    refused = selection.chosen[(reader.gather(selection.chosen, "flags") & RowFlag.REFUSED) != 0]
    if len(refused):
        first = int(refused[0])
        raise StudentError(
            f"{reader.text(first)}: {len(refused):,} of {len(selection.chosen):,} rows, "
            f"the first is {reader.prompt_id(first)!r}",
            place=str(config.base),
            remedy=ROLES_REMEDY,
        )


def _control_tokens(reader: PartReader, rows: RowNumbers) -> frozenset[int]:
    """Return the control tokens that occur in rows."""
    is_chosen = mask_of(reader, rows)
    tokens: set[int] = set()
    for number, first, records in reader.records():
        for place in np.unique(records["control"][is_chosen[first : first + len(records)]]).tolist():
            tokens.update(reader.facts[number].controls[place])
    return frozenset(tokens)


def _highest_outside(reader: PartReader, rows: RowNumbers, bits: Any, fault_names: Sequence[str]) -> int:
    """Return the largest id of the rows with an id outside the vocabulary; 0 if there are none."""
    [bit] = [bit for bit, name in enumerate(fault_names) if name.startswith("token ids outside")]
    outside = StoredExamples(reader, rows[(bits >> bit) & 1 != 0])
    return max((int(example.ids.max()) for example in outside), default=0)
