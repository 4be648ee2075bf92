"""Define the grammar of the question-to-SQL task: tables, columns, comparisons, and their queries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

COUNT: Final = "count"

TEXT_COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "users": ("name", "email", "city"),
    "books": ("title", "author"),
    "films": ("title", "director"),
    "orders": ("customer", "product"),
    "cities": ("name", "country"),
    "teams": ("name", "coach", "city"),
    "cars": ("model", "color"),
    "shops": ("name", "street"),
}
NUMBER_COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "users": ("age", "score"),
    "books": ("pages", "price"),
    "films": ("length", "rating"),
    "orders": ("total", "price"),
    "cities": ("area", "score"),
    "teams": ("wins", "points"),
    "cars": ("speed", "price"),
    "shops": ("sales", "rating"),
}
OPERATORS: Final[Mapping[str, str]] = {
    "over": ">",
    "under": "<",
    "exactly": "=",
    "at least": ">=",
    "at most": "<=",
}


def selectable(table: str) -> tuple[str, ...]:
    """A table and what may be asked of it: its columns and the number of its rows."""
    return (*TEXT_COLUMNS[table], *NUMBER_COLUMNS[table], COUNT)


def to_sql(what: str, table: str, field: str, op: str, value: str) -> str | None:
    """Return the query, None if the table has no such column."""
    if what not in selectable(table) or field not in NUMBER_COLUMNS[table]:
        return None
    selected = "COUNT(*)" if what == COUNT else what
    return f"SELECT {selected} FROM {table} WHERE {field} {OPERATORS[op]} {value}"  # noqa: S608 - an answer, never executed
