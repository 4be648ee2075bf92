"""Write a page of rows to look at, the most conspicuous first: answers side by side, and rows like them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from harvester.export.masking import PRIVATE, mask
from trainer.files import write_text
from trainer.pages import render

# Characters of a text on the page; the rest is left out and counted.
_LONGEST = 1500


@dataclass(frozen=True, slots=True)
class Text:
    """A text with its heading; `kind` is a class of the style sheet: "", "good", "bad" or "like"."""

    heading: str
    text: str
    kind: str = ""


@dataclass(frozen=True, slots=True)
class RowCard:
    """A row of the page.

    Attributes:
        facts: short figures beside the title.
        texts: shown side by side.
        like: rows like this one, below.
    """

    title: str
    facts: Sequence[str]
    texts: Sequence[Text]
    like: Sequence[Text] = ()


@dataclass(frozen=True, slots=True)
class RowPage:
    """A page of rows, in the order in which they are shown; `tiles` pairs figures with their meanings."""

    title: str
    lead: str
    tiles: Sequence[tuple[str, str]]
    cards: Sequence[RowCard]
    like_heading: str = ""

    def write(self, path: Path) -> Path:
        """Write the page as one HTML file without scripts or remote assets; return its path.

        Raises:
            StoreError: the disk refuses.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        write_text(path, render("trainer.evaluation", "rows.html.j2", **values, shortened=shortened))
        return path


def shortened(text: str) -> str:
    """Return the beginning of a text, with private data hidden, and how much more there is."""
    text = mask(text, PRIVATE)
    return (
        text if len(text) <= _LONGEST else f"{text[:_LONGEST]} … ({len(text) - _LONGEST:,} more characters)"
    )
