"""Render the page of an experiment: a verdict, figures, one plot, tables. No scripts, no remote parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from markupsafe import Markup

from trainer.pages import render


@dataclass(frozen=True, slots=True)
class Table:
    """A table of texts."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


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
