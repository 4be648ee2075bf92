"""Read the list of models that a teacher offers (`GET /models`). Pure."""

from __future__ import annotations

import re

import orjson

# A key that is accepted for chat may lack the right to list models.
_LISTING = re.compile(r"\bscopes?\b|permission|not allowed to list|model\.read|models?:read", re.IGNORECASE)


def is_about_listing(message: str) -> bool:
    """Whether a refused list says that this key may not list models, rather than that it is not accepted."""
    return _LISTING.search(message) is not None


def parse(body: bytes) -> list[str]:
    """Return the model ids in the body of `GET /models`; empty when the body is no such list."""
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError:
        return []
    rows = document.get("data") if isinstance(document, dict) else None
    if not isinstance(rows, list):
        return []
    return [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]


def contains(models: list[str], wanted: str) -> bool:
    """Whether `wanted` is listed. Some teachers list `models/NAME` for a model that is asked as `NAME`."""
    return any(model == wanted or model.endswith(f"/{wanted}") for model in models)
