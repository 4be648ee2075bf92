"""Describe the keys of train.toml: their JSON Schema, with the descriptions of the configuration classes."""

from __future__ import annotations

import inspect
import re
from typing import Any

from pydantic import BaseModel

from trainer.config import TrainConfig


def schema() -> dict[str, Any]:
    """Return the JSON Schema of train.toml; each key has its description."""
    schema_of_file = TrainConfig.model_json_schema()
    schema_of_file["properties"].pop("root", None)  # not a key of the file
    for name, section in sections().items():
        properties = schema_of_file["$defs"][section.__name__]["properties"]
        schema_of_file["$defs"][section.__name__]["description"] = f"[{name}]"
        for key, text in descriptions(section).items():
            properties[key]["description"] = text
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema_of_file,
        "description": "train.toml of `trainer`",
    }


def sections() -> dict[str, type[BaseModel]]:
    """Return the class of each section of train.toml by its name, in order."""
    return {
        name: field.annotation
        for name, field in TrainConfig.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def descriptions(section: type[BaseModel]) -> dict[str, str]:
    """Return the description of each key of a section, from the `Attributes:` parts of its classes."""
    tables: dict[str, str] = {}
    for parent in section.__bases__:
        if issubclass(parent, BaseModel) and parent is not BaseModel:
            tables.update(descriptions(parent))
    _, _, attributes = inspect.cleandoc(section.__doc__ or "").partition("Attributes:\n")
    key = ""
    for line in attributes.splitlines():
        if match := re.match(r" {4}(\w+): (.*)", line):
            key = match[1]
            tables[key] = match[2]
        elif key:
            tables[key] += f" {line.strip()}"
    return {key: text.strip() for key, text in tables.items()}
