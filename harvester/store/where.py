"""Choose rows by what they are: run, configuration, model, system prompt, sampling, tags, outcome.

A condition is a table of fields, `{model = "a", tags = ["math", "code"]}`: a row is chosen if every field has
one of the values listed. `not` holds a table whose rows are left out. The same as text, as the command line
takes it, is the inside of the braces. It is parsed as TOML; nothing is evaluated.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harvester.api.types import Outcome
from harvester.errors import ConfigError
from harvester.store import paths
from harvester.store.journal.journal import Journal
from harvester.store.shards.schema import Sample

_INSIDE = 'model = "teacher-a", system = "Be brief.", tags = ["math"], not = {outcome = "truncated"}'
REMEDY = f"where = {{{_INSIDE}}}"

# Stands for a sampling or metadata field that a row does not have.
NONE = "none"


def system_of(sample: Sample) -> str:
    """Return the text of a row's leading system or developer message; "" without one."""
    first = next(iter(sample.messages or ()), None)
    if not isinstance(first, Mapping) or first.get("role") not in {"system", "developer"}:
        return ""
    return str(first.get("content") or "")


# Fields, the column that each needs, and its values in a row.
_FIELDS: Mapping[str, tuple[str, Callable[[Sample], Collection[Any]]]] = {
    "run": ("run_id", lambda sample: (sample.run_id,)),
    "config": ("config_sha256", lambda sample: (sample.config_sha256,)),
    "model": ("request_model", lambda sample: (sample.request_model,)),
    "response_model": ("response_model", lambda sample: (sample.response_model,)),
    "teacher": ("teacher_id", lambda sample: (sample.teacher_id,)),
    "provider": ("provider", lambda sample: (sample.provider,)),
    "system": ("messages", lambda sample: (system_of(sample),)),
    "tags": ("tags", lambda sample: sample.tags),
    "outcome": ("outcome", lambda sample: (sample.outcome,)),
    "purpose": ("purpose", lambda sample: (sample.purpose,)),
    "sample": ("sample_index", lambda sample: (sample.sample_index,)),
    "prompt_id": ("prompt_id", lambda sample: (sample.prompt_id,)),
    "file": ("source_file", lambda sample: (sample.source_file,)),
    "task": ("metadata_json", lambda sample: (sample.metadata.get("task", NONE),)),
    "split": ("metadata_json", lambda sample: (sample.metadata.get("split", NONE),)),
}
# Tables of further fields: `sampling.temperature`, `metadata.level`.
_TABLES: Mapping[str, tuple[str, Callable[[Sample], Mapping[str, Any]]]] = {
    "sampling": ("request_json", lambda sample: _object(sample.request_json)),
    "metadata": ("metadata_json", lambda sample: sample.metadata),
}

# Columns whose text is the value itself.
_PLAIN_COLUMNS = frozenset(
    {
        *("run_id", "config_sha256", "request_model", "response_model", "teacher_id", "provider"),
        *("outcome", "purpose", "prompt_id", "source_file"),
    }
)

# Columns that only the reply fills: what a request is paid for does not depend on them.
_COLUMNS_OF_REPLIES = frozenset({"outcome", "response_model", "provider"})


@dataclass(frozen=True, slots=True)
class _Condition:
    """One field must have one of these values."""

    column: str
    values: tuple[Any, ...]
    read: Callable[[Sample], Collection[Any]]

    def holds(self, sample: Sample) -> bool:
        return any(_equal(value, wanted) for value in self.read(sample) for wanted in self.values)

    @property
    def is_of_reply(self) -> bool:
        return self.column in _COLUMNS_OF_REPLIES


@dataclass(frozen=True, slots=True)
class Where:
    """A condition on rows; see the module.

    Attributes:
        text: the condition as it was written, for reports.
        epochs: epochs to choose, or to leave out (`without_epochs`): rows don't name theirs, see `bind`.
    """

    text: str = ""
    conditions: tuple[_Condition, ...] = ()
    without: tuple[_Condition, ...] = ()
    epochs: tuple[int, ...] = ()
    without_epochs: tuple[int, ...] = ()

    @classmethod
    def parse(cls, value: str | Mapping[str, Any], place: str = "where") -> Where:
        """Read a condition from a table, or from its text.

        Raises:
            ConfigError: it is no TOML, names an unknown field, or has a value of an unusable type.
        """
        if isinstance(value, str):
            try:
                value = tomllib.loads(f"where = {{ {value} }}")["where"]
            except tomllib.TOMLDecodeError as error:
                remedy = REMEDY if place != "--where" else f"--where '{_INSIDE}'"
                raise ConfigError(f"'where' is no condition: {error}", place=place, remedy=remedy) from None
        if not isinstance(value, Mapping):
            raise ConfigError("'where' is a table of fields", place=place, remedy=REMEDY)
        wanted = dict(value)
        unwanted = wanted.pop("not", {})
        if not isinstance(unwanted, Mapping) or "not" in unwanted:
            raise ConfigError("'not' is a table of fields, inside of 'where'", place=place, remedy=REMEDY)
        unwanted = dict(unwanted)
        return cls(
            json.dumps(value, ensure_ascii=False, default=str),
            epochs=_epochs(wanted.pop("epoch", ()), place),
            without_epochs=_epochs(unwanted.pop("epoch", ()), place),
            conditions=_conditions(wanted, place),
            without=_conditions(unwanted, place),
        )

    def bind(self, store: Path) -> Where:
        """Replace epochs by the runs of a store that asked in them.

        Raises:
            ConfigError: epochs are named, and the store has no journal that tells them.
        """
        if not self.epochs and not self.without_epochs:
            return self
        by_run = epochs_of_runs(store)
        if not by_run:
            raise ConfigError(
                "only the journal of a store names the epochs of its rows",
                place=str(store),
                remedy="choose by run: `harvester report` lists the runs",
            )
        parts: list[tuple[_Condition, ...]] = []
        for epochs, conditions in ((self.epochs, self.conditions), (self.without_epochs, self.without)):
            runs = tuple(run for run, epoch in by_run.items() if epoch in epochs)
            parts.append(
                (*conditions, _Condition("run_id", runs, _FIELDS["run"][1])) if epochs else conditions
            )
        return replace(self, conditions=parts[0], without=parts[1], epochs=(), without_epochs=())

    def of_requests(self) -> Where:
        """Return the condition without what it says of replies.

        It chooses the rows that would be chosen if their outcome, or the model or provider that replied, were
        another. So a `not` that also asks for one of these leaves out no request.
        """
        asked = tuple(condition for condition in self.conditions if not condition.is_of_reply)
        if any(condition.is_of_reply for condition in self.without):
            return replace(self, conditions=asked, without=(), without_epochs=())
        return replace(self, conditions=asked)

    @property
    def chooses_all(self) -> bool:
        """Whether it has no condition at all."""
        return not (self.conditions or self.without or self.epochs or self.without_epochs)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that `matches` looks at."""
        return tuple(dict.fromkeys(condition.column for condition in (*self.conditions, *self.without)))

    @property
    def required_texts(self) -> Mapping[str, Collection[str]]:
        """Texts of which a column has one in every row that is chosen, by column."""
        texts: dict[str, Collection[str]] = {}
        for condition in self.conditions:
            values = [value for value in condition.values if isinstance(value, str)]
            if condition.column in _PLAIN_COLUMNS and condition.column not in texts:
                texts[condition.column] = values
        return texts

    def matches(self, sample: Sample) -> bool:
        """Whether a row is chosen."""
        return all(condition.holds(sample) for condition in self.conditions) and not (
            self.without and all(condition.holds(sample) for condition in self.without)
        )


def epochs_of_runs(store: Path) -> dict[str, int]:
    """Return the epoch of each run of a store; empty without a journal."""
    if not (store / paths.JOURNAL).exists():
        return {}
    with Journal.open(store, read_only=True) as journal, journal.reading() as connection:
        rows = connection.execute("SELECT run_id, config_json FROM runs").fetchall()
    return {run: int((_object(text).get("run") or {}).get("epoch", 0)) for run, text in rows}


def _conditions(table: Mapping[str, Any], place: str) -> tuple[_Condition, ...]:
    conditions = []
    for name, value in table.items():
        if name in _TABLES and isinstance(value, Mapping):
            column, read = _TABLES[name]
            conditions += [
                _Condition(column, _values(f"{name}.{key}", held, place), _reader(read, key))
                for key, held in value.items()
            ]
        elif name in _FIELDS:
            column, read_field = _FIELDS[name]
            values = _values(name, value, place)
            unknown = [each for each in values if each not in set(Outcome)] if name == "outcome" else []
            if unknown:
                raise ConfigError(
                    f"'where': no outcome is called {unknown[0]!r}",
                    place=place,
                    remedy=f"known: {', '.join(Outcome)}",
                )
            conditions.append(_Condition(column, values, read_field))
        else:
            known = [*_FIELDS, "epoch", "not", *(f"{table}.NAME" for table in _TABLES)]
            near = difflib.get_close_matches(name, known, n=1)
            remedy = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
            raise ConfigError(f"'where' has an unknown field {name!r}", place=place, remedy=remedy)
    return tuple(conditions)


def _reader(read: Callable[[Sample], Mapping[str, Any]], key: str) -> Callable[[Sample], Collection[Any]]:
    def values(sample: Sample) -> Collection[Any]:
        value = read(sample).get(key)
        return (NONE,) if value is None else (value,)

    return values


def _values(name: str, value: Any, place: str) -> tuple[Any, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not values or not all(isinstance(each, str | int | float | bool) for each in values):
        raise ConfigError(
            f"{name!r} is a text, a number, true or false, or a list of them", place=place, remedy=REMEDY
        )
    return values


def _epochs(value: Any, place: str) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, list | tuple) else (value,)
    if not all(isinstance(each, int) and not isinstance(each, bool) for each in values):
        raise ConfigError("'epoch' is a whole number, or a list of them", place=place, remedy="epoch = 1")
    return values


def _equal(value: Any, wanted: Any) -> bool:
    """Compare without taking true for 1."""
    return bool(value == wanted) and isinstance(value, bool) == isinstance(wanted, bool)


def _object(text: str) -> Mapping[str, Any]:
    try:
        loaded = json.loads(text)
    except ValueError:
        return {}
    return loaded if isinstance(loaded, dict) else {}
