"""Decide which rows are held out for evaluation: by the split that they name, else by a draw.

Curation and training use this one rule, so that the rows which a training holds out are known when a corpus
is decontaminated.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

# Share of the prompts without a split that is held out, unless a configuration says otherwise.
DEFAULT_EVAL_SHARE = 0.1


def prompt_key(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the SHA-256 of a prompt's content: role and text of each message, as they are stored."""
    content = [[m.get("role"), m.get("content")] for m in messages]
    return hashlib.sha256(
        json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")
    ).hexdigest()


def is_drawn(key: str, share: float) -> bool:
    """Whether a prompt without a split is held out. A larger share holds out the same ones and more.

    Args:
        key: `prompt_key` of the prompt.
        share: of all prompts, 0 to 1.
    """
    return int(key[:12], 16) / 16**12 < share


def named_split(metadata: Mapping[str, Any], field: str) -> str:
    """Return the split that a row's metadata names; "" if it names none."""
    split = metadata.get(field)
    return split if isinstance(split, str) else ""
