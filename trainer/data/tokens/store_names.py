"""Name a token store and a selection by the hash of all that they depend on. Loads no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from harvester.system.command_line.version import VERSION
from trainer.config import TrainConfig
from trainer.data import answers, row_rules
from trainer.data.chat_template import Renderer
from trainer.model import weights

# Version of what is written. A new one finds nothing of an older one.
FORMAT = 6

# Settings of `[data]` that decide what a part has in it, and those that choose among its rows.
_OF_PARTS = ("split_field", "eval_share", "truncated", "reasoning", "where")
_OF_SELECTIONS = ("answers", "per_prompt", "weights")


def store_key(config: TrainConfig, renderer: Renderer, vocabulary: int) -> str:
    """Return the name of the store for a tokenizer, a template and the settings of the rendering."""
    data = config.data.model_dump(mode="json")
    return _hash(
        {
            "format": FORMAT,
            # Other code may render otherwise.
            "versions": [VERSION, *(version(name) for name in ("transformers", "tokenizers", "jinja2"))],
            "tokenizer": weights.tokenizer_sha256(config.base),
            "template": renderer.template_sha256,
            "vocabulary": vocabulary,
            "compares": answers.compares_answers(config.data),
            **({"log-probabilities": True} if config.train.soft_targets != "off" else {}),
            **{name: data[name] for name in _OF_PARTS},
            **_verifiers(config),
        }
    )


def selection_key(config: TrainConfig, parts: list[str]) -> str:
    """Return the name of a selection: of the corpus, by its parts, and of the settings that choose rows."""
    data = config.data.model_dump(mode="json")
    return _hash(
        {
            "parts": parts,
            "max_length": row_rules.longest_row(config),
            **{name: data[name] for name in _OF_SELECTIONS},
        }
    )


def part_name(*facts: object) -> str:
    """Return the name of a part from what its rows are known by."""
    return _hash({"rows": facts})


def _verifiers(config: TrainConfig) -> Mapping[str, Any]:
    """Return the verifiers that choose answers, and the files of their functions beside train.toml."""
    if config.data.answers not in {"verified", "best"}:
        return {}
    tables = {task: section.model_dump(mode="json") for task, section in config.verify.items()}
    names = {str(table.get("function") or "").partition(":")[0] for table in tables.values()} - {""}
    files = {name: _file_sha256(config.root / f"{name.replace('.', '/')}.py") for name in sorted(names)}
    return {"verify": tables, "functions": files}


def _file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _hash(value: Mapping[str, Any]) -> str:
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]
