"""What commands say and paint: JSON lines on stdout for machines, talk on stderr for people."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from harvester.inert import one_line

PLAIN_EVERY_S = 30.0


def emit(data: Mapping[str, Any], lines: Sequence[str], *, as_json: bool) -> None:
    """Print a command's result: one JSON line, or lines of text. A reader that left changes no exit code."""
    said = [json.dumps(data, ensure_ascii=False, default=str)] if as_json else map(one_line, lines)
    try:
        for line in said:
            print(line)  # noqa: T201
        print(end="", flush=True)  # noqa: T201
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def talk(line: str) -> None:
    """A line for people, on stderr. A closed stderr never ends a run."""
    try:
        print(one_line(line), file=sys.stderr, flush=True)  # noqa: T201
    except OSError:
        sys.stderr = open(  # noqa: SIM115, PTH123 - must outlive this call
            "/dev/null", "w", encoding="utf-8"
        )


@contextmanager
def painted(total: int, title: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """A progress display fed with snapshots: bars on a terminal, else one plain line every 30 s."""
    if sys.stderr.isatty():
        with _bars(total, title) as update:
            yield update
        return
    last = time.monotonic()
    latest: Mapping[str, Any] = {}

    def plain(snapshot: Mapping[str, Any]) -> None:
        nonlocal last, latest
        latest = snapshot
        if time.monotonic() - last >= PLAIN_EVERY_S:
            last = time.monotonic()
            talk(f"{title}: {_words(snapshot, total)}")

    try:
        yield plain
    finally:
        if latest:
            talk(f"{title}: {_words(latest, total)}")


def _words(snapshot: Mapping[str, Any], total: int) -> str:
    done = snapshot.get("from_cache", 0) + snapshot.get("answers_stored", 0) + snapshot.get("dead", 0)
    said = (
        f"{done:,}/{total:,} rows, {snapshot.get('from_cache', 0):,} from cache, "
        f"{snapshot.get('dead', 0):,} failed, ${snapshot.get('cost_microusd', 0) / 1e6:.4f}"
    )
    return f"{said}, waiting for {snapshot['waiting']}" if snapshot.get("waiting") else said


@contextmanager
def _bars(total: int, title: str) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=Console(stderr=True, markup=False)) as progress:
        bar = progress.add_task(title, total=total, said="")

        def update(snapshot: Mapping[str, Any]) -> None:
            done = snapshot.get("from_cache", 0) + snapshot.get("answers_stored", 0) + snapshot.get("dead", 0)
            said = f"${snapshot.get('cost_microusd', 0) / 1e6:.4f}"
            if snapshot.get("dead"):
                said += f", {snapshot['dead']:,} failed"
            if snapshot.get("waiting"):
                said += f", waiting for {snapshot['waiting']}"
            progress.update(bar, completed=done, said=one_line(said))

        yield update
