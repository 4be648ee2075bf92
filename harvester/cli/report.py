"""report, view, metrics: a store for people and for Prometheus."""

from __future__ import annotations

from pathlib import Path

import typer

from harvester.cli.store_path import STORE

JSON = typer.Option(False, "--json", help="One machine-readable line on stdout.")


def register(app: typer.Typer) -> None:
    """Add this file's verbs."""
    app.command(epilog="Example: harvester report my-run/store")(report)
    app.command(epilog="Example: harvester view my-run/store --port 8765")(view)
    app.command(epilog="Example: harvester metrics my-run/store --out /var/lib/node_exporter/harvest.prom")(
        metrics
    )


def report(
    store: Path = STORE,
    out: Path | None = typer.Option(None, help="Where to write; default: report.html in the store."),
    scorecard: Path | None = typer.Option(None, help="A scorecard.json to show beside the harvest."),
    training: Path | None = typer.Option(None, help="A train.jsonl whose loss to draw."),
    as_json: bool = JSON,
) -> None:
    """Write one self-contained HTML page about a harvest."""
    from harvester.cli.console import emit
    from harvester.observe.report import report as room

    path = room.write_report(store, out or store / "report.html", scorecard=scorecard, training=training)
    emit({"report": str(path)}, [f"report {path}"], as_json=as_json)


def view(
    store: Path = STORE,
    port: int = typer.Option(8765, min=0, max=65535, help="On 127.0.0.1; 0 picks a free one."),
    as_json: bool = JSON,
) -> None:
    """Serve the report live on 127.0.0.1, read-only, with /metrics for Prometheus; Ctrl-C ends it.

    Anyone with an account on this machine can open it.
    """
    from harvester.cli.console import emit
    from harvester.observe.report import server as room

    def ready(address: str) -> None:
        emit({"view": address}, [f"view    {address}   (Ctrl-C ends it)"], as_json=as_json)

    try:
        room.serve(store, port, ready)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def metrics(
    store: Path = STORE,
    out: Path | None = typer.Option(
        None, help="A file for node_exporter's textfile collector; default: stdout."
    ),
    as_json: bool = JSON,
) -> None:
    """Write Prometheus text about a store, once; `view` serves the same at /metrics."""
    from harvester.cli.console import emit, hand_over
    from harvester.observe.report import prometheus as exposition

    if out is None:
        text = exposition.exposed(store)
        if as_json:
            emit({"text": text}, [], as_json=True)
        else:
            hand_over(text)
        return
    exposition.write_textfile(store, out)
    emit({"metrics": str(out)}, [f"metrics {out}"], as_json=as_json)
