"""Write a store of one or ten million rows, as a harvest would have left it, in about a minute.

    python benchmarks/store_maker.py FOLDER [--rows 1000000]

FOLDER gets `prompts.jsonl`, `harvest.toml` and `store/`: sealed shards, manifest and key index, as in
`data/FORMAT.md`; `harvester verify FOLDER/store` finds nothing. Rows are written column by column and keys
in one sorted pass, which is faster than a harvest could be.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa

from harvester.api.request_key import RequestKeys
from harvester.api.types import Prompt
from harvester.config.config import HarvestConfig, load
from harvester.store import paths
from harvester.store.journal.checksums import checksum, set_meta, write_checksum
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import RunRecord, ShardEntry, asker_digest
from harvester.store.shards.manifest import insert_entry
from harvester.store.shards.parquet_file import lineage_digest, open_writer
from harvester.store.shards.schema import SCHEMA
from harvester.system.files import sha256_of

ROWS_PER_SHARD = 50_000
ROWS_PER_GROUP = 2_048
MOST_TOKENS = 64
AT_US = 1_790_000_000_000_000
CONFIG = f"""[teacher]
base_url = "http://127.0.0.1:8000/v1"
model = "mock-teacher"
terms = "mock-teacher"
[sampling]
max_tokens = {MOST_TOKENS}
[prompts]
files = ["prompts.jsonl"]
[store]
path = "store"
"""


def text_of(number: int) -> str:
    """The prompt of one row."""
    return f"What is {number} + {7 * number}? Say how you add the numbers, digit by digit, then the sum."


def keys_of(config: HarvestConfig, numbers: range) -> list[bytes]:
    """Their cache keys, as `plan` would make them."""
    maker = RequestKeys(config.teacher.base_url, {"model": config.teacher.model, "max_tokens": MOST_TOKENS})
    return [maker.key([{"role": "user", "content": text_of(n)}], 0) for n in numbers]


def make(folder: Path, rows: int) -> HarvestConfig:
    """Write the whole folder; returns its configuration."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "harvest.toml").write_text(CONFIG)
    config = load(folder / "harvest.toml")
    with (folder / "prompts.jsonl").open("wb") as out:
        for n in range(rows):
            out.write(orjson.dumps({"id": f"p{n}", "prompt": text_of(n)}) + b"\n")
    store = folder / "store"
    run = RunRecord(
        "scale",
        AT_US / 1e6,
        config.teacher.teacher_id,
        host="127.0.0.1:8000",
        model=config.teacher.model,
        terms_id="mock-teacher",
        mock=True,
        config_sha256=config.sha256,
        config_json=config.model_dump_json(),
    )
    index = np.empty(rows, dtype=[("key", "S32"), ("shard", "u4"), ("asker", "S8")])
    with contextlib.closing(Journal.open(store)) as journal:
        journal.begin_run(run)
        (store / paths.SHARDS).mkdir(mode=0o700, exist_ok=True)
        for shard, begin in enumerate(range(0, rows, ROWS_PER_SHARD), start=1):
            numbers = range(begin, min(begin + ROWS_PER_SHARD, rows))
            keys = keys_of(config, numbers)
            entry = write_shard(store, shard, numbers, keys, run)
            with journal.writing() as connection:
                insert_entry(connection, entry)
                set_meta(connection, "last_shard", shard)
            part = index[begin : begin + len(numbers)]
            part["key"] = np.frombuffer(b"".join(keys), dtype="S32")
            part["shard"] = shard
            askers = b"".join(asker_digest(Prompt(f"p{n}", ()), 0) for n in numbers)
            part["asker"] = np.frombuffer(askers, dtype="S8")
        write_index(journal, index)
        journal.end_run(run.run_id, "complete", 0, AT_US / 1e6 + 60)
    return config


def write_index(journal: Journal, index: np.ndarray) -> None:
    """The key index in order of the keys: a B-tree is filled fastest from one side."""
    index.sort(order="key")

    def entries() -> Iterator[tuple[Any, ...]]:
        for key, shard, asker in index:
            # numpy drops the zeros that end a string of bytes
            key, asker, shard = key.ljust(32, b"\0"), asker.ljust(8, b"\0"), int(shard)
            yield key, shard, 0, MOST_TOKENS, asker, checksum([shard, 0, MOST_TOKENS], key, asker)

    with journal.writing() as connection:
        connection.executemany("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?)", entries())
        connection.execute("INSERT INTO counters VALUES (1, 'answers', ?)", (len(index),))
        write_checksum(connection, "counters:1")


def write_shard(store: Path, shard: int, numbers: range, keys: list[bytes], run: RunRecord) -> ShardEntry:
    """One sealed file."""
    hidden = store / paths.SHARDS / f".part-{shard:08d}.tmp"
    table = table_of(numbers, keys, run)
    with hidden.open("xb") as sink, open_writer(sink, [run.lineage()]) as writer:
        writer.write_table(table.cast(writer.schema), row_group_size=ROWS_PER_GROUP)
    digest, size = sha256_of(hidden), hidden.stat().st_size
    name = f"part-{shard:08d}-{digest[:16]}.parquet"
    hidden.rename(hidden.with_name(name))
    return ShardEntry(
        shard, name, digest, len(keys), size, lineage_digest(run.lineage()), AT_US / 1e6 + shard
    )


def table_of(numbers: range, keys: list[bytes], run: RunRecord) -> pa.Table:
    """So many rows of the contract, made column by column."""
    count = len(numbers)
    texts = [text_of(n) for n in numbers]
    answers = [f"{n} + {7 * n}: digit by digit, with what is carried over, that is {8 * n}." for n in numbers]
    messages = [{"role": "user", "content": text} for text in texts]
    columns: dict[str, Any] = {
        "key": [key.hex() for key in keys],
        "prompt_id": [f"p{n}" for n in numbers],
        "messages": pa.ListArray.from_arrays(
            pa.array(range(count + 1), pa.int32()),
            pa.array(messages, SCHEMA.field("messages").type.value_type),
        ),
        "completion": answers,
        "request_json": [
            orjson.dumps({"messages": [message], "model": run.model, "max_tokens": MOST_TOKENS}).decode()
            for message in messages
        ],
        "raw": [
            orjson.dumps(
                {
                    "id": f"chatcmpl-{n}",
                    "object": "chat.completion",
                    "model": run.model,
                    "choices": [
                        {
                            "index": 0,
                            "message": {"role": "assistant", "content": answer},
                            "finish_reason": "stop",
                        }
                    ],
                    "usage": {"prompt_tokens": 30, "completion_tokens": 25, "total_tokens": 55},
                }
            )
            for n, answer in zip(numbers, answers, strict=True)
        ],
        "source_line": [n + 1 for n in numbers],
        "created_at": pa.array([AT_US + 1000 * n for n in numbers], pa.timestamp("us", tz="UTC")),
    }
    same = {
        "sample_index": 0,
        "outcome": "ok",
        "finish_reason": "stop",
        "metadata_json": "{}",
        "source_file": "prompts.jsonl",
        "teacher_id": run.teacher_id,
        "endpoint": "http://127.0.0.1:8000/v1",
        "request_model": run.model,
        "response_model": run.model,
        "system_fingerprint": "",
        "response_id": "",
        "provider": "",
        "terms_id": run.terms_id,
        "permission_sha256": "",
        "purpose": run.purpose,
        "mock": True,
        "input_tokens": 30,
        "output_tokens": 25,
        "cached_tokens": 0,
        "reasoning_tokens": 0,
        "usage_source": "reported",
        "cost_microusd": 20,
        "attempts": 1,
        "latency_s": 0.2,
        "run_id": run.run_id,
        "config_sha256": run.config_sha256,
        "tool_version": run.tool_version,
    }
    arrays = []
    for field in SCHEMA:
        if field.name in columns:
            made = columns[field.name]
            arrays.append(made if isinstance(made, pa.Array) else pa.array(made, field.type))
        elif field.name in same:
            arrays.append(pa.repeat(pa.scalar(same[field.name], field.type), count))
        elif field.name == "tags":
            arrays.append(pa.array([[]] * count, field.type))
        else:
            arrays.append(pa.nulls(count, field.type))
    return pa.Table.from_arrays(arrays, schema=SCHEMA)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    wanted = parser.parse_args()
    begun = time.perf_counter()
    make(wanted.folder, wanted.rows)
    print(f"{wanted.rows:,} rows in {time.perf_counter() - begun:.0f} s: {wanted.folder}/store")
