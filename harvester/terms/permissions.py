"""Read and record permissions: what a teacher allowed this operator beyond its published terms.

A file `permissions/<id>.toml` is evidence, written by a person at a terminal. Its SHA-256 goes into the
lineage of every row that relied on it. It is the only way past a restriction. Its last line is a checksum of
its values: a file made or edited by hand is refused. That catches mistakes and scripts, not forgery.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from datetime import date, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from harvester.errors import ConfigError, TermsRefused
from harvester.system.hosts import plain_host
from harvester.system.own_files import MAX_TOML_BYTES, read_bytes

BASES = ("contract", "order-form", "written-authorisation", "own-model", "stated-exception")
USES = ("harvest", "seal", "train", "export")
PERMISSION_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,99}\Z")
_PATTERNS = re.compile(r"[*?\[\]]")
_RECORD_AGAIN = "record what you hold under a new id: `harvester terms record`"


@dataclass(frozen=True, slots=True, kw_only=True)
class Permission:
    """One permission: what was granted, by whom, and where the evidence is.

    Attributes:
        host: exact host name the permission is about; patterns are refused.
        model: shell-style pattern of models; `*` only where the grant names all of them.
        uses: which of harvest, seal, train and export it covers.
        scope: the grant in the operator's words.
        evidence: where the signed text can be found: a contract number, a file, a message id.
        granted_on, expires: first and last day; `expires` None means until withdrawn.
        recorded_on: day on which it was recorded.
        sha256: of the file's bytes.
    """

    id: str
    granted_by: str
    basis: str
    scope: str
    host: str
    model: str
    evidence: str
    granted_on: date
    recorded_by: str
    uses: tuple[str, ...] = USES
    expires: date | None = None
    recorded_on: date | None = None
    sha256: str = ""

    def covers(self, host: str, model: str, use: str, today: date) -> bool:
        """Return whether the permission covers this host, model and use on this day."""
        in_time = self.granted_on <= today and (self.expires is None or today <= self.expires)
        same_host = plain_host(host) == plain_host(self.host)
        same_model = fnmatchcase(model.lower(), self.model.lower())
        return in_time and same_host and same_model and use in self.uses

    def lifts_duty(self, duty: str) -> bool:
        """Return whether the permission lifts a duty together with the restriction it belongs to.

        A grant replaces the restriction. An exception stated in the terms themselves (research, the same
        line of models) does not, because its duty keeps the student within the exception. Names and notices
        are owed in any case.
        """
        restricting = duty == "noncommercial" or duty.startswith("same_line:")
        return restricting and self.basis != "stated-exception"


def load_permissions(*folders: Path) -> tuple[Permission, ...]:
    """Read all permissions of the folders, by file name; a missing folder is empty.

    Raises:
        ConfigError: a file is not a recorded permission; names it.
    """
    paths = [path for folder in folders for path in sorted(folder.glob("*.toml"))]
    return tuple(_read(path) for path in paths)


def _read(path: Path) -> Permission:
    try:
        raw = read_bytes(path, MAX_TOML_BYTES, follows_links=True)
        row = tomllib.loads(raw.decode("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"can't be read as a permission: {error}", place=str(path), remedy=_RECORD_AGAIN
        ) from None
    if row.get("id") != path.stem:
        raise ConfigError(
            f"holds id {row.get('id')!r}, which must equal the file's name",
            place=str(path),
            remedy=_RECORD_AGAIN,
        )
    stored_checksum = row.pop("checksum", None)
    unknown = set(row) - {f.name for f in fields(Permission)} | ({"sha256"} & set(row))
    if unknown:
        raise ConfigError(f"unknown fields {sorted(unknown)}", place=str(path), remedy=_RECORD_AGAIN)
    try:
        uses = tuple(row.get("uses", USES))
        permission = Permission(**{**row, "uses": uses, "sha256": hashlib.sha256(raw).hexdigest()})
    except TypeError as error:
        message = str(error).replace("Permission.__init__() ", "")
        raise ConfigError(message, place=str(path), remedy=_RECORD_AGAIN) from None
    _check(permission, str(path))
    if stored_checksum != checksum(permission):
        raise ConfigError(
            "was written or edited by hand: its checksum does not match",
            place=str(path),
            remedy=_RECORD_AGAIN,
        )
    return permission


def checksum(permission: Permission) -> str:
    """Return SHA-256 (64 hex digits) over all values, as JSON with sorted names."""
    values = {f.name: getattr(permission, f.name) for f in fields(Permission) if f.name != "sha256"}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def _check(permission: Permission, place: str) -> None:
    wrong = ""
    words = ("id", "granted_by", "scope", "host", "model", "evidence", "recorded_by")
    empty = [name for name in words if not _is_filled(getattr(permission, name))]
    granted = permission.granted_on
    dates = (granted, permission.expires or granted, permission.recorded_on or granted)
    if empty:
        wrong = f"{', '.join(empty)} must not be empty"
    elif not PERMISSION_ID.match(permission.id):
        wrong = f"id {permission.id!r}: small letters, digits, dot, dash and underscore only"
    elif permission.basis not in BASES:
        wrong = f"basis {permission.basis!r} is not one of {', '.join(BASES)}"
    elif _PATTERNS.search(permission.host):
        wrong = f"host {permission.host!r} must be one exact name, not a pattern"
    elif not permission.uses or not set(permission.uses) <= set(USES):
        wrong = f"uses {list(permission.uses)} are not among {', '.join(USES)}"
    elif not all(type(day) is date for day in dates) or dates[1] < dates[0]:
        wrong = "granted_on, expires and recorded_on must be dates, and expires not before granted_on"
    if wrong:
        raise ConfigError(wrong, place=place, remedy="answer the question again: `harvester terms record`")


def _is_filled(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def require_person(folder: Path, *, isatty: bool) -> None:
    """Refuse to record a permission where nobody sits at a terminal.

    Raises:
        TermsRefused: names the folder.
    """
    if not isatty:
        raise TermsRefused(
            "a permission is recorded by a person at a terminal",
            place=str(folder),
            remedy="run `harvester terms record` interactively; there is no flag for it",
        )


def record_permission(folder: Path, permission: Permission, *, isatty: bool) -> Path:
    """Write `folder/<id>.toml`; an existing file is never replaced.

    Args:
        isatty: whether a person sits at the terminal; a script can't grant itself a permission.

    Raises:
        TermsRefused: no terminal.
        ConfigError: an incomplete permission, or one of that id exists already.
    """
    require_person(folder, isatty=isatty)
    _check(permission, permission.id or "permission")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{permission.id}.toml"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(as_toml(permission))
            file.flush()
            os.fsync(file.fileno())
    except FileExistsError:
        raise ConfigError(
            "a permission of this id exists, and rows may already rely on it",
            place=str(path),
            remedy="record a new one under another id",
        ) from None
    return path


def as_toml(permission: Permission) -> str:
    """Return the text of a permission's file."""
    lines = [
        "# A recorded permission: evidence, not a switch. Rows name this file by its SHA-256; never edit it."
    ]
    for field in fields(Permission):
        value = getattr(permission, field.name)
        if field.name != "sha256" and value is not None:
            lines.append(f"{field.name} = {toml_value(value)}")
    lines.append(f'checksum = "{checksum(permission)}"')
    return "\n".join(lines) + "\n"


def toml_value(value: str | bool | date | Sequence[str]) -> str:
    """Return a string, flag, date or list of strings as TOML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # a JSON string is a TOML basic string, but for DEL, which TOML wants escaped
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, datetime):
        raise TypeError("a day, not a moment")
    if isinstance(value, date):
        return value.isoformat()
    return "[" + ", ".join(toml_value(each) for each in value) + "]"
