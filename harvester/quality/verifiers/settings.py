"""Define the table `[verify]`: one verifier a task. harvest.toml, curate.toml and train.toml share it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from harvester.errors import ConfigError
from harvester.system import json_schema
from harvester.system.toml_file import Matching, read_toml, validate

# The name in [verify] that stands for every other task.
EVERY_TASK = "*"
# Remedy where something needs a verifier and there is none.
ADD_VERIFIER = 'add [verify.TASK] kind = "exact"; `*` is every task'

Kind = Literal[
    "exact", "normalised", "contains", "numeric", "choice", "json_schema", "regex", "code", "python"
]

_ENTRY_POINT = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*\Z")

# Keys that belong to one kind only. Those marked True are required there.
_KEYS_OF_KIND: dict[str, dict[str, bool]] = {
    "numeric": {"tolerance": False, "relative": False},
    "choice": {"choices": False},
    "json_schema": {"schema": True},
    "regex": {"pattern": True},
    "code": {"tests": False, "memory_mib": False},
    "python": {"function": True, "memory_mib": False},
}


class VerifierSection(BaseModel):
    """How the answers of one task are checked.

    Attributes:
        kind: what is compared.
        tolerance: largest absolute difference of two numbers.
        relative: largest difference as a share of the reference; the larger of the two counts.
        choices: the letters of a multiple choice.
        json_schema: the schema that the answer, a JSON text, must match. Its key is `schema`.
        tests: field of the prompt's metadata that holds the tests of an answer that is Python code, a program
            that fails by raising; without the field, the reference holds them.
        pattern: regular expression that is searched for in the answer.
        function: `package.module:function`, called with answer, reference and the row's metadata in a process
            of its own; it returns True or False. Modules beside the configuration file are found.
        timeout_s: time limit of one check by regex, json_schema, code or python.
        memory_mib: most address space of the process that runs code or function.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    kind: Kind
    tolerance: float = Field(default=0, ge=0)
    relative: float = Field(default=0, ge=0)
    choices: Annotated[str, Matching("[A-Z]{2,26}", "must be 2 to 26 capital letters")] = "ABCD"
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    pattern: str | None = None
    tests: str = "tests"
    function: str | None = None
    timeout_s: float = Field(default=5, gt=0, le=600)
    memory_mib: int = Field(default=1024, ge=64, le=1024 * 1024)

    @field_validator("function")
    @classmethod
    def _is_entry_point(cls, value: str | None) -> str | None:
        if value is not None and not _ENTRY_POINT.match(value):
            raise ValueError("must be package.module:function")
        return value

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, value: str | None) -> str | None:
        try:
            re.compile(value or "")
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return value

    @field_validator("json_schema")
    @classmethod
    def _is_schema(cls, value: dict[str, Any] | None) -> dict[str, Any] | None:
        if value is not None and (problem := json_schema.problem(json_schema.encoded(value))):
            raise ValueError(f"is no JSON Schema, {problem}")
        return value

    @model_validator(mode="after")
    def _has_keys_of_its_kind(self) -> VerifierSection:
        names = {name: field.alias or name for name, field in type(self).model_fields.items()}
        given = {names[name] for name in self.model_fields_set}
        for kind, keys in _KEYS_OF_KIND.items():
            own = _KEYS_OF_KIND.get(self.kind, {})
            if kind != self.kind and (foreign := sorted(given & keys.keys() - own.keys())):
                raise ValueError(f"{foreign[0]!r} belongs to kind = {kind!r}, not to {self.kind!r}")
        for key, is_required in _KEYS_OF_KIND.get(self.kind, {}).items():
            if is_required and key not in given:
                raise ValueError(f"kind = {self.kind!r} needs {key!r}")
        return self


# `[verify.TASK]`; the task `*` stands for every other one.
VerifySection = dict[Annotated[str, Field(min_length=1)], VerifierSection]


class _VerifyFile(BaseModel):
    """A TOML file of which only `[verify]` is looked at."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    verify: VerifySection = Field(default_factory=dict)


def load(path: Path) -> VerifySection:
    """Read `[verify]` of a harvest.toml, curate.toml or train.toml, or of a file of its own.

    Raises:
        ConfigError: missing or broken file, an impossible value, or no verifier in it.
    """
    file = read_toml(path, "name a TOML file with a table [verify]")
    table = {"verify": file.table.get("verify", {})}
    section = validate(_VerifyFile, table, place_of=file.place_of, missing="kind is needed").verify
    if not section:
        raise ConfigError("has no verifier", place=str(path), remedy=ADD_VERIFIER)
    return section
