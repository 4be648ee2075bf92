"""Write files of results completely or not at all, and read them back. Loads no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from harvester.system import own_files
from trainer.errors import StoreError

_MAX_JSON_BYTES = 1 << 30


def write_json(path: Path, value: Any) -> None:
    """Write a file of JSON, completely or not at all.

    Raises:
        StoreError: the disk refuses.
    """
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, completely or not at all.

    Raises:
        StoreError: the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with own_files.replacing(path, 0o644, durable=True) as file:
            file.write(text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise StoreError(
            f"can't be written: {error.strerror}", place=str(path), remedy="make room, or set another out"
        ) from None


def write_report(folder: Path, stem: str, page: str, facts: Any) -> tuple[str, str]:
    """Write a page and the facts it shows as STEM.html and STEM.json; return their paths.

    Raises:
        StoreError: the disk refuses.
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
