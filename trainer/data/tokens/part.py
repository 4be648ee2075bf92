"""Write and read one part of the token store: the rows of some row groups, rendered. Loads no torch.

A part is a folder. `rows.bin` has a record for each row (`row_record.RECORD`), `ids.bin` the token ids as
int32 one row after the other, `texts.bin` texts in UTF-8: first the prompt ids of all rows, then other texts.
All are little-endian and without a header, so that each can be mapped. With `[train] soft_targets` a part has
the files of `part_signal`, too. `part.json` is written last; it has the size and the SHA-256 of each file,
and one of its own content. A part whose files differ from it counts as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from harvester.system import failpoints
from harvester.system.files import fsync, sha256_of
from trainer.data.tokens.row_record import RECORD, Records

ROWS, IDS, TEXTS = FILES = ("rows.bin", "ids.bin", "texts.bin")
SIGNAL_ROWS, SIGNAL, SIGNAL_TOKENS = SIGNAL_FILES = ("signal_rows.bin", "signal.bin", "signal_tokens.json")
FACTS = "part.json"


@dataclass(frozen=True, slots=True)
class PartFacts:
    """Describe a part beyond its rows.

    Attributes:
        rows: rows in it. left_out: rows of the corpus that `[data] where` doesn't choose.
        reasons: why a row is left out, by the number in its record; the first is "".
        teachers: (teacher, terms, mock) by the number in a record.
        controls: sets of control tokens by the number in a record.
        settings: how many rows were asked under which settings, see `harvester.store.mixing.Mixing.counts`.
        splits: how many rows have a split of an unusual name, by the name.
    """

    rows: int
    left_out: int = 0
    reasons: tuple[str, ...] = ("",)
    teachers: tuple[tuple[str, str, bool], ...] = ()
    controls: tuple[tuple[int, ...], ...] = ()
    settings: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    splits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PartContent:
    """Hold a part in memory: records, ids (int32) and texts as bytes, and the facts.

    Attributes:
        signal: the files of `part_signal`, by name; empty without soft targets.
    """

    records: Records
    ids: bytes
    texts: bytes
    facts: PartFacts
    signal: Mapping[str, bytes] = field(default_factory=dict)


def write(folder: Path, content: PartContent) -> None:
    """Write a part under a temporary name and rename it; a part of this name is replaced.

    Raises:
        OSError: the disk is full or refuses; no part of this name is left half written.
    """
    hidden = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(hidden, ignore_errors=True)
    try:
        hidden.mkdir(parents=True)
        contents = dict(zip(FILES, (content.records.tobytes(), content.ids, content.texts), strict=True))
        contents.update(content.signal)
        for name, data in contents.items():
            (hidden / name).write_bytes(data)
            fsync(hidden / name)
        failpoints.reach("tokens.files_written")
        files = {
            name: {"bytes": (hidden / name).stat().st_size, "sha256": sha256_of(hidden / name)}
            for name in contents
        }
        facts = content.facts
        write_checked(
            hidden / FACTS,
            {
                "files": files,
                "rows": facts.rows,
                "left_out": facts.left_out,
                "reasons": facts.reasons,
                "teachers": facts.teachers,
                "controls": facts.controls,
                "settings": facts.settings,
                "splits": facts.splits,
            },
        )
        fsync(hidden)
        failpoints.reach("tokens.before_rename")
        shutil.rmtree(folder, ignore_errors=True)
        hidden.rename(folder)
        fsync(folder.parent)
        failpoints.reach("tokens.part_written")
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def read_facts(folder: Path) -> PartFacts | None:
    """Check every byte of a part and return its facts; None where it is absent or not what was written."""
    stored = read_checked(folder / FACTS)
    try:
        if stored is None:
            return None
        for name in (*FILES, *(SIGNAL_FILES if len(stored["files"]) > len(FILES) else ())):
            entry, file = stored["files"][name], folder / name
            is_same_size = not file.is_symlink() and file.stat().st_size == entry["bytes"]
            if not is_same_size or sha256_of(file) != entry["sha256"]:
                return None
        return PartFacts(
            int(stored["rows"]),
            int(stored["left_out"]),
            tuple(stored["reasons"]),
            tuple((str(teacher), str(terms), bool(mock)) for teacher, terms, mock in stored["teachers"]),
            tuple(tuple(ids) for ids in stored["controls"]),
            stored["settings"],
            stored["splits"],
        )
    except (OSError, LookupError, TypeError, ValueError):
        return None


def read_records(folder: Path) -> Records:
    """Return the records of a part.

    Raises:
        OSError: it can't be read.
    """
    return np.fromfile(folder / ROWS, dtype=RECORD)


def write_checked(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON with the SHA-256 of its content, under a temporary name that is then renamed.

    Raises:
        OSError: the disk is full or refuses.
    """
    text = json.dumps(content, sort_keys=True)
    hidden = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        hidden.write_text(f'{{"sha256": "{hashlib.sha256(text.encode()).hexdigest()}", "content": {text}}}')
        fsync(hidden)
        hidden.rename(path)
    finally:
        hidden.unlink(missing_ok=True)


def read_checked(path: Path) -> dict[str, Any] | None:
    """Return the content of a file of `write_checked`; None where it is absent or not what was written."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        content: dict[str, Any] = stored["content"]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return content if stored["sha256"] == digest else None
    except (OSError, LookupError, TypeError, ValueError, RecursionError):
        return None
