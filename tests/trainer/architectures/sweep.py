"""Test every causal language model of transformers that can be built tiny; write the table of the docs.

Run as `python -m tests.trainer.architectures.sweep trainer/ARCHITECTURES.md`. Each class is built from its
default configuration, or from the tiny one of `families`, as `trainer plan` does for a base.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.trainer.architectures import families
from trainer.errors import StudentError
from trainer.model.self_test import choose_forward
from trainer.model.tiny_copy import tiny_copy

HEADING = """# Which students work

Written by `make architectures`: the self-test of each causal language model of transformers {version},
torch {torch}, on the CPU, with random weights. "packed": many documents in one row. "unpacked": one document
a row with the model's own attention, which costs padding. Both lose exactly what the model's own forward
loses for each document alone. "not built": no tiny copy of the default configuration can be built, so
nothing is known before a base of this kind is loaded; the loaded student is tested then.

The families marked with * also go through all verbs in `tests/trainer/architectures`.

| model type | rows | output layer in chunks | why not packed |
|--|--|--|--|
"""


def row(name: str, config: object) -> str:
    """Return the table's line for one configuration."""
    mark = f"{name} *" if name in families.CONFIGURATIONS else name
    try:
        copy = tiny_copy(config).requires_grad_(False)
    except Exception as error:
        return f"| {mark} | not built | | {type(error).__name__} |"
    try:
        found = choose_forward(copy, place=name)
    except StudentError as error:
        return f"| {mark} | refused | | {error.message.replace('|', '/')} |"
    except Exception as error:
        return f"| {mark} | refused | | the own forward fails: {type(error).__name__} |"
    rows = "packed" if found.layout.packed else "unpacked"
    why = found.note.removeprefix("rows are not packed, each document has its own: ").rpartition(". ")[0]
    return f"| {mark} | {rows} | {'yes' if found.head else 'no'} | {why.replace('|', '/')} |"


def main(path: Path) -> None:
    """Write the table, line by line."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    known = {name: families.configuration(name) for name in families.CONFIGURATIONS}
    names = sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *known})
    heading = HEADING.format(version=transformers.__version__, torch=torch.__version__.partition("+")[0])
    with path.open("w", encoding="utf-8") as file:
        file.write(heading)
        for name in names:
            try:
                config = known.get(name) or transformers.CONFIG_MAPPING[name]()
            except Exception as error:
                file.write(f"| {name} | not built | | {type(error).__name__} |\n")
                continue
            file.write(row(name, config) + "\n")
            file.flush()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
