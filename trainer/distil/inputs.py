"""Compute hashes of what a stage reads: its configuration, and every file that the configuration names."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from harvester.store.reader import Corpus
from trainer.distil.config import DistilFiles, NamedFile
from trainer.errors import ConfigError

# Version of what the keys are computed from: a new one repeats every stage.
FORMAT = 2
# Larger files, such as the weights of a base, count by size and time of their last change. The trainings
# themselves are known by the hash of the base (`trainer.experiments.stages`).
MOST_BYTES = 64 << 20
_FUNCTION = re.compile(r"([A-Za-z_][\w.]*):[A-Za-z_]\w*\Z")


def key_of(**parts: Any) -> str:
    """Return the key of a stage: the SHA-256 of what it depends on."""
    text = json.dumps({"format": FORMAT, **parts}, sort_keys=True, ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def content_of(file: NamedFile, outputs: Collection[Path]) -> dict[str, Any]:
    """Return the table of a TOML file, and the hashes of the files that its texts name, by relative path.

    A text names a file or folder if it is the path of one from the file's folder, a pattern that matches
    some, or a Python function in a module there (`checks:is_right`).

    Args:
        outputs: folders that stages write; neither they nor what contains them is read.
    """
    files = {os.path.relpath(path, file.folder): _fingerprint(path) for path in _named_files(file, outputs)}
    return {"table": file.table, "files": files}


def require_own_folder(files: DistilFiles) -> None:
    """Do nothing if the output folder is one of its own: what lies in it is no input of a stage.

    Raises:
        ConfigError: it holds an input, or lies in one.
    """
    out, outputs = files.folder, [files.folder, files.store, files.train.corpus, files.train.out_path]
    tables = [file for file in (files.harvest, files.curate, files.train_file) if file is not None]
    inputs = [files.path, *(file.path for file in tables), files.train.base, files.store, files.train.corpus]
    inputs += [path for file in tables for path in _named_files(file, outputs)]
    for path in inputs:
        if path.resolve().is_relative_to(out) or out.is_relative_to(path.resolve()):
            raise ConfigError(
                f"the folder {out} has, or lies in, what is read: {path}",
                place="out of distil.toml",
                remedy='give it a folder of its own, such as out = "distil"',
            )


def rows_of(store: Path) -> list[Any]:
    """Return what stands for the rows of a store: the sealed files with their hashes, and the count."""
    corpus = Corpus.open(store)
    return [corpus.count(), *sorted((entry.sha256, entry.rows) for entry in corpus.manifest)]


def _named_files(file: NamedFile, outputs: Collection[Path]) -> Iterator[Path]:
    for text in _texts(file.table):
        yield from _paths(text, file.folder, outputs)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _texts(member)
    elif isinstance(value, list):
        for member in value:
            yield from _texts(member)


def _paths(text: str, folder: Path, outputs: Collection[Path]) -> Iterator[Path]:
    """Yield the files that a text names."""
    if not text or "\0" in text or "\n" in text:
        return
    if match := _FUNCTION.match(text):
        text = f"{match[1].replace('.', '/')}.py"
    for name in sorted(glob.glob(text, root_dir=folder)) or [text]:  # noqa: PTH207 - may be absolute
        path = folder / name
        try:
            if path.is_file():
                yield path
            elif path.is_dir() and not _touches(path.resolve(), outputs):
                yield from sorted(each for each in path.rglob("*") if each.is_file())
        except OSError:  # a sentence is no file name
            continue


def _touches(folder: Path, outputs: Collection[Path]) -> bool:
    return any(folder.is_relative_to(out) or out.is_relative_to(folder) for out in outputs)


def _fingerprint(path: Path) -> list[Any]:
    facts = path.stat()
    if facts.st_size > MOST_BYTES:
        return [facts.st_size, facts.st_mtime_ns]
    return [hashlib.sha256(path.read_bytes()).hexdigest()]
