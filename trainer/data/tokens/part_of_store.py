"""Choose among the rows of a token store anew, as if its corpus had some of them only. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from trainer.config import TrainConfig
from trainer.data.tokens import token_store
from trainer.data.tokens.disk_errors import disk_errors
from trainer.data.tokens.part_reader import PartReader, RowNumbers
from trainer.data.tokens.row_record import RECORD, first_64_bits
from trainer.data.tokens.selection import is_in
from trainer.data.tokens.token_store import TokenStore
from trainer.errors import StoreError


def choose(
    store: TokenStore, config: TrainConfig, fault_names: Sequence[str], folder: Path, rows: RowNumbers
) -> TokenStore:
    """Choose as `dataset.read` does with `only`: held-out rows are all there, of the others some keys.

    Args:
        config: of the training; its `[data]` is that of the store. Soft targets are left out.
        fault_names: `RowChecker.names`.
        folder: of the selection that is written; what is in it is replaced.
        rows: whose keys are taken.

    Raises:
        DataError, StudentError: see `token_store.write_selection`.
        StoreFull, StoreError: the disk is full or refuses.
    """
    reader = store.rows.reader
    folders = [reader.folder(number) for number in range(len(reader.facts))]
    home = folders[0].parent.parent
    only = with_keys_of(reader, rows)
    names = [each.name for each in folders]
    with disk_errors(folder):
        token_store.write_selection(home, folder, names, config, fault_names, store.terms, only=only)
        opened = token_store.open_selection(home, folder)
    if opened is None:
        raise StoreError(
            "rows that were just chosen read back otherwise", place=str(folder), remedy="check the disk"
        )
    return replace(opened, rows=replace(opened.rows, mixed=store.rows.mixed))


def with_keys_of(reader: PartReader, rows: RowNumbers) -> npt.NDArray[np.bool_]:
    """Return for all rows whether they have the key of one of some rows."""
    mask = np.zeros(len(reader), dtype=bool)
    mask[rows] = True
    short = np.unique(reader.short_keys()[rows])
    others = []
    for _, first, records in reader.records():
        has_short = is_in(first_64_bits(records["key"], RECORD["key"].itemsize), short)
        others.append(first + np.flatnonzero(has_short & ~mask[first : first + len(records)]))
    # Answers that several prompts share, and hashes that begin alike: few.
    others_rows = np.concatenate(others).astype(np.uint32)
    if len(others_rows):
        alike = np.unique(first_64_bits(reader.gather(others_rows, "key"), RECORD["key"].itemsize))
        sharing = rows[is_in(reader.short_keys()[rows], alike)]
        keys = np.unique(reader.gather(sharing, "key"))
        mask[others_rows[is_in(reader.gather(others_rows, "key"), keys)]] = True
    return mask
