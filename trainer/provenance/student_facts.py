"""Hold the facts that a student's documents are written from, and read the base's name and licence."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from harvester.export.cards.facts import DatasetFacts
from harvester.terms.obligations import licence_of

_HUB_CACHE = re.compile(r"models--(.+)")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentFacts:
    """Describe a model that was trained on a data set.

    Attributes:
        base: name of the base model. base_licence: its Hub or SPDX id.
        licence: Hub or SPDX id chosen by the operator; None: the one that the duties require.
        sha256: of the weights file. base_sha256: of the base's config and weights. Both empty if unknown.
        merged: merged weights, not an adapter. full: all weights were trained, so `merged` is true, too.
    """

    name: str
    version: str
    base: str
    base_licence: str
    trained_on: date
    dataset: DatasetFacts
    licence: str | None = None
    sha256: str = ""
    base_sha256: str = ""
    merged: bool = False
    full: bool = False

    @property
    def licence_id(self) -> str:
        """Return the Hub id of the licence: the operator's, else what the duties require, else the base's."""
        duties = self.dataset.duties
        return licence_of(duties, self.licence or (None if _forces_licence(duties) else self.base_licence))


def _forces_licence(duties: Sequence[str]) -> bool:
    return any(duty == "noncommercial" or duty.startswith("card_licence:") for duty in duties)


def base_name(folder: Path) -> str:
    """Return a base's name from its folder: `owner/name` in a Hub cache, else the folder's own name."""
    cached = next((match for part in folder.parts if (match := _HUB_CACHE.fullmatch(part))), None)
    return cached[1].replace("--", "/", 1) if cached else folder.name


def base_licence(folder: Path) -> str:
    """Return the licence that the base's own card names, "other" if it names none."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return "other"
    header = text.split("---", 2)[1] if text.startswith("---") else ""
    match = re.search(r"^license:\s*[\"']?([A-Za-z0-9.+-]+)", header, flags=re.MULTILINE)
    return match[1] if match else "other"
