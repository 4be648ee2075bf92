"""Measure the parts that a run over many prompts is made of, and add them up for 100 million prompts.

    python benchmarks/large_run.py [--rows 5000] [--prompts 200000] [--million 100]

A real harvest of `--rows` answers gives bytes in the journal and in shards, and CPU seconds, per answer. The
answers are pieces of 750 characters of this project's texts, so that shards compress them as they do other
text; a server process of our own sends them. Checking `--prompts` prompts and three times as many, each in a
fresh process, gives memory and CPU seconds per prompt, alone and as one of eight ranks. An allocator with
8, 64 and 256 ranks gives what the coordinator of a fleet sends, and its CPU seconds per report; where Ray is
installed, an actor that returns what it gets shows Ray's part. The rest is arithmetic. CPU seconds hold for
this machine; bytes hold anywhere.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from load_side import MODELS
from one_pass import questions
from store_scale import most_memory_mib

TOML = """\
[teacher]
base_url = "{base_url}"
model = "mock-teacher"
terms = "mock-teacher"
[teacher.limits]
requests_per_minute = 6_000_000
max_concurrency = 128
[prompts]
files = ["p.jsonl"]
[sampling]
max_tokens = 64
[store]
shard_mib = {shard_mib}
"""
RATES = (100, 1_000, 10_000)
RANKS = (1, 8, 64)
PIECE = 750


class Echo:
    """An actor that returns what it gets."""

    def exchange(self, rank: int, incarnation: int, text: str) -> str:
        return text

    def cpu_s(self) -> float:
        return time.process_time()


def ray_call(calls: int = 2_000) -> float:
    """Return the CPU seconds that a call of an actor takes in its process, with a report's text."""
    import ray

    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    echo = ray.remote(Echo).remote()
    text = _report("https://teacher.example/v1", 1, 1.0, (0.5, 32, None))
    ray.get(echo.exchange.remote(1, 1, text))
    before = ray.get(echo.cpu_s.remote())
    for _ in range(calls):
        ray.get(echo.exchange.remote(1, 1, text))
    cpu: float = ray.get(echo.cpu_s.remote()) - before
    ray.shutdown()
    return cpu / calls


def write(folder: Path, prompts: int, base_url: str, shard_mib: int) -> Path:
    """Write prompts and configuration; return the path of harvest.toml."""
    with (folder / "p.jsonl").open("w", encoding="utf-8") as out:
        for prompt in itertools.islice(questions(), prompts):
            out.write(json.dumps({"messages": prompt.messages}) + "\n")
    path = folder / "harvest.toml"
    path.write_text(TOML.format(base_url=base_url, shard_mib=shard_mib), encoding="utf-8")
    return path


def size(*paths: Path) -> int:
    """Bytes on disk of files that exist."""
    total = 0
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            total += path.stat().st_size
    return total


def stored(base_url: str, rows: int) -> dict[str, float]:
    """Harvest; return bytes and CPU seconds per answer. Nothing is sealed before the last answer."""
    from harvester.run import job
    from harvester.run.prepare import prepare

    most = 0
    with tempfile.TemporaryDirectory(prefix="run-") as name:
        folder = Path(name)
        path, store = write(folder, rows, base_url, 1024), folder / "store"

        def watch(_: Mapping[str, Any]) -> None:
            nonlocal most
            most = max(most, size(store / "journal.db", store / "journal.db-wal"))

        prepared = prepare(path)
        begun = time.process_time()
        summary = asyncio.run(job.run(prepared, watch))
        cpu = time.process_time() - begun
        assert (summary.exit_code, summary.counts.answers_stored) == (0, rows), summary
        shards = size(*(store / "shards").iterdir())
        free = _free_pages(store / "journal.db")
        return {
            "journal_unsealed": most / rows,
            "journal_sealed": (size(store / "journal.db") - free) / rows,
            "shard": shards / rows,
            "cpu_s": cpu / rows,
            "memory_mib": most_memory_mib(),
        }


def _free_pages(journal: Path) -> int:
    """Bytes of a journal that are free for later rows: the bodies that were sealed."""
    import sqlite3

    with contextlib.closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as connection:
        (free,), (page,) = (
            connection.execute(f"PRAGMA {name}").fetchone() for name in ("freelist_count", "page_size")
        )
        return int(free * page)


def checked(prompts: int, shard: str | None) -> tuple[float, float]:
    """Check prompts as a run does before it sends; return peak MiB and CPU seconds."""
    from harvester.config.overrides import Overrides
    from harvester.run.prepare import prepare

    with tempfile.TemporaryDirectory(prefix="check-") as name:
        path = write(Path(name), prompts, "http://127.0.0.1:1/v1", 64)
        begun = time.process_time()
        prepare(path, Overrides(shard=shard, is_allocated=shard is not None))
        return most_memory_mib(), time.process_time() - begun


def dealt(ranks: int) -> dict[str, float]:
    """Let so many ranks report; return bytes and CPU seconds per report and answer."""
    from harvester.fleet.allocator import Allocator

    url = "https://teacher.example/v1"
    now = 0.0
    allocator = Allocator({url: 64 * ranks}, {"run": (10**12, None), "day": (10**11, 10**10)}, ranks, now)
    ends = {"run": None, "day": 86_400.0}
    for rank in range(ranks):
        allocator.register(rank, {}, ends, is_same_store=True, now=now)
    held: list[Any] = [(0.0, 0, None)] * ranks
    sent = count = 0
    cpu = 0.0
    for _ in range(4):
        now += 0.5
        for rank in range(ranks):
            text = _report(url, rank, now, held[rank])
            begun = time.thread_time()
            answer = allocator.exchange(rank, 1, json.loads(text), now)
            reply = json.dumps(answer)
            cpu += time.thread_time() - begun
            assert answer is not None
            held[rank] = (answer["shares"][url][0], answer["windows"][url], answer["budgets"])
            sent, count = sent + len(text) + len(reply), count + 1
    return {"bytes": sent / count, "cpu_s": cpu / count}


def _report(url: str, rank: int, now: float, held: Any) -> str:
    """A report as `run.allotment` makes it."""
    share, places, budgets = held
    none = {"run": [0, None], "day": [0, 0]}
    row = {
        "teacher": "",
        "id": f"{12345 + rank}-0a1b2c3d",
        "pid": 12345 + rank,
        "config": "",
        "at": now + 0.12345,
        "weight": 1,
        "demand": None,
        "share": share,
        "rate": 123.456789012345,
        "found": 123.45678901234,
        "learned_at": now - 10.123456789,
    }
    window = {"allocated": places, "in_flight": places, "size": places, "wants_more": True, "most": 512}
    spans = {
        span: {"spent": [0, 0], "ceiling": ceiling, "ends_at": 86_400.0 if span == "day" else None}
        for span, ceiling in (budgets or none).items()
    }
    return json.dumps(
        {
            "left": False,
            "rows": {url: row},
            "windows": {url: window},
            "budgets": spans,
            "reserved": [12_345, 678],
            "short": None,
            "run_id": "20261129T234501-0a1b2c",
        }
    )


def serve(ready: Any) -> None:
    """Answer chat completions with pieces of documents, until killed; put the port into `ready` first."""
    root = Path(__file__).resolve().parents[1]
    folders = ("docs", "data", "harvester", "trainer", "tests", "benchmarks")
    files = (path for folder in folders for path in sorted((root / folder).rglob("*.[mp][dy]")))
    text = " ".join(" ".join(path.read_text().split()) for path in files)
    places = iter(random.Random(7).sample(range(0, len(text) - PIECE, PIECE), k=len(text) // PIECE - 1))
    numbers = itertools.count()

    def body() -> bytes:
        at = next(places)  # no piece twice: zstd would find it
        message = {"role": "assistant", "content": text[at : at + PIECE]}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        usage = {"prompt_tokens": 40, "completion_tokens": 64, "total_tokens": 104}
        answer = {"id": f"chatcmpl-{next(numbers)}", "object": "chat.completion", "created": 1_790_000_000}
        return json.dumps({**answer, "model": "mock-teacher", "choices": [choice], "usage": usage}).encode()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
                length = next(
                    (line for line in head.splitlines() if line.startswith("content-length:")), ":0"
                )
                await reader.readexactly(int(length.split(":")[1]))
                content = MODELS.encode() if head.startswith("get") else body()
                kind = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(content)}"
                writer.write(kind.encode() + b"\r\n\r\n" + content)
        writer.close()

    async def listen() -> None:
        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        ready.put(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    asyncio.run(listen())


def text_of(count: float, unit: str = "B") -> str:
    """A number of bytes in the unit that suits it."""
    for prefix in ("", "K", "M", "G"):
        if count < 1000:
            return f"{count:,.3g} {prefix}{unit}"
        count /= 1000
    return f"{count:,.3g} T{unit}"


def span_of(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for name, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:,.3g} {name}"
    return f"{seconds:,.3g} s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=5_000)
    parser.add_argument("--prompts", type=int, default=200_000)
    parser.add_argument("--million", type=float, default=100, help="prompts of the run on paper, in millions")
    chosen = parser.parse_args()
    fresh = multiprocessing.get_context("spawn")
    with fresh.Pool(1, maxtasksperchild=1) as pool:
        ready = fresh.Queue()
        server = fresh.Process(target=serve, args=(ready,), daemon=True)
        server.start()
        answer = pool.apply(stored, (f"http://127.0.0.1:{ready.get()}/v1", chosen.rows))
        server.terminate()
        few, many = chosen.prompts, 3 * chosen.prompts
        checks = {}
        for shard in (None, "1/8"):
            (mib, cpu), (more_mib, more_cpu) = (pool.apply(checked, (n, shard)) for n in (few, many))
            per = many - few
            checks[shard] = ((more_mib - mib) * 2**20 / per, (more_cpu - cpu) / per)
        coordinator = {ranks: pool.apply(dealt, (ranks,)) for ranks in (8, 64, 256)}
    load_1, rows = os.getloadavg()[0], chosen.million * 1e6
    print(f"per answer, from {chosen.rows:,} (load {load_1:.0f})")
    print(f"  in the journal until it is sealed   {answer['journal_unsealed']:,.0f} bytes")
    print(f"  in the journal for ever             {answer['journal_sealed']:,.0f} bytes")
    print(f"  in a shard                          {answer['shard']:,.0f} bytes")
    print(f"  CPU of the run                      {answer['cpu_s'] * 1e6:,.0f} us")
    print(f"  most memory of that run             {answer['memory_mib']:,.0f} MiB")
    print("per prompt, before anything is sent")
    for shard, (memory, cpu) in checks.items():
        name = "alone" if shard is None else "rank 1/8"
        print(f"  {name:<9} {memory:,.1f} bytes of memory, {cpu * 1e6:,.1f} us CPU")
    print("per report to the coordinator and its answer")
    for ranks, figures in coordinator.items():
        cores = 2 * ranks * figures["cpu_s"]
        print(
            f"  {ranks:>3} ranks  {figures['bytes']:,.0f} bytes, {figures['cpu_s'] * 1e6:,.0f} us CPU: "
            f"{2 * ranks:,}/s, {text_of(2 * ranks * figures['bytes'])}/s, {cores:.2f} cores"
        )
    if find_spec("ray") is not None:
        print(f"  Ray's part of a call: {ray_call() * 1e6:,.0f} us CPU of the actor's process")
    print(f"{rows:,.0f} prompts")
    (alone_memory, check_cpu), (_, rank_cpu) = checks[None], checks["1/8"]
    for ranks in RANKS:
        own = rows / ranks
        disk = own * (answer["journal_sealed"] + answer["shard"])
        cpu = check_cpu if ranks == 1 else rank_cpu
        print(
            f"  {ranks:>2} ranks, each: {text_of(alone_memory * own)} of memory for the check of ids, "
            f"{text_of(disk)} on disk ({text_of(own * answer['journal_sealed'])} journal), "
            f"{span_of(2 * rows * cpu)} CPU to read all prompts twice, "
            f"{span_of(own * answer['cpu_s'])} CPU for its answers"
        )
    for rate in RATES:
        needs = rate * answer["cpu_s"]
        print(f"  at {rate:,} answers/s: {span_of(rows / rate)}, {needs:,.2f} cores for the ranks together")


if __name__ == "__main__":
    main()
