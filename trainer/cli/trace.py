"""The command that traces what was learned back to its origin: `trace`."""

from __future__ import annotations

from pathlib import Path

import typer

from harvester.system.command_line.verb_command import VerbApp
from trainer.cli.options import AS_JSON, JUDGE
from trainer.console import print_result


def register(app: VerbApp) -> None:
    """Add the commands of this module to `app`."""
    app.command(section=JUDGE)(trace)


def trace(
    adapter: Path = typer.Argument(..., metavar="ADAPTER", help="Folder of an adapter.", show_default=False),
    row: str | None = typer.Argument(
        None, metavar="ROW", help="Prompt id, or the start of a key; none: check everything."
    ),
    corpus: str | None = typer.Option(
        None, metavar="PATH", help="Folder or URL of the corpus; needed to trace a row."
    ),
    as_json: bool = AS_JSON,
) -> None:
    """Trace a learned row back to its request, teacher and terms, or verify the whole hash tree.

    Example: trainer trace data/demo/adapter skills-sum-train-0353 --corpus data/demo/store
    """
    from trainer.errors import ConfigError, FindingsError
    from trainer.provenance import fingerprint

    learned = None
    if corpus is not None:
        from harvester.store.published import local_store

        learned = local_store(corpus)
    if row is not None:
        if learned is None:
            raise ConfigError("tracing a row needs the corpus", place=row, remedy="name it with --corpus")
        origin = fingerprint.trace(adapter, row, learned)
        print_result(origin, [f"{name:<15} {value}" for name, value in origin.items()], as_json=as_json)
        return
    findings = fingerprint.verify(adapter, learned)
    tree, leaves = fingerprint.read(adapter)
    lines = [
        f"{len(leaves):,} learned rows, root {tree['root']}",
        *(f"  {finding}" for finding in findings),
    ]
    print_result({"root": tree["root"], "rows": len(leaves), "findings": findings}, lines, as_json=as_json)
    if findings:
        raise FindingsError(
            f"{len(findings)} findings", place=str(adapter), remedy=fingerprint.CHANGED_REMEDY
        )
