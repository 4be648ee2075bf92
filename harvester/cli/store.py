"""seal, verify, curate, export: the verbs around a store."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import typer

from harvester.cli.store_path import STORE
from harvester.store import paths

Shape = Literal["prompt-completion", "messages", "openai", "sharegpt"]
Reasoning = Literal["keep", "inline", "drop"]
JSON = typer.Option(False, "--json", help="One machine-readable line on stdout.")


def register(app: typer.Typer) -> None:
    """Add this file's verbs."""
    app.command(epilog="Example: harvester seal my-run/store")(seal)
    app.command(epilog="Example: harvester verify my-run/store")(verify)
    app.command(epilog="Example: harvester purge my-run/store --prompt-id p17")(purge)
    app.command(epilog="Example: harvester curate curate.toml")(curate)
    app.command(epilog="Example: harvester export my-run/store out --to messages")(export)


def seal(store: Path = STORE, as_json: bool = JSON) -> None:
    """Move all journalled answers into Parquet shards now."""
    from harvester.cli.console import emit
    from harvester.store.maintain import seal_task as sealing

    sealed = sealing.seal_now(store)
    files = [str(store / paths.SHARDS / name) for name in sealed.files]
    emit(
        {"rows": sealed.rows, "files": files},
        [f"sealed {sealed.rows:,} answers into {len(files)} shards under {store / paths.SHARDS}"],
        as_json=as_json,
    )


def verify(
    store: Path = STORE,
    repair: bool = typer.Option(
        False, "--repair", help="Quarantine damaged and foreign files; ask again only for what is gone."
    ),
    as_json: bool = JSON,
) -> None:
    """Check counts, hashes, dangling intents, torn or foreign files; exit 1 names each finding."""
    from harvester.cli.console import emit
    from harvester.errors import FindingsError
    from harvester.store.maintain import repair as mending

    data, lines, left = mending.check(store, repair=repair)
    emit(data, lines, as_json=as_json)
    if left:
        raise FindingsError(f"{left} findings", place=str(store), remedy="`harvester verify PATH --repair`")


def purge(
    store: Path = STORE,
    key: str | None = typer.Argument(None, help="A key, 64 hex digits."),
    prompt_id: str | None = typer.Option(None, help="Every answer this prompt asked for."),
    as_json: bool = JSON,
) -> None:
    """Take answers out of the journal, the shards and so of every corpus and export, for good."""
    from harvester.cli.console import emit
    from harvester.store.maintain import purge as purging

    taken = purging.purge_store(store, key, prompt_id)
    emit({"purged": taken}, [f"purged {taken:,} answers from {store}"], as_json=as_json)


def curate(config: Path = typer.Argument(..., help="Path of a curate.toml."), as_json: bool = JSON) -> None:
    """Filter a corpus into a curated corpus, with a tally of reasons."""
    from harvester.cli.console import emit
    from harvester.export import curate as room

    wanted = room.load(config)
    tally = room.curate(wanted)
    lines = [f"kept {tally.kept:,} rows in {wanted.out}"]
    lines += [f"  dropped {count:,}: {reason}" for reason, count in tally.dropped.items()]
    emit({"kept": tally.kept, "dropped": dict(tally.dropped), "out": str(wanted.out)}, lines, as_json=as_json)


def export(
    store: Path = STORE,
    out: Path = typer.Argument(..., help="A new folder.", show_default=False),
    to: Shape = typer.Option("prompt-completion", help="The shape to write."),
    reasoning: Reasoning = typer.Option("keep", help="Reasoning content: its own field, inside, or gone."),
    split: str | None = typer.Option(None, help="Only rows whose metadata `split` equals this."),
    as_json: bool = JSON,
) -> None:
    """Write a corpus in the shapes other trainers read."""
    from harvester.cli.console import emit
    from harvester.export import export as room

    done = room.export(store, out, shape=to, reasoning=reasoning, split=split)
    lines = [f"wrote {done.rows:,} rows to {out}"]
    lines += [f"  left out {count:,}: {reason}" for reason, count in done.left_out.items()]
    data = {"rows": done.rows, "files": [str(path) for path in done.files], "left_out": dict(done.left_out)}
    emit(data, lines, as_json=as_json)
