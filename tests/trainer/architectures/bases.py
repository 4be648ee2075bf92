"""Write folders with a tiny random base of a family, and a train.toml to train it with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from tests.trainer import tiny
from tests.trainer.architectures import families


def write_base(folder: Path, family: str) -> Path:
    """Write a random base of a family; its weights are wide, so that a far token changes the logits."""
    speech = tiny.tokenizer()
    config = families.configuration(family)
    torch.manual_seed(0)
    if family in families.MULTIMODAL:
        made = transformers.AutoModelForImageTextToText.from_config(config)
    else:
        made = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    made.save_pretrained(folder)
    speech.save_pretrained(folder)
    return folder


def train_toml(folder: Path, family: str, **sections: dict[str, Any]) -> Path:
    """Return the train.toml of a small training with a base of a family."""
    path = toml_without_base(folder, **sections)
    write_base(folder / "base", family)
    return path


def toml_without_base(folder: Path, **sections: dict[str, Any]) -> Path:
    """Return the train.toml of a small training whose base is an empty folder, `base` beside it."""
    path = tiny.train_toml(folder, tiny.skill(12, held_out=3), **sections)
    for file in (folder / "base").iterdir():
        file.unlink()
    return path
