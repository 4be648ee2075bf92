"""Write the folder of `trainer init`: it runs as it is, with the mock teacher and a tiny base."""

from __future__ import annotations

import json
import os
import shutil
from importlib.resources import files
from pathlib import Path

from harvester.system.free_port import free_port
from harvester.system.objects.url import require_path_or_url, url_in
from harvester.system.path_names import require_utf8
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
{schedule}

[evaluate]
every = "10%"                # held-out loss at each tenth of the training; the best adapter is kept
patience = 3                 # stop after three evaluations without a lower loss
# max_new_tokens = 256       # answers are cut there; left out: the length of the longest taught answer

[out]
path = "out"
"""


# For a student of ordinary size.
SCHEDULE = """\
epochs = 3
# max_steps = 100            # upper limit of optimiser steps
batch_tokens = 16_384        # tokens of a step; a small corpus needs less: `trainer plan` says so
max_length = 2048            # longer rows are left out and counted
lr = 2e-4"""

# For the tiny base of this program and the prompts of the starter.
TINY_SCHEDULE = """\
epochs = 6                   # a real student: 3
batch_tokens = 1024          # tokens of a step; a real student: 16_384
max_length = 256             # longer rows are left out and counted; a real student: 2048
lr = 3e-3                    # a real student: 2e-4"""

HARVEST_TOML = """\
# All keys: `harvester config schema`; `harvester init` writes a longer example.
[teacher]
base_url = "http://127.0.0.1:{port}/v1"    # of the mock teacher; put your own server or API here
model = "mock-teacher"
terms = "mock-teacher"                     # a terms record: `harvester terms list`
# api_key_env = "TEACHER_API_KEY"          # the NAME of an environment variable, never the key

[prompts]
files = ["prompts/*.jsonl"]                # rows with "split": "held_out" are evaluated and never learned

[sampling]
temperature = 0.0
max_tokens = 64

[store]
path = "store"

[budget.store]                             # of all runs together; the harvest stops before it exceeds them
tokens = 1_000_000
# usd = 20.0                               # needs [teacher.price]
"""

CURATE_TOML = """\
corpus = "store"
out = "curated"                            # where `harvester curate` writes; `trainer distil` has its own
filters = ["finished", "not_blank"]
"""

DISTIL_TOML = """\
# trainer distil distil.toml: harvest, curate, plan, train, evaluate, export, report; each once.
harvest = "harvest.toml"
curate = "curate.toml"
train = "train.toml"
mock_teacher = true                        # start it while harvesting; remove this line for a real teacher
# gguf = ["q8_0"]                          # also GGUF files, of a base that llama.cpp knows: not the tiny one
out = "distil"
"""

README = """\
# From prompts to a student

    trainer distil distil.toml                   # all of it; a second time sends and trains nothing
    trainer distil distil.toml --until curate    # harvest and filter, then look
    trainer distil distil.toml --from train      # go on with what is there

The result is `distil/distil.html`, and the student is `distil/student/`. It runs offline: the mock teacher
answers rule tasks, and `base/` is a tiny model. For your own: prompts in `prompts/`, your teacher in
harvest.toml (and no `mock_teacher` in distil.toml), your student in train.toml.
"""


def write_starter(folder: Path, base: Path | None = None, corpus: str | Path | None = None) -> list[Path]:
    """Write a folder for `trainer distil`, or `train.toml` alone for a corpus that exists.

    Args:
        base: folder of the student; None: `base` beside the file, copied there unless a corpus is named.
        corpus: folder of the corpus, or the URL of a published one; None: it will be harvested.

    Returns:
        The files that were written.

    Raises:
        ConfigError: one of the files exists already, can't be written, or a name is no UTF-8.
        UsageError: the corpus is a URL that can't be used.
    """
    for place in (folder, base, corpus):
        if place is not None and not url_in(os.fspath(place)):
            require_utf8(Path(place), "name another folder")
    if corpus is not None:
        require_path_or_url(os.fspath(corpus))
    is_tiny = base is None and corpus is None
    schedule = TINY_SCHEDULE if is_tiny else SCHEDULE
    learned = _relative(corpus, folder, "store" if corpus is not None else "curated")
    train = TRAIN_TOML.format(base=_relative(base, folder, "base"), corpus=learned, schedule=schedule)
    texts = {"train.toml": train}
    if corpus is None:
        texts |= {
            # Its address is part of every request key, so it stays.
            "harvest.toml": HARVEST_TOML.format(port=free_port()),
            "curate.toml": CURATE_TOML,
            "distil.toml": DISTIL_TOML,
            "README.md": README,
            **{f"prompts/{path.name}": path.read_text(encoding="utf-8") for path in _shipped("starter")},
        }
    try:
        return _write(folder, texts, copies_base=is_tiny)
    except OSError as error:
        raise ConfigError(
            f"can't be written: {error.strerror}", place=str(folder), remedy="name another folder"
        ) from None


def _write(folder: Path, texts: dict[str, str], *, copies_base: bool) -> list[Path]:
    if folder.exists() and not folder.is_dir():
        raise ConfigError("is a file", place=str(folder), remedy="name a new folder")
    paths = [folder / name for name in texts]
    for path in [*paths, *([folder / "base"] if copies_base else [])]:
        if path.exists():
            raise ConfigError("file exists already", place=str(path), remedy="name a new folder")
    for path, text in zip(paths, texts.values(), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    if copies_base:
        (folder / "base").mkdir()
        for file in _shipped("base"):
            paths.append(Path(shutil.copyfile(file, folder / "base" / file.name)))
    return paths


def _shipped(name: str) -> list[Path]:
    """Return the files of a folder of this program's data."""
    return sorted(path for path in Path(str(files("harvester_data") / name)).iterdir() if path.is_file())


def _relative(path: str | Path | None, folder: Path, default: str) -> str:
    """Return a path as a TOML string, relative to the folder that holds train.toml; a URL as it is."""
    text = default
    if path is not None:
        text = url_in(path) or os.path.relpath(Path(path).resolve(), folder.resolve())
    return json.dumps(text, ensure_ascii=False)  # a JSON string is a TOML string
