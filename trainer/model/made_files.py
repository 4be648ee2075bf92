"""Remember which files a stage made, and see whether they are still what it made."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from trainer.model import hash_memory

# Size in bytes and SHA-256 of each file, by its path relative to a folder.
MadeFiles = dict[str, list[Any]]


def made_files(folder: Path, paths: Iterable[Path]) -> MadeFiles:
    """Return sizes and hashes of files, and of all files in folders, among `paths`; absent ones are left out.

    Args:
        folder: the paths of the result start from it.
    """
    files: MadeFiles = {}
    for path in paths:
        inside = sorted(path.rglob("*")) if path.is_dir() else [path]
        for each in inside:
            if each.is_file():
                files[os.path.relpath(each, folder)] = [each.stat().st_size, _sha256(each)]
    return files


def are_unchanged(folder: Path, files: MadeFiles) -> bool:
    """Return whether all files are there with their sizes and hashes."""
    try:
        sizes_fit = all((folder / name).stat().st_size == size for name, (size, _) in files.items())
        return sizes_fit and all(_sha256(folder / name) == sha256 for name, (_, sha256) in files.items())
    except OSError:
        return False


def _sha256(path: Path) -> str:
    """Return the SHA-256 of a file. That of a large one is remembered (`hash_memory`)."""
    identity = hash_memory.identity(path)
    if remembered := hash_memory.recall((identity,)):
        return remembered
    with path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if hash_memory.identity(path) == identity:
        hash_memory.remember((identity,), sha256)
    return sha256
