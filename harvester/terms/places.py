"""Find the folders in which a user keeps own terms records (`terms/`) and permissions (`permissions/`)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

# A folder that holds one of these is the root of a project: nothing above it is looked at.
ROOT_MARKS = (".git", "pyproject.toml")


def places(*starts: Path) -> tuple[Path, ...]:
    """Return the folders to look in, the outermost first, each once.

    From each start, which is the folder of a configuration or the one around a store, these are the folder
    itself, the one around it, and all others up to the root of the project, where there is one. A store or a
    corpus itself is no start: whoever made it does not decide what its terms permit.
    """
    paths: dict[Path, None] = {}
    for start in starts:
        for folder in reversed(list(_parents_of(start.resolve()))):
            paths[folder] = None
    return tuple(paths)


def terms_folders(*starts: Path) -> tuple[Path, ...]:
    """Return the folder `terms` in each of the `places`, whether or not it exists."""
    return tuple(folder / "terms" for folder in places(*starts))


def _parents_of(start: Path) -> Iterator[Path]:
    folders = [start, *start.parents]
    roots = [
        number
        for number, folder in enumerate(folders)
        if any((folder / mark).exists() for mark in ROOT_MARKS)
    ]
    last = roots[0] if roots else min(1, len(folders) - 1)
    yield from folders[: last + 1]
