"""Render the page of a curation: reasons, what each filter would drop by itself, kept beside dropped rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from harvester.errors import ConfigError
from harvester.export.curate import EXAMPLES_NOTE, CurateConfig, CurateCounts
from harvester.system.safe_text import visible

# Characters in which an earlier page of ours names itself, and how.
_HEAD = 2000
_TITLE = "<title>Curation of "


def check_target(path: Path) -> None:
    """Check that a page may be written there: NAME.html, and no file is there but an earlier page.

    Raises:
        ConfigError: it may not.
    """
    remedy = "name a new file, as in --page page.html"
    if path.suffix.lower() != ".html":
        raise ConfigError("a page is written to a file NAME.html", place=str(path), remedy=remedy)
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            is_ours = _TITLE in file.read(_HEAD)
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"can't be read: {error.strerror}", place=str(path), remedy=remedy) from None
    if not is_ours:
        raise ConfigError("exists, and is no page of an earlier curation", place=str(path), remedy=remedy)


def render(config: CurateConfig, counts: CurateCounts) -> str:
    """Return the page as HTML: no scripts, nothing loaded from elsewhere."""
    total = counts.kept + sum(counts.dropped.values())
    environment = Environment(
        loader=PackageLoader("harvester.export", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    masked = f", {counts.changed:,} of them masked" if counts.changed else ""
    kept = counts.examples.get("kept", ())
    order = ", ".join(config.names) or "none"
    return environment.get_template("curation_page.html.j2").render(
        title=f"Curation of {visible(str(config.corpus))}",
        lead=f"{counts.kept:,} of {total:,} rows kept{masked}, in {visible(str(config.out))}; "
        f"filters in order: {order}",
        notes=[visible(note) for note in counts.notes],
        total=f"{total:,}",
        reasons=[_row(name, rows, total) for name, rows in _largest_first(counts.dropped)],
        alone=[
            {
                **_row(name, found.get("alone", 0), total),
                "no_other": f"{found.get('no_other', 0):,}",
                "masks": f"{found.get('masks', 0):,}",
            }
            for name, found in counts.alone.items()
        ],
        examples_note=EXAMPLES_NOTE,
        kept=[{"name": f"kept ({counts.kept:,})", "rows": [_shown(row) for row in kept]}] if kept else [],
        dropped=[
            {"name": f"{name} ({rows:,})", "rows": [_shown(row) for row in counts.examples[name]]}
            for name, rows in _largest_first(counts.dropped)
        ],
    )


def _largest_first(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))


def _row(name: str, rows: int, total: int) -> dict[str, Any]:
    share = 100 * rows / total if total else 0.0
    return {"name": visible(name), "rows": f"{rows:,}", "percent": f"{share:.1f} %", "width": f"{share:.2f}"}


def _shown(row: Mapping[str, str]) -> dict[str, str]:
    return {name: visible(text) for name, text in row.items()}
