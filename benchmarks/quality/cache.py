"""Name what was made by the hash of what it was made from, and keep how long it took."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

# A new number makes everything anew.
FORMAT = 1


def digest(*parts: object) -> str:
    """Return a short hash of values; of a folder it takes the names and contents of its files."""
    hashed = hashlib.sha256(str(FORMAT).encode())
    for part in parts:
        text = _of_folder(part) if isinstance(part, Path) else json.dumps(part, sort_keys=True)
        hashed.update(text.encode() + b"\0")
    return hashed.hexdigest()[:16]


@cache
def _of_folder(folder: Path) -> str:
    hashed = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        hashed.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return hashed.hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value, indent=1) + "\n")
    part.replace(path)


def read_json(path: Path) -> Any:
    """Return the content of a JSON file."""
    return json.loads(path.read_text())


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
