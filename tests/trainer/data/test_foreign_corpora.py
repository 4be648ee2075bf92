"""Train on corpora that another program may have written: the same values, or a refusal by column."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from harvester.errors import StoreFormatError
from tests.trainer import tiny
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from trainer import config as settings
from trainer.data import dataset
from trainer.training.train import train


def written(folder: Path, change: Callable[[pa.Table], pa.Table]) -> Path:
    """train.toml of a corpus whose only file was changed; its lineage stays."""
    toml = tiny.train_toml(folder, tiny.skill(8, held_out=2))
    (shard,) = (folder / "store" / "shards").glob("*.parquet")
    table = pq.read_table(shard)
    pq.write_table(change(table).replace_schema_metadata(table.schema.metadata), shard)
    return toml


def texts_as(kind: Callable[[pa.ChunkedArray], Any]) -> Callable[[pa.Table], pa.Table]:
    """Every column of text in another type of text."""

    def change(table: pa.Table) -> pa.Table:
        return pa.table(
            {
                field.name: kind(column) if field.type == pa.string() else column
                for field, column in zip(table.schema, table.columns, strict=True)
            }
        )

    return change


def column(name: str, values: Callable[[list[Any]], list[Any]], kind: Any = None) -> Any:
    """One column with other values."""

    def change(table: pa.Table) -> pa.Table:
        made = pa.array(values(table.column(name).to_pylist()), kind)
        return table.set_column(table.column_names.index(name), name, made)

    return change


def as_they_are(values: list[Any]) -> list[Any]:
    return values


def each(value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [value] * len(values)


TAKEN = {
    "large text": texts_as(lambda text: text.cast(pa.large_string())),
    "views of text": texts_as(lambda text: text.cast(pa.string_view())),
    "dictionaries": texts_as(lambda text: text.dictionary_encode()),
    "wider numbers": column("sample_index", as_they_are, pa.int64()),
    "a column of no type": column("reasoning", each(None)),
    "lists of no type": column("tags", each([])),
    "milliseconds": column("created_at", as_they_are, pa.timestamp("ms", tz="UTC")),
    "a further column": lambda table: table.append_column("score", pa.array([0.5] * len(table))),
}


@pytest.mark.parametrize("stored", [False, True])
def test_what_reads_as_the_same_values_trains_to_the_same_bits(tmp_path, monkeypatch, stored):
    if stored:
        monkeypatch.setattr(dataset, "STORED_ROWS", 1)
    weights = {}
    for name, change in {"as harvested": lambda table: table, **TAKEN}.items():
        config = settings.load(written(tmp_path / name, change))
        adapter = Path(train(config).adapter)
        weights[name] = (adapter / "adapter_model.safetensors").read_bytes()
    assert {name for name, each in weights.items() if each != weights["as harvested"]} == set()


REFUSED = [
    (column("key", lambda keys: [f"row-{n}" for n in range(len(keys))]), "64 lower-case hex digits"),
    (column("key", lambda keys: [key[:16] for key in keys]), "64 lower-case hex digits"),
    (column("key", lambda keys: [key.upper().replace("0", "A") for key in keys]), "64 lower-case hex digits"),
    (column("key", lambda keys: list(range(len(keys)))), "column key holds int64, not string"),
    (column("key", lambda keys: list(map(bytes.fromhex, keys))), "column key holds binary, not string"),
    (column("prompt_id", lambda ids: list(range(len(ids)))), "column prompt_id holds int64, not string"),
    (column("completion", each(b"text")), "column completion holds binary, not string"),
    (column("sample_index", each("0")), "column sample_index holds string, not int32"),
    (column("sample_index", each(1 << 40)), "column sample_index holds numbers that are no int32"),
    (column("messages", lambda rows: list(map(json.dumps, rows))), "column messages holds string, not list"),
    (column("messages", each([{"from": "human", "value": "hi"}])), "column messages holds list"),
    (column("messages", each([{"role": "user", "content": 5}])), "column messages holds list"),
    (
        column("messages", each([{"role": None, "content": "hi"}, {"role": "user", "content": "hi"}])),
        "holds a message without a role",
    ),
    (column("messages", each([None, {"role": "user", "content": "hi"}])), "holds a message without a role"),
    (column("tags", each("a,b")), "column tags holds string, not list"),
    (column("metadata_json", each("{'task': 'x'}")), "metadata_json holds a text that is no JSON object"),
    (column("metadata_json", each("null")), "metadata_json holds a text that is no JSON object"),
    (column("metadata_json", each("[" * 100_000)), "metadata_json holds a text that is no JSON object"),
    (column("mock", each(1)), "column mock holds int64, not bool"),
    (column("created_at", each("2026-01-01")), "column created_at holds string, not timestamp"),
]


@pytest.mark.parametrize(("change", "words"), REFUSED)
def test_what_would_be_read_otherwise_is_refused_by_the_name_of_its_column(
    tmp_path,
    run_trainer,  # noqa: F811
    change,
    words,
):
    toml = written(tmp_path, change)
    for verb in ("doctor", "train"):
        code, _, err = run_trainer(verb, toml)
        assert code == StoreFormatError.exit_code
        assert words in err
        assert "data/FORMAT.md" in err
    assert not (tmp_path / "out" / "train.jsonl").exists()


def test_metadata_that_only_pythons_json_reads_is_taken(tmp_path, run_trainer):  # noqa: F811
    change = column("metadata_json", each('{"share": NaN, "odd": "\\ud800"}'))
    code, _, err = run_trainer("doctor", written(tmp_path, change))
    assert code == 0, err


def test_reasons_that_hold_for_no_row_are_not_counted(tmp_path, run_trainer):  # noqa: F811
    code, _, err = run_trainer("doctor", written(tmp_path, column("completion", each(None))))
    assert code == 2
    assert "no row can be learned: 8 empty" in err
