"""The command `import`: convert a prompt file of another tool to prompt lines."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from harvester.cli.commands import PREPARE, HarvesterApp
from harvester.cli.console import JSON, emit, message
from harvester.errors import UsageError

if TYPE_CHECKING:
    from harvester.prompts.import_file import Imported

Answers = Literal["drop", "reference"]


def register(app: HarvesterApp) -> None:
    """Add the command of this module to `app`."""
    app.command(
        "import", epilog="Example: harvester import alpaca.json --answers reference", section=PREPARE
    )(import_prompts)


def import_prompts(
    file: Path = typer.Argument(
        ..., metavar="FILE", help="File, or a folder that `datasets` saved.", show_default=False
    ),
    out: Path | None = typer.Option(
        None, "--out", "-o", help="New file to write; - for stdout. Default: NAME.prompts.jsonl beside FILE."
    ),
    answers: Answers = typer.Option(
        "drop", help="Answers that the file holds: left out, or kept as `reference`."
    ),
    column: str = typer.Option("", help="Name of the column that holds the question, if it is not found."),
    as_json: bool = JSON,
) -> None:
    """Convert prompts of another tool (ShareGPT, Alpaca, TRL, batch files, columns)."""
    import sys

    from harvester.prompts import import_file as importer

    to_stdout = out == Path("-")
    if to_stdout and as_json:
        raise UsageError(
            "--json prints the result on stdout, where --out - writes the prompt lines",
            place="--json",
            remedy="leave out one of the two",
        )
    if to_stdout:
        result = importer.write_lines(file, sys.stdout.buffer, answers=answers, column=column)
        sys.stdout.buffer.flush()
        for line in _lines(result, "stdout"):
            message(line)
        return
    path = out or importer.default_output(file)
    result = importer.import_file(file, path, answers=answers, column=column)
    emit(_facts(result, path), _lines(result, str(path)), as_json=as_json)


def _facts(result: Imported, path: Path) -> dict[str, Any]:
    return {
        "rows": result.rows,
        "file": str(path),
        "formats": dict(result.formats),
        "answers": result.answers,
        "dropped": dict(result.dropped),
        "metadata": sorted(result.metadata),
        "skipped": dict(result.skipped),
        "first": result.first,
    }


def _lines(result: Imported, where: str) -> list[str]:
    """Return the text of the result: what was recognised, what was left out, the first prompt line."""
    from harvester.prompts.import_file import SHOWN_CHARACTERS

    lines = [f"wrote {result.rows:,} prompt lines to {where}"]
    lines += [f"  recognised {count:,}: {format}" for format, count in result.formats.most_common()]
    lines += [f"  left out in {count:,}: {name}" for name, count in result.dropped.most_common()]
    if result.metadata:
        lines.append(f"  kept as metadata: {', '.join(sorted(result.metadata))}")
    for reason, count in result.skipped.most_common(10):
        lines.append(f"  skipped {count:,}: {reason} (the first is {result.skipped_at[reason]})")
    first = result.first
    shown = first if len(first) <= SHOWN_CHARACTERS else f"{first[:SHOWN_CHARACTERS]}..."
    lines.append(f"first ({result.first_at}): {shown}")
    return lines
