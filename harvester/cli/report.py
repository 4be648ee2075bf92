"""Commands that show a store to people and to Prometheus: `report`, `view`, `metrics`."""

from __future__ import annotations

from pathlib import Path

import typer

from harvester.cli.commands import LOOK, HarvesterApp
from harvester.cli.console import JSON, READ_STORE, STORE, emit, write_stdout


def register(app: HarvesterApp) -> None:
    """Add the commands of this module to `app`."""
    app.command(epilog="Example: harvester report my-run/store", section=LOOK)(report)
    app.command(epilog="Example: harvester view my-run/store --port 8765", section=LOOK)(view)
    app.command(
        epilog="Example: harvester metrics my-run/store --out /var/lib/node_exporter/harvest.prom",
        section=LOOK,
    )(metrics)


def report(
    store: Path = READ_STORE,
    out: Path | None = typer.Option(
        None, help="File to write; default: report.html in the store, or here for a URL."
    ),
    scorecard: Path | None = typer.Option(None, help="A scorecard.json to include."),
    training: Path | None = typer.Option(None, help="A train.jsonl whose loss curve to include."),
    as_json: bool = JSON,
) -> None:
    """Write one self-contained HTML page about a harvest."""
    from harvester.observe.report.report import write_report
    from harvester.store.published import is_copy

    if out is None:
        out = Path() / "report.html" if is_copy(store) else store / "report.html"
    path = write_report(store, out, scorecard=scorecard, training=training)
    emit({"report": str(path)}, [f"report {path}"], as_json=as_json)


def view(
    store: Path = STORE,
    port: int = typer.Option(8765, min=0, max=65535, help="Port on 127.0.0.1; 0 picks a free one."),
    as_json: bool = JSON,
) -> None:
    """Serve a live report, a search and /metrics on 127.0.0.1 until Ctrl-C. It is read-only.

    Open the address that it prints: the token in it is new at each start. Only /metrics needs none.
    """
    from harvester.observe.report.server import serve

    def ready(address: str) -> None:
        emit({"view": address}, [f"view    {address}   (Ctrl-C ends it)"], as_json=as_json)

    try:
        serve(store, port, ready)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def metrics(
    store: Path = STORE,
    out: Path | None = typer.Option(
        None, help="File to write, as for node_exporter's textfile collector; default: stdout."
    ),
    as_json: bool = JSON,
) -> None:
    """Write the metrics of a store as Prometheus text, once; `view` serves the same at /metrics."""
    from harvester.observe.report import prometheus

    if out is None:
        text = prometheus.metrics_text(store)
        if as_json:
            emit({"text": text}, [], as_json=True)
        else:
            write_stdout(text)
        return
    prometheus.write_textfile(store, out)
    emit({"metrics": str(out)}, [f"metrics {out}"], as_json=as_json)
