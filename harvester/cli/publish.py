"""Commands for object storage and the Hugging Face Hub: publish, fetch, push."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from harvester.cli.commands import CORPUS, HarvesterApp
from harvester.cli.console import JSON, STORE, TERMS_BESIDE, emit, message
from harvester.system.command_line.upload_options import PUBLIC, PUBLICATION_URL, TOKEN_ENV, UPLOAD
from harvester.system.counted import counted

if TYPE_CHECKING:
    from harvester.system.objects.publisher import Published

PushShape = Literal["prompt-completion", "messages", "openai", "sharegpt", "shards"]


def register(app: HarvesterApp) -> None:
    """Add the commands of this module to `app`."""
    app.command(epilog="Example: harvester publish my-run/store s3://bucket/my-run", section=CORPUS)(publish)
    app.command(epilog="Example: harvester fetch s3://bucket/my-run my-copy", section=CORPUS)(fetch)
    app.command(epilog="Example: harvester push my-run/store my-name/my-corpus --upload", section=CORPUS)(
        push
    )


def publish(
    store: Path = STORE,
    url: str = PUBLICATION_URL,
    repair: bool = typer.Option(
        False, "--repair", help="Upload objects again that are missing or changed there."
    ),
    verify: bool = typer.Option(False, "--verify", help="Read all objects back, also those verified before."),
    replace: bool = typer.Option(
        False, "--replace", help="Take the place of another corpus that was published there."
    ),
    prune: bool = typer.Option(
        False,
        "--prune",
        help="Delete objects there that only earlier publications named.",
    ),
    beside: Path | None = TERMS_BESIDE,
    as_mirror: bool = typer.Option(False, "--as-mirror", hidden=True),
    as_json: bool = JSON,
) -> None:
    """Publish sealed shards, runs, documents and the report to object storage; the manifest comes last.

    The same command goes on after a kill, uploads only what is missing, and names objects that are gone or
    changed there (exit 1). Every object is read back after its upload. Credentials come from the environment
    of the cloud's own library, never from the URL.
    """
    from harvester.publish.mirror import mirror_store
    from harvester.publish.store import publish_store
    from harvester.system.objects.publisher import PublishOptions

    if as_mirror:
        mirrored = mirror_store(store, url)
        emit({"shards": list(mirrored)}, [f"mirrored {counted(len(mirrored), 'shard')}"], as_json=as_json)
        return
    options = PublishOptions(repair=repair, verify=verify, replace=replace, prune=prune)
    places = [beside] if beside is not None else []
    published, snapshot = publish_store(store, url, options, beside=places, note=message)
    what = f"{counted(snapshot.rows, 'row')} in {counted(len(snapshot.shards), 'shard')}"
    lines = [f"published {what} at {published.url}"]
    emit(
        {**asdict(published), "rows": snapshot.rows, "unsealed": snapshot.unsealed},
        lines + publish_lines(published, snapshot.unsealed),
        as_json=as_json,
    )


def publish_lines(published: Published, unsealed: int = 0) -> list[str]:
    """Return what a publication did, as lines of text."""
    lines = [
        f"  {published.uploaded:,} objects uploaded ({published.uploaded_bytes:,} bytes), each read back and "
        f"compared by SHA-256; {published.verified:,} were there and were read back",
        f"  {published.objects:,} objects, {published.size_bytes:,} bytes in all",
    ]
    if not published.is_new:
        lines.append("  the manifest there names the same objects, and stays")
    if unsealed:
        lines.append(
            f"  {unsealed:,} answers are not in a shard yet and were not published: `harvester seal`"
        )
    if published.deleted:
        lines.append(f"  {published.deleted:,} superseded objects deleted")
    elif published.superseded:
        lines.append(f"  {len(published.superseded):,} objects there are superseded; `--prune` deletes them")
    return lines


def fetch(
    url: str = PUBLICATION_URL,
    folder: Path = typer.Argument(..., metavar="FOLDER", help="Folder to create.", show_default=False),
    as_json: bool = JSON,
) -> None:
    """Download what was published at a URL into a new folder; every file is compared by SHA-256."""
    from harvester.publish.fetch import fetch as fetch_publication

    publication = fetch_publication(url, folder, message)
    rows = sum(shard.rows for shard in publication.shards)
    what = f"{publication.kind} {publication.name!r}"
    data = {
        "kind": publication.kind,
        "name": publication.name,
        "folder": str(folder),
        "objects": len(publication.objects),
        "size_bytes": publication.size_bytes,
        "rows": rows,
    }
    emit(
        data,
        [f"fetched the {what}: {len(publication.objects):,} objects, {rows:,} rows, into {folder}"],
        as_json=as_json,
    )


def push(
    store: Path = STORE,
    repository: str = typer.Argument(
        ..., metavar="OWNER/NAME", help="Data set repository on the Hub.", show_default=False
    ),
    to: PushShape = typer.Option(
        "prompt-completion", help="Format of the rows; shards: as stored, with raw answers and lineage."
    ),
    upload: bool = UPLOAD,
    public: bool = PUBLIC,
    token_env: str = TOKEN_ENV,
    beside: Path | None = TERMS_BESIDE,
    as_json: bool = JSON,
) -> None:
    """Upload a corpus to the Hugging Face Hub, after a check of the terms; without --upload list the files.

    Needs the extra `hub`. HF_ENDPOINT names another server.
    """
    from harvester.publish.hub import push_corpus
    from harvester.system.objects.hub import HubTarget

    target = HubTarget(repository, "dataset", private=not public, token_env=token_env)
    pushed = push_corpus(
        store, target, shape=to, upload=upload, beside=[beside] if beside is not None else []
    )
    emit(pushed.facts(), pushed.lines(), as_json=as_json)
