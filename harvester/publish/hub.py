"""Push a store or corpus to the Hugging Face Hub, after a check of its terms."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from harvester.errors import ConfigError
from harvester.export.export import export
from harvester.export.formats import SHAPES, Shape
from harvester.publish.store import documents_without_report, take_snapshot
from harvester.publish.terms import require_publishable
from harvester.store.reader import Corpus
from harvester.store.shards.swap import hold_for_reading, locate
from harvester.system.objects.folder import files_below
from harvester.system.objects.hub import HubTarget, Pushed, push_files
from harvester.terms.lineage import FACT_COLUMNS

# What is pushed as it lies in the store, with the raw answers and the whole lineage.
AS_SHARDS = "shards"


def push_corpus(
    store: Path,
    target: HubTarget,
    *,
    shape: Shape | str = "prompt-completion",
    upload: bool,
    beside: Sequence[Path] = (),
) -> Pushed:
    """Push the answers of a store or corpus with their card, NOTICE and terms.

    Args:
        shape: format of the rows, as `harvester export --to`, or "shards".
        upload: False only says what would be sent.
        beside: folders with own terms records, besides those found from the store.

    Raises:
        TermsRefused: exit 77; the terms do not permit that others train on these rows. Nothing was sent.
        ConfigError: no such shape, or no row to push. UsageError, RemoteStoreError, FindingsError: see
            `push_files`.
    """
    if shape not in {AS_SHARDS, *SHAPES}:
        known = ", ".join([AS_SHARDS, *SHAPES])
        raise ConfigError(f"unknown format {shape!r}", remedy=f"one of {known}")
    corpus = Corpus.open(store)
    places = (store.resolve().parent, *beside)
    with hold_for_reading(corpus.folder), tempfile.TemporaryDirectory(prefix="harvester-push-") as name:
        folder = Path(name) / "out"
        require_publishable(corpus.lineages(), corpus.distinct(FACT_COLUMNS), *places, use="export")
        if shape == AS_SHARDS:
            files = _shards(store, corpus, folder, places)
        else:
            export(store, folder, shape=shape, beside=beside[0] if beside else None)  # type: ignore[arg-type]
            files = files_below(folder)
        return push_files(target, files, upload=upload, message="Push a corpus with its terms")


def _shards(store: Path, corpus: Corpus, folder: Path, places: Sequence[Path]) -> dict[str, Path]:
    snapshot = take_snapshot(store, corpus)
    if not snapshot.shards:
        raise ConfigError("no answer is in a shard", place=str(store), remedy="`harvester seal` it first")
    files = {
        f"data/{Path(each.path).name}": locate(snapshot.folder, Path(each.path).name)
        for each in snapshot.shards
    }
    folder.mkdir()
    for document in documents_without_report(store, snapshot, places):
        name = Path(document.object.path).name
        (folder / name).write_bytes(document.content)
        files[name] = folder / name
    return files
