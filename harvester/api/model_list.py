"""Read the list of models that a teacher offers (`GET /models`). Pure."""

from __future__ import annotations

import re

import orjson

# A key that is accepted for chat may lack the right to list models.
_LISTING = re.compile(r"\bscopes?\b|permission|not allowed to list|model\.read|models?:read", re.IGNORECASE)

# Members that say that there are further pages.
_MORE_MEMBERS = ("has_more", "next_page_token", "nextPageToken", "next_page", "next_cursor")


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
    if not isinstance(rows, list) or any(document.get(name) for name in _MORE_MEMBERS):
        return []  # a page of the list says nothing about a model on another one
    return [row["id"] for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]


def contains(models: list[str], wanted: str) -> bool:
    """Whether `wanted` may be listed. A wrong refusal could not be passed, and a wrong name costs nothing.

    Some teachers list `models/NAME` for a model that is asked as `NAME`, `NAME:latest` (Ollama), `NAME` for
    `NAME:nitro` (OpenRouter), `openai/*` (LiteLLM), or write it with other capitals.
    """
    name = wanted.casefold()
    plain, _, variant = name.partition(":")
    names = {name, f"{name}:latest", *([plain] if variant else [])}
    for model in map(str.casefold, models):
        if model in names or any(model.endswith(f"/{each}") for each in names):
            return True
        if model.endswith("*") and name.startswith(model[:-1]):
            return True
    return False
