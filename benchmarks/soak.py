"""Run a scaled day of a harvest with faults and kills; check memory, speed and exactness.

    python benchmarks/soak.py [--seconds 720]

The mock teacher and the harvester are processes of their own. The day has 24 hours of seconds/24 each.
Until eight the harvester is killed, frozen and asked to end, and started again; from then on one process
runs through faults, bursts of 429s, an absent teacher, changing limits, pauses and other windows. Shards are
small, so that a scaled day seals and merges as often as a real one. Memory, open files, tasks and event-loop
lag are read from the harvester's trace, the billing from the teacher's ledger. Exit 1 if a bound is exceeded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harvester.mock_teacher.running import RunningMock, start_process
from harvester.observe.timeline import read_timeline
from harvester.store.journal.journal import Journal
from harvester.store.shards.manifest import read_manifest

WINDOW = 64
MOST_PER_S = 800
"""More answers a second than the window and the teacher's latency allow."""
MOST_POINTS = 400
"""Of a trace, to make pairs of."""
SETTLED = 1 / 2
"""Share of the long life that memory may take to reach its level."""

CONFIG = """\
[teacher]
base_url = "{base_url}"
model = "mock-teacher"
terms = "mock-teacher"
[teacher.limits]
max_concurrency = {window}
[teacher.price]
input = 0.15
output = 0.60
[prompts]
files = ["p.jsonl"]
[sampling]
max_tokens = 64
[store]
shard_mib = 0.5
[run]
deadline_s = 5
max_attempts = 8
max_failed = 1000000
[canary]
prompts = "canary/c.jsonl"
every_s = 20
"""

WEATHER: dict[str, list[dict[str, Any]]] = {
    "quiet": [],
    "errors": [{"action": "status", "status": 503, "probability": 0.1, "seed": 1}],
    "storm of 429s": [{"action": "status", "status": 429, "retry_after": 1, "probability": 0.5, "seed": 2}],
    "429s without a time": [{"action": "status", "status": 429, "probability": 0.2, "seed": 3}],
    "broken answers": [
        {"action": "junk_json", "probability": 0.05, "seed": 4},
        {"action": "empty_body", "probability": 0.05, "seed": 5},
    ],
    "slow": [{"action": "delay", "delay_s": 1.5, "probability": 0.2, "seed": 6}],
    "away": [{"action": "status", "status": 503}],
    "odd endings": [
        {"action": "content_filter", "probability": 0.1, "seed": 7},
        {"action": "length", "probability": 0.1, "seed": 8},
        {"action": "refusal", "value": "no", "probability": 0.05, "seed": 9},
    ],
}

STORMS = frozenset({"storm of 429s", "429s without a time", "away"})


@dataclass
class Day:
    """One soak: the folder, the teacher, the harvester under way, what was done to it."""

    folder: Path
    mock: RunningMock
    hour_s: float
    lives: int = 0
    kills: int = 0
    said: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None

    @property
    def store(self) -> Path:
        """The store's folder."""
        return self.folder / "store"

    def say(self, line: str) -> None:
        """Print as it happens."""
        print(line, flush=True)

    def start(self) -> None:
        """A new life of the harvester."""
        command = [sys.executable, "-m", "harvester", "run", str(self.folder / "harvest.toml"), "--json"]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        self.lives += 1
        until(self._works, 60)

    def _works(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise SystemExit(f"the harvester ended by itself, see {self.folder / 'log'}")
        points = read_timeline(self.store)
        return bool(points) and points[-1]["stored"] > 0 and self._status().get("pid") == self.process.pid

    def _status(self) -> dict[str, Any]:
        try:
            result: dict[str, Any] = json.loads((self.store / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return result

    def end(self, number: signal.Signals) -> int:
        """End this life by a signal; returns how it ended."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(timeout=60)

    def steer(self, *words: str) -> None:
        """A command of the operator."""
        verb, *rest = words
        command = [sys.executable, "-m", "harvester", verb, str(self.store), *rest]
        subprocess.run(command, check=True, capture_output=True, timeout=60)


def until(claim: Callable[[], bool], seconds: float) -> None:
    """Poll until it holds."""
    deadline = time.monotonic() + seconds
    while not claim():
        if time.monotonic() > deadline:
            raise SystemExit("the soak waited in vain")
        time.sleep(0.1)


def morning(day: Day, ends_at: float, chance: random.Random) -> None:
    """Kills, freezes and polite endings, each followed by another life."""
    weather = itertools.cycle(["quiet", "errors", "storm of 429s", "broken answers"])
    for act in itertools.cycle(("kill", "freeze", "kill", "end", "kill")):
        if time.monotonic() >= ends_at:
            break
        name = next(weather)
        day.mock.set_faults(WEATHER[name])
        time.sleep(chance.uniform(0.2, 1.0) * day.hour_s)
        if act == "freeze":
            assert day.process is not None
            day.process.send_signal(signal.SIGSTOP)
            time.sleep(min(5.0, day.hour_s / 2))
            day.process.send_signal(signal.SIGCONT)
            continue
        day.end(signal.SIGKILL if act == "kill" else signal.SIGTERM)
        day.kills += act == "kill"
        day.start()
    day.mock.set_faults([])
    day.end(signal.SIGTERM)
    day.say(f"morning: {day.lives} lives, {day.kills} of them killed")


def long_life(day: Day, ends_at: float, chance: random.Random) -> int:
    """One process through everything else; returns its pid."""
    day.start()
    assert day.process is not None
    for hour, name in enumerate(itertools.cycle(WEATHER), start=8):
        if time.monotonic() >= ends_at:
            break
        rpm = chance.choice([None, 3_000, 12_000, 30_000])
        day.mock.set_faults(WEATHER[name])
        day.mock.set_limits(rpm=rpm, hide=chance.random() < 0.5)
        if hour % 5 == 0:
            day.steer("pause")
            time.sleep(day.hour_s / 8)
            day.steer("resume")
        if hour % 3 == 0:
            day.steer("set", "max-concurrency", str(chance.choice([8, 32, WINDOW])))
        if name in STORMS:  # a quarter of an hour: else nothing would be measured but waiting
            time.sleep(day.hour_s / 4)
            day.mock.set_faults([])
        time.sleep(day.hour_s * (0.75 if name in STORMS else 1))
        point = read_timeline(day.store)[-1]
        day.say(
            f"{hour % 24:02d}:00 {name:20} limit {rpm or 'none':>6}  stored {point['stored']:>8,}  refused "
            f"{point['limited']:>6,}  memory {point['rss_bytes'] / 2**20:6.1f} MiB  "
            f"lag {point['loop_lag_s'] * 1e3:5.0f} ms"
        )
    day.mock.set_faults([])
    day.mock.set_limits(rpm=None)
    pid = day.process.pid
    code = day.end(signal.SIGTERM)
    if code != 143:
        raise SystemExit(f"the last life ended with {code}, not 143")
    return pid


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Theil-Sen, the median over all pairs: units of y per unit of x.

    One step, such as the first merge, moves it little; a leak moves every pair.
    """
    some = points[:: max(1, len(points) // MOST_POINTS)]
    pairs = [(b[1] - a[1]) / (b[0] - a[0]) for a, b in itertools.combinations(some, 2) if b[0] > a[0]]
    return statistics.median(pairs) if pairs else 0.0


def figures(day: Day) -> list[tuple[str, float, float]]:
    """Name, value, bound; each bound is a maximum."""
    trace = read_timeline(day.store)
    points = [entry for entry in trace if entry["run_id"] == trace[-1]["run_id"]]
    points = [entry for entry in points[:-1] if entry["in_flight"] or entry["waiting"]]
    settled = points[int(len(points) * SETTLED) :]
    memory = [(entry["stored"] / 100_000, entry["rss_bytes"] / 2**20) for entry in settled]
    tenth = max(1, len(memory) // 10)
    first, last = (statistics.median(y for _, y in part) for part in (memory[:tenth], memory[-tenth:]))
    answers = memory[-1][0] - memory[0][0]
    lag = sorted(entry["loop_lag_s"] * 1e3 for entry in settled)
    with Journal.open(day.store, read_only=True) as journal:
        totals = journal.totals()
    with Journal.open(day.store / "canary", read_only=True) as journal:
        canaries = journal.totals()
    billed = day.mock.totals()["requests"]
    lost = billed - totals.answers - canaries.answers
    allowed = totals.possibly_billed + canaries.possibly_billed
    return [
        # Over few answers the slope is that of the allocator's warming up, not of a leak.
        ("memory slope, MiB per 100,000 answers", slope(memory), 12.0 if answers > 0.2 else math.inf),
        ("memory growth once settled, MiB", last - first, 16.0 + 12.0 * answers),
        ("memory, most, MiB", max(entry["rss_bytes"] for entry in points) / 2**20, 400.0),
        ("open files, most", max(entry["open_files"] for entry in points), WINDOW + 64),
        ("tasks, most", max(entry["tasks"] for entry in points), 2 * WINDOW + 32),
        ("threads, most", max(entry["threads"] for entry in points), 24),
        ("loop lag, median of the worst between points, ms", lag[len(lag) // 2], 250.0),
        ("loop lag, 99th percentile of the worst, ms", lag[int(len(lag) * 0.99)], 1500.0),
        ("billed, neither held nor listed as possibly billed", lost - allowed, 0),
        ("answers paid twice and held once", totals.paid_twice, (day.kills + 1) * WINDOW),
    ]


def main() -> int:
    """Run the day, print its figures, say whether all bounds hold."""
    parser = argparse.ArgumentParser(description="a scaled day in the life of a harvest")
    parser.add_argument("--seconds", type=float, default=720.0)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    chance = random.Random(chosen.seed)
    with (
        tempfile.TemporaryDirectory() as name,
        start_process("--latency", "0.05", "--latency-jitter", "0.5") as mock,
    ):
        day = Day(Path(name), mock, chosen.seconds / 24)
        write_folder(day)
        began = time.monotonic()
        day.start()
        morning(day, began + chosen.seconds / 3, chance)
        long_life(day, began + chosen.seconds, chance)
        command = [sys.executable, "-m", "harvester", "verify", str(day.store)]
        verified = subprocess.run(command, capture_output=True, check=False)
        rows = [*figures(day), ("exit code of verify", float(verified.returncode), 0)]
        trace = read_timeline(day.store)
        with Journal.open(day.store, read_only=True) as journal:
            made, kept = journal.next_shard() - 1, len(read_manifest(journal))
        print(
            f"\n{day.lives} lives, {day.kills} kills, {trace[-1]['stored']:,} answers in the last life, "
            f"{made} shards sealed or merged, {kept} left, {time.monotonic() - began:.0f} s"
        )
    for what, value, bound in rows:
        print(f"{'ok ' if value <= bound else 'BAD'} {what:55} {value:10,.1f}   at most {bound:,.0f}")
    return 0 if all(value <= bound for _, value, bound in rows) else 1


def write_folder(day: Day) -> None:
    """Configuration, more prompts than a day can ask, and four canaries."""
    config = CONFIG.format(base_url=day.mock.base_url, window=WINDOW)
    (day.folder / "harvest.toml").write_text(config, encoding="utf-8")
    rows = int(24 * day.hour_s * MOST_PER_S)
    with (day.folder / "p.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(f'{{"prompt": "What is {n} + {n % 97}?"}}\n' for n in range(rows))
    (day.folder / "canary").mkdir()
    canaries = [json.dumps({"prompt": f"Write canary{n} backwards."}) + "\n" for n in range(4)]
    (day.folder / "canary" / "c.jsonl").write_text("".join(canaries), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
