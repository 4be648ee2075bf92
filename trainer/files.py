"""Write files of results completely or not at all, and read them back. Loads no torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harvester.system import disk_refusal, own_files
from trainer.errors import StoreError

_MAX_JSON_BYTES = 1 << 30


def write_json(path: Path, value: Any) -> None:
    """Write a file of JSON, completely or not at all.

    Raises:
        StoreFull, StoreError: the disk is full or refuses.
    """
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, completely or not at all.

    Raises:
        StoreFull, StoreError: the disk is full or refuses, or something that is no file lies there.
    """
    _write(path, (text,))


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write a text file line by line, completely or not at all; raises as `write_text`."""
    _write(path, (f"{line}\n" for line in lines))


def _write(path: Path, texts: Iterable[str]) -> None:
    try:
        if path.exists() and not (path.is_file() or path.is_dir()):  # a device would be replaced by a file
            raise StoreError("is not a regular file", place=str(path), remedy="name another file")
        path.parent.mkdir(parents=True, exist_ok=True)
        with own_files.replacing(path, 0o644, durable=True) as file:
            for text in texts:
                file.write(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise disk_refusal.refused(error, "can't be written", path, "set another out") from None


def write_report(folder: Path, stem: str, page: str, facts: Any) -> tuple[str, str]:
    """Write a page and the facts it shows as STEM.html and STEM.json; return their paths.

    Raises:
        StoreFull, StoreError: the disk is full or refuses.
    """
    html, facts_file = folder / f"{stem}.html", folder / f"{stem}.json"
    write_text(html, page)
    write_json(facts_file, facts)
    return str(html), str(facts_file)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; None if it is absent or not JSON, so that it is made again."""
    try:
        return json.loads(own_files.read_bytes(path, _MAX_JSON_BYTES))
    except (OSError, ValueError):
        return None
