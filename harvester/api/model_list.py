"""The models a teacher lists, and whether ours is among them. Pure."""

from __future__ import annotations

import orjson


def listed(body: bytes) -> list[str]:
    """The ids in the body of `GET /models`; none where it is no such list."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return []
    rows = document.get("data") if isinstance(document, dict) else None
    if not isinstance(rows, list):
        return []
    return [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]


def names(models: list[str], wanted: str) -> bool:
    """Whether one of them is the wanted one. Some teachers list `models/NAME` for what is asked as `NAME`."""
    return any(one == wanted or one.endswith(f"/{wanted}") for one in models)
