"""Make prompt lines, rows of other tools, and files that hold them."""

from __future__ import annotations

import gzip
import io
import json
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from . import mutate, texts

_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


def line(random: Random) -> tuple[bytes, bool]:
    """Return the bytes of one line, and whether it is valid as it stands."""
    question = texts.answer(random)
    row: dict[str, Any] = {"prompt": question}
    if random.random() < 0.6:
        content: Any = question
        if random.random() < 0.2:
            content = [
                {"type": "text", "text": question},
                {"type": "image_url", "image_url": {"url": "data:,"}},
            ]
        row = {"messages": [{"role": "user", "content": content}]}
        if random.random() < 0.3:
            row["messages"].insert(0, {"role": "system", "content": texts.decoy(random)})
    extras: dict[str, Any] = {
        "id": random.choice((1, "x", texts.decoy(random), None)),
        "reference": random.choice((texts.decoy(random), 7, {"a": [1]}, None)),
        "tags": random.choice((["a"], [], None)),
        "tools": random.choice(([_TOOL], [], None, ["hammer"], "x")),
        "response_format": random.choice(({"type": "json_object"}, None, "x")),
        "split": "train",
    }
    row |= {name: extras[name] for name in random.sample(list(extras), random.randint(0, 4))}
    way = random.random()
    if way < 0.4:
        return json.dumps(row, ensure_ascii=random.random() < 0.5).encode(), True
    row = mutate.mutate_tree(random, row)
    raw = json.dumps(row, ensure_ascii=random.random() < 0.5).encode("utf-8", "surrogatepass")
    if way > 0.75:
        raw = mutate.mutate_bytes(random, raw).replace(b"\n", b" ")
    return raw or b"{}", False


def foreign(random: Random) -> tuple[dict[str, Any], str, bool]:
    """Return a row of another tool, the Greek letters of what it asks, and whether it is valid."""
    q = [texts.answer(random) for _ in range(3)]
    a = texts.reasoning(random)
    d = texts.decoy(random)
    user, other = random.choice((("human", "gpt"), ("user", "assistant"), ("prompter", "bot")))
    role, value = random.choice((("from", "value"), ("role", "content")))
    turns = [
        {role: user, value: q[0]},
        {role: other, value: q[1]},
        {role: user, value: q[2]},
        {role: other, value: a},
    ]
    openai = [{"role": "user", "content": q[0]}, {"role": "assistant", "content": a}]
    rows: list[tuple[dict[str, Any], str]] = [
        ({"conversations": turns, "id": d}, q[0] + q[1] + q[2]),
        ({"conversations": [q[0], q[1], q[2], a]}, q[0] + q[1] + q[2]),
        ({"messages": openai, "prompt": q[0]}, q[0]),
        ({"instruction": q[0], "input": q[1], "output": a}, q[0] + q[1]),
        ({"instruction": q[1], "context": q[0], "response": a}, q[0] + q[1]),
        ({"prompt": q[0], "completion": a}, q[0]),
        ({"prompt": openai[:1], "completion": openai[1:]}, q[0]),
        ({"prompt": q[0], "chosen": a, "rejected": d}, q[0]),
        ({"chosen": openai, "rejected": [openai[0], {"role": "assistant", "content": d}]}, q[0]),
        ({"question": q[0], "answer": a, "meta": d}, q[0]),
        ({"Question": q[0], "choices": [q[1], q[2]], "answer": a}, q[0] + q[1] + q[2]),
        ({"system_prompt": q[0], "question": q[1], "response": a}, q[0] + q[1]),
        ({"custom_id": d, "body": {"model": d, "messages": openai[:1]}}, q[0]),
        (
            {"request": {"contents": [{"role": "user", "parts": [{"text": q[0]}, {"text": q[1]}]}]}},
            q[0] + q[1],
        ),
    ]
    row, asked = random.choice(rows)
    names = list(row)
    random.shuffle(names)
    row = {name: row[name] for name in names}
    if random.random() < 0.5:
        return row, texts.greek(asked), True
    return mutate.mutate_tree(random, row), texts.greek(asked), False


def container(random: Random, suffix: str, lines: list[bytes]) -> bytes:
    """Return a file of a kind that holds lines, or a table."""
    text = b"\n".join(lines)
    if suffix == ".jsonl.gz":
        return gzip.compress(text, 1)
    if suffix == ".jsonl.zst":
        return bytes(pa.compress(text, codec="zstd", asbytes=True))
    if suffix == ".json":
        return b"[" + b",\n".join(lines) + b"]"
    if suffix == ".csv":
        return b"prompt,id\n" + b"\n".join(b'"' + each.replace(b'"', b'""') + b'",1' for each in lines)
    if suffix in {".arrow", ".parquet"}:
        turn = {"role": "user", "content": texts.answer(random), "name": None}
        table = pa.table({"messages": [[turn]] * len(lines), "id": list(range(len(lines)))})
        sink = io.BytesIO()
        if suffix == ".parquet":
            pq.write_table(table, sink)
        else:
            new = random.choice((pa.ipc.new_file, pa.ipc.new_stream))
            with new(sink, table.schema) as writer:
                writer.write_table(table)
        return sink.getvalue()
    return text
