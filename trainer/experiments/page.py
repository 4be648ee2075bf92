"""Render the page of an experiment: a verdict, figures, one plot, tables. No scripts, no remote parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from markupsafe import Markup

from trainer.pages import render

# Characters of the longest cell that is no sentence, as "0.512 (0.48–0.54)" is none.
LONGEST_FIGURE = 40

# Cells of a figure that there is not.
_NOTHING = frozenset({"", "-", "–"})


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]

    def kind(self, place: int) -> str:
        """Return what a column holds: "text" (sentences or paths, which are wrapped), "word", or "figure"."""
        cells = [str(row[place]) for row in self.rows if place < len(row)]
        if any(len(cell) > LONGEST_FIGURE for cell in cells):
            return "text"
        words = [cell for cell in cells if cell not in _NOTHING and not cell.lstrip("$+-~<>")[:1].isdigit()]
        return "word" if words and len(words) == sum(cell not in _NOTHING for cell in cells) else "figure"


@dataclass(frozen=True, slots=True)
class Page:
    """What a page shows. Texts are escaped when it is rendered.

    Attributes:
        stops: whether the verdict advises against paying for more.
        tiles: figures with their meanings.
        legend: class and name of each line of the plot; empty: none is shown.
        notes: lines below the plot.
    """

    title: str
    lead: str
    verdict: str
    stops: bool
    tiles: Sequence[tuple[str, str]]
    plot_title: str
    plot: Markup
    legend: Sequence[tuple[str, str]]
    notes: Sequence[str]
    tables: Sequence[Table]

    def render(self) -> str:
        """Return the page as HTML."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return render("trainer.experiments", "page.html.j2", **values)
