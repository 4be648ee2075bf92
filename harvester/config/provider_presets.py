"""Teachers as rows of data: where they answer, what they are called, which terms bind. Never a class each."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from importlib.resources import files
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from harvester.errors import ConfigError

HEADERS = ("openai", "none")
PURPOSES = ("train", "eval")


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherRow:
    """What a `[teacher]` table would hold, and how this teacher speaks of its limits.

    Attributes:
        model: an example of a name it knows. terms: ids of terms records, comma-separated.
        api_key_env: the NAME of a variable, "" where no key is needed.
        purpose: what its terms leave open: train, or eval only.
        rate_limit_headers: "openai" for x-ratelimit-{limit,remaining,reset}-{requests,tokens}; "none" where
            limits are learned from refusals. A hint: the client reads whatever headers come.
    """

    id: str
    about: str
    base_url: str
    model: str
    terms: str
    api_key_env: str = ""
    purpose: str = "train"
    rate_limit_headers: str = "none"

    @property
    def host(self) -> str:
        """Host name without port."""
        return urlsplit(self.base_url).hostname or ""

    def as_toml(self) -> str:
        """The `[teacher]` table for a harvest.toml, with its `[run]` purpose where only eval is open."""
        lines = [f"# {self.about}", "[teacher]"]
        lines += [f'{name} = "{getattr(self, name)}"' for name in ("base_url", "model", "terms")]
        if self.api_key_env:
            lines.append(f'api_key_env = "{self.api_key_env}"')
        if self.purpose != "train":
            lines += ["[run]", f'purpose = "{self.purpose}"']
        return "\n".join(lines) + "\n"


def load_teachers(*overlays: Path) -> Mapping[str, TeacherRow]:
    """Shipped rows by id, overlaid by the files of the user's folders (a missing folder is empty).

    Raises:
        ConfigError: a file that is no teacher row; names it.
    """
    shipped = sorted(files("harvester_data").joinpath("teachers").iterdir(), key=lambda item: item.name)
    texts = [(item.name, item.read_text(encoding="utf-8")) for item in shipped if item.name.endswith(".toml")]
    for folder in overlays:
        texts += [(str(path), path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.toml"))]
    rows = [_row(text, place) for place, text in texts]
    return {row.id: row for row in rows}


def _row(text: str, place: str) -> TeacherRow:
    try:
        told: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"is no teacher row: {error}", place=place) from None
    unknown = set(told) - {f.name for f in fields(TeacherRow)}
    wrong = [name for name, value in told.items() if not isinstance(value, str)]
    if unknown or wrong or "id" in told:
        raise ConfigError(f"unknown or wrong fields: {sorted({*unknown, *wrong} or {'id'})}", place=place)
    try:
        row = TeacherRow(id=Path(place).stem, **told)
    except TypeError as error:
        raise ConfigError(str(error).replace("TeacherRow.__init__() ", ""), place=place) from None
    if row.rate_limit_headers not in HEADERS or row.purpose not in PURPOSES:
        raise ConfigError(f"rate_limit_headers is one of {HEADERS}, purpose one of {PURPOSES}", place=place)
    return row
