"""Check the hash tree: its root, the trace from a row to its origin, and that any changed byte is found."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.errors import StoreFormatError
from harvester.publish.store import publish_store
from harvester.store.reader import Corpus
from harvester.store.shards.schema import LINEAGE_KEY, SCHEMA, Sample, to_table
from harvester.terms.lineage import Lineage
from tests.commands import run
from tests.harvester.publish.published_store import make_store
from tests.peak_memory import most_held
from tests.trainer import tiny
from trainer import config as settings
from trainer.data import dataset
from trainer.errors import ConfigError, FindingsError
from trainer.provenance import fingerprint
from trainer.training.train import train

LINEAGE = {"run_id": "run-1", "teacher_id": "t", "terms_id": "mock-teacher", "host": "127.0.0.1:1"}


def merkle_root(digests) -> bytes:
    tree = fingerprint.MerkleTree()
    for digest in digests:
        tree.add(digest)
    return tree.root


def sample(number: int, completion: str | None = None) -> Sample:
    return Sample(
        key=hashlib.sha256(str(number).encode()).hexdigest(),
        prompt_id=f"p{number}",
        run_id="run-1",
        messages=[{"role": "user", "content": f"{number}?"}],
        completion=completion or f"answer {number}",
        outcome="ok",
        finish_reason="stop",
        request_json=f'{{"n":{number}}}',
        terms_id="mock-teacher",
    )


def corpus(folder: Path, rows: list[Sample]) -> Path:
    folder.mkdir(parents=True)
    metadata = {**SCHEMA.metadata, LINEAGE_KEY: json.dumps([LINEAGE]).encode()}
    pq.write_table(to_table(rows).replace_schema_metadata(metadata), folder / "part-000001-aa.parquet")
    return folder


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(b"weights")
    (folder / "NOTICE").write_text("Built with care\n")
    (folder / "README.md").write_text("a card\n")
    leaves = fingerprint.write_rows(folder, [fingerprint.leaf_of(sample(n)) for n in range(13)])
    fingerprint.write_tree(folder, leaves, [Lineage(LINEAGE)])
    return folder


def test_the_root_follows_rfc_6962():
    # RFC 6962 section 2.1.3 shape: seven leaves split four and three, three split two and one.
    leaves = [hashlib.sha256(bytes([n])).digest() for n in range(7)]

    def node(left: bytes, right: bytes) -> bytes:
        return hashlib.sha256(b"\x01" + left + right).digest()

    four = node(node(leaves[0], leaves[1]), node(leaves[2], leaves[3]))
    three = node(node(leaves[4], leaves[5]), leaves[6])
    assert merkle_root(leaves) == node(four, three)
    assert merkle_root([]) == hashlib.sha256(b"").digest()


@given(st.sets(st.integers(0, 10**6), min_size=2, max_size=40), st.data())
def test_every_row_counts(numbers: set[int], data: st.DataObject):
    digests = [fingerprint.leaf_of(sample(n)).digest for n in sorted(numbers)]
    at = data.draw(st.integers(0, len(digests) - 1))
    flipped = bytes([digests[at][0] ^ 1]) + digests[at][1:]
    assert merkle_root(digests) != merkle_root([*digests[:at], flipped, *digests[at + 1 :]])
    assert merkle_root(digests) != merkle_root(digests[:at] + digests[at + 1 :])


def test_a_row_is_traced_to_request_teacher_and_terms(adapter: Path, tmp_path: Path):
    store = corpus(tmp_path / "c", [sample(n) for n in range(13)])
    assert fingerprint.verify(adapter, store) == []
    origin = fingerprint.trace(adapter, "p7", store)
    assert (origin["request_json"], origin["terms_id"]) == ('{"n":7}', "mock-teacher")
    assert origin["lineage"]["teacher_id"] == "t"
    assert fingerprint.trace(adapter, sample(7).key[:12], store) == origin


def test_a_row_is_traced_in_a_published_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    store, folder, url = (
        make_store(tmp_path / "run" / "store", range(3)),
        tmp_path / "a",
        f"file://{tmp_path}/r",
    )
    folder.mkdir()
    rows = list(Corpus.open(store).samples())
    leaves = fingerprint.write_rows(folder, [fingerprint.leaf_of(row) for row in rows])
    fingerprint.write_tree(folder, leaves, Corpus.open(store).lineages())
    publish_store(store, url)
    for row in ([rows[0].prompt_id], []):
        done = run("trainer", ["trace", folder, *row, "--corpus", url, "--json"])
        assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["findings"] == []


def test_a_flipped_byte_a_lost_row_and_another_adapter_are_named(adapter: Path, tmp_path: Path):
    other = corpus(tmp_path / "c", [sample(n) for n in range(12) if n != 3] + [sample(3, "Answer 3")])
    changed, missing = fingerprint.verify(adapter, other)
    assert changed.startswith("row p3: the completion differs")
    assert missing == "row p12 is not in the corpus"
    with pytest.raises(FindingsError, match="completion differs"):
        fingerprint.trace(adapter, "p3", other)
    with pytest.raises(FindingsError, match="no longer holds"):
        fingerprint.trace(adapter, "p12", other)


@pytest.mark.parametrize("column", fingerprint.ORIGIN_COLUMNS)
def test_an_edited_origin_is_named(adapter: Path, tmp_path: Path, column: str):
    changes: dict[str, object] = {"mock": True, "created_at": datetime(2026, 1, 2, tzinfo=UTC)}
    edited = replace(sample(5), **{column: changes.get(column, "other")})  # type: ignore[arg-type]
    store = corpus(tmp_path / "c", [sample(n) for n in range(13) if n != 5] + [edited])
    [finding] = fingerprint.verify(adapter, store)
    assert finding.startswith("row p5: request, teacher or terms differ")
    with pytest.raises(FindingsError, match="request, teacher or terms differ"):
        fingerprint.trace(adapter, "p5", store)


@pytest.mark.parametrize("step", [7, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name", [fingerprint.TREE_FILE, fingerprint.ROWS_FILE, "adapter_model.safetensors", "NOTICE"]
)
def test_any_flipped_byte_of_any_file_breaks_the_trace(adapter: Path, name: str, step: int):
    leaves = fingerprint.write_rows(adapter, [fingerprint.leaf_of(sample(n)) for n in range(2)])
    fingerprint.write_tree(adapter, leaves, [Lineage(LINEAGE)])
    content = (adapter / name).read_bytes()
    for at in range(0, len(content), step):
        for bit in (0x01, 0x20) if name in (fingerprint.TREE_FILE, fingerprint.ROWS_FILE) else (0x01,):
            (adapter / name).write_bytes(content[:at] + bytes([content[at] ^ bit]) + content[at + 1 :])
            with pytest.raises((FindingsError, ConfigError)):
                fingerprint.require_intact(adapter)
    (adapter / name).write_bytes(content)
    fingerprint.require_intact(adapter)


def test_added_and_removed_files_and_an_edited_card(adapter: Path):
    (adapter / "README.md").write_text("a better card\n")
    assert fingerprint.verify(adapter) == []
    (adapter / "extra.bin").write_bytes(b"x")
    (adapter / "NOTICE").unlink()
    added, removed = fingerprint.verify(adapter)
    assert added.startswith("extra.bin was added")
    assert removed.startswith("NOTICE was changed or removed")


def tree_over(folder: Path, rows: list[Sample]) -> Path:
    folder.mkdir(parents=True)
    leaves = fingerprint.write_rows(folder, [fingerprint.leaf_of(row) for row in rows])
    fingerprint.write_tree(folder, leaves, [Lineage(LINEAGE)])
    return folder


def test_no_leaves_are_held(tmp_path: Path):
    store = corpus(tmp_path / "c", [sample(n) for n in range(5)])

    def held(rows: int) -> int:
        folder = tree_over(tmp_path / str(rows), [sample(n) for n in range(rows)])
        assert len(fingerprint.verify(folder, store)) == rows - 5  # and things are made once
        return most_held(lambda: (fingerprint.trace(folder, "p3", store), fingerprint.verify(folder, store)))

    # A leaf and its line have over a thousand bytes, a finding has nearly a hundred.
    assert held(1_000) - held(200) < 800 * 400


def test_leaves_whose_keys_begin_alike_are_told_apart(tmp_path: Path):
    first = sample(0)
    rows = [
        first,
        replace(sample(1), key=first.key[:32] + sample(1).key[32:]),
        replace(sample(2), key=first.key),
        replace(sample(0, "another sample"), sample_index=1),
        sample(3),
    ]
    adapter = tree_over(tmp_path / "adapter", rows[::-1])
    assert fingerprint.verify(adapter, corpus(tmp_path / "c", rows)) == []
    assert fingerprint.verify(adapter, corpus(tmp_path / "d", rows[:-1])) == ["row p3 is not in the corpus"]


@pytest.mark.parametrize("key", ["row-1", "", "abc"])
def test_a_corpus_whose_keys_are_no_hashes_is_refused_by_the_column(tmp_path: Path, key: str):
    adapter = tree_over(tmp_path / "adapter", [sample(0), sample(1)])
    store = corpus(tmp_path / "c", [replace(sample(0), key=key), sample(1)])
    with pytest.raises(StoreFormatError, match="column key"):
        fingerprint.verify(adapter, store)


def test_an_adapter_without_lineage_and_an_unknown_row_are_errors(adapter: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="no learned row"):
        fingerprint.trace(adapter, "nope", tmp_path)
    (adapter / fingerprint.TREE_FILE).unlink()
    with pytest.raises(ConfigError, match="no hash tree"):
        fingerprint.verify(adapter)


@pytest.mark.parametrize("stored", [False, True])
def test_documents_name_the_rows_that_were_learned_and_no_longer_ones(tmp_path, monkeypatch, stored):
    if stored:
        monkeypatch.setattr(dataset, "STORED_ROWS", 1)
    rows = tiny.skill(12)
    long = [replace(row, completion="x" * 300) for row in rows[:3]]
    toml = tiny.train_toml(
        tmp_path,
        [*long, *rows[3:]],
        data={"eval_share": 0.0},
        train={"epochs": 1, "pack_tokens": 128, "max_steps": 1},
    )
    done = train(settings.load(toml))
    assert (done.examples, done.excluded["too long"]) == (9, 3)
    adapter = Path(done.adapter)
    leaves = [json.loads(line) for line in (adapter / fingerprint.ROWS_FILE).read_text().splitlines()]
    assert sorted(leaf["prompt_id"] for leaf in leaves) == sorted(row.prompt_id for row in rows[3:])
    [teacher] = json.loads((adapter / "lineage.json").read_text())["teachers"]
    assert (teacher["teacher"], teacher["rows"]) == (rows[3].teacher_id, 9)
    assert "| answers learned | 9;" in (adapter / "README.md").read_text()
    assert fingerprint.verify(adapter, settings.load(toml).corpus) == []
