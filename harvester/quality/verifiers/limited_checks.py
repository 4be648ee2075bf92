"""Checks that may take long or crash: they run in a child process with limits (system.limited_child)."""

from __future__ import annotations

import importlib
import json
import re
import sys
from functools import lru_cache
from typing import Any


def has_pattern(text: str, pattern: str) -> bool:
    """Whether a regular expression occurs in a text."""
    return re.search(pattern, text) is not None


def load_function(folder: str, function: str) -> None:
    """Import the function of an entry point; modules in `folder` are found.

    Raises:
        Exception: whatever the import raises.
    """
    _function(folder, function)


def call_function(
    folder: str, function: str, answer: str, reference: str | None, metadata_json: str
) -> bool | None:
    """Return what the function says of an answer; None where that is neither True nor False."""
    verdict = _function(folder, function)(answer, reference, json.loads(metadata_json))
    return verdict if isinstance(verdict, bool) else None


@lru_cache(maxsize=8)
def _function(folder: str, function: str) -> Any:
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)
