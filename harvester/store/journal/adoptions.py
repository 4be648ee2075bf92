"""Note in the journal which teachers, named by their address, were adopted by an identity.

Rows of an adopted teacher keep the lineage of the run that asked: its address stands there, and the terms go
by it. Only their keys change. A row `identity:ADDRESS` of `meta` holds the identity, when it was adopted, and
whether the adoption has ended.
"""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from harvester.errors import StoreError
from harvester.store.journal.meta_values import write_values
from harvester.system.command_line.shell_words import shell_line

_PREFIX = "identity:"


@dataclass(frozen=True, slots=True)
class Adoption:
    """The identity by which the teacher at an address was adopted. `at` is Unix seconds."""

    address: str
    identity: str
    at: float
    is_complete: bool

    def facts(self) -> dict[str, Any]:
        """Return the value of its row in `meta`."""
        return {"identity": self.identity, "at": self.at, "complete": self.is_complete}


def read_adoptions(connection: sqlite3.Connection) -> dict[str, Adoption]:
    """Return the adoptions of a store by address."""
    query = "SELECT name, value FROM meta WHERE name GLOB ?"
    adoptions = {}
    for name, text in connection.execute(query, (f"{_PREFIX}*",)):
        value: dict[str, Any] = orjson.loads(text)
        address = name.removeprefix(_PREFIX)
        adoptions[address] = Adoption(
            address, str(value["identity"]), float(value["at"]), value["complete"] is True
        )
    return adoptions


def note_adoption(connection: sqlite3.Connection, adoption: Adoption) -> None:
    """Write an adoption, inside an open transaction."""
    write_values(connection, {f"{_PREFIX}{adoption.address}": adoption.facts()})


def require_complete(connection: sqlite3.Connection, store: Path) -> None:
    """Do nothing unless an adoption was interrupted: rows that it did not reach would be paid for again.

    Raises:
        StoreError: names the command that completes it.
    """
    for adoption in read_adoptions(connection).values():
        if not adoption.is_complete:
            raise StoreError(
                f"the adoption of {adoption.address} by {adoption.identity!r} was interrupted",
                place=str(store),
                remedy="harvester adopt "
                + shell_line(store, "--identity", adoption.identity, "--from", adoption.address),
            )
