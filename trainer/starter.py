"""Write the train.toml of `trainer init`, with every setting that a first training is likely to change."""

from __future__ import annotations

import json
import os
from pathlib import Path

from trainer.errors import ConfigError

TRAIN_TOML = """\
# All keys: `trainer config schema`, or trainer/CONFIG.md. Relative paths start from this file's folder.

[student]
base = {base}                # folder with config.json, tokenizer, chat template and *.safetensors

[data]
corpus = {corpus}            # the store of a harvest, or a folder of shards
# eval_share = 0.1           # share of the prompts without a split that is held out
# truncated = "exclude"      # answers cut by the teacher's token limit; or "unterminated"
# reasoning = "drop"         # the teacher's reasoning; or "inline", "keep"

[lora]
rank = 32
alpha = 64

[train]
epochs = 3
# max_steps = 100            # upper limit of optimiser steps
batch_tokens = 16_384        # tokens of a step; a small corpus needs less: `trainer plan` says so
max_length = 2048            # longer rows are left out and counted
lr = 2e-4

[evaluate]
every = "10%"                # held-out loss at each tenth of the training; the best adapter is kept
patience = 3                 # stop after three evaluations without a lower loss
# max_new_tokens = 256       # answers are cut there; left out: the length of the longest taught answer

[out]
path = "out"
"""


def write_starter(folder: Path, base: Path | None = None, corpus: Path | None = None) -> Path:
    """Write `folder/train.toml`; the folder is made if it is absent.

    Args:
        base: folder of the student; None: `base` beside the file.
        corpus: folder of the corpus; None: `store` beside the file.

    Returns:
        The file.

    Raises:
        ConfigError: the file exists already, or can't be written.
    """
    path = folder / "train.toml"
    if path.exists():
        raise ConfigError("file exists already", place=str(path), remedy="name a new folder")
    text = TRAIN_TOML.format(base=_relative(base, folder, "base"), corpus=_relative(corpus, folder, "store"))
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f"can't be written: {error.strerror}", place=str(folder), remedy="name another folder"
        ) from None
    return path


def _relative(path: Path | None, folder: Path, default: str) -> str:
    """Return a path as a TOML string, relative to the folder that holds train.toml."""
    text = default if path is None else os.path.relpath(path.resolve(), folder.resolve())
    return json.dumps(text, ensure_ascii=False)  # a JSON string is a TOML string
