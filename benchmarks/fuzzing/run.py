"""Run the fuzz targets over numbered inputs, remember findings, and continue where an earlier run stopped."""

from __future__ import annotations

import json
import time
import traceback
from bisect import bisect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from random import Random
from typing import Any

from . import large_replies, loop_lag
from .large_replies import Recipe
from .targets import SHARES, TARGETS

# CPU time that one input may take. Such an input is tried again, and the least of three tries counts.
MOST_S = 0.05
MOST_S_PER_BYTE = 5e-6
SHOWN_BYTES = 2000
# Large replies that one run of a harvest asks for.
REPLIES_AT_ONCE = 8
LARGE = "large reply"

_NAMES = list(SHARES)
_UP_TO = list(accumulate(SHARES.values()))


@dataclass(slots=True)
class Finding:
    """A rule that an input broke. `python benchmarks/fuzz.py --only NUMBER` makes the same input again."""

    number: int
    target: str
    problem: str
    raw: str

    @property
    def kind(self) -> str:
        """What kind of fault it is."""
        if "an exception" in self.problem:
            return "uncaught"
        if "s of CPU" in self.problem or "event loop was blocked" in self.problem:
            return "too slow"
        if self.problem.startswith(("refused", "a valid")):
            return "refused though valid"
        return "silently wrong"


@dataclass(slots=True)
class Progress:
    """What has been tried so far.

    Attributes:
        next: number of the next input.
        slowest_s: CPU seconds of the slowest input, after repetition.
        replies: large replies that were asked for.
        worst_lag_s: longest time that one of them blocked an event loop.
    """

    seed: int
    next: int = 0
    tried: Counter[str] = field(default_factory=Counter)
    findings: list[Finding] = field(default_factory=list)
    slowest_s: float = 0.0
    replies: int = 0
    worst_lag_s: float = 0.0

    @property
    def kinds(self) -> Counter[str]:
        """The number of findings of each kind."""
        return Counter(finding.kind for finding in self.findings)

    def save(self, path: Path) -> None:
        """Write the progress to a file."""
        hidden = path.with_suffix(".tmp")
        data = {
            "seed": self.seed,
            "next": self.next,
            "tried": dict(self.tried),
            "findings": [asdict(finding) for finding in self.findings],
            "slowest_s": self.slowest_s,
            "replies": self.replies,
            "worst_lag_s": self.worst_lag_s,
        }
        hidden.write_text(json.dumps(data, indent=1), encoding="utf-8")
        hidden.replace(path)


def load(path: Path, seed: int) -> Progress:
    """Return the progress of an earlier run with the same seed, or none."""
    if path.exists():
        data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if data["seed"] == seed:
            findings = [Finding(**each) for each in data["findings"]]
            data |= {"tried": Counter(data["tried"]), "findings": findings}
            return Progress(**data)
    return Progress(seed)


def target_of(seed: int, number: int) -> tuple[str, Random]:
    """Return the target of an input, and the generator that makes it."""
    random = Random(f"{seed}:{number}")
    return _NAMES[bisect(_UP_TO, random.randrange(_UP_TO[-1]))], random


def attempt(seed: int, number: int) -> tuple[str, bytes, list[str]]:
    """Try one input; return its target, its bytes, and the rules that it broke."""
    name, random = target_of(seed, number)
    try:
        raw, broken = TARGETS[name](random)
    except Exception:  # noqa: BLE001 - any exception is a finding
        return name, b"", ["an exception:\n" + traceback.format_exc(limit=-6)]
    return name, raw, broken


def fuzz(
    progress: Progress,
    until: int,
    *,
    times: bool = False,
    after: Callable[[Progress], None] = lambda _: None,
    every: int = 10_000,
) -> Progress:
    """Try the inputs up to a number.

    Args:
        times: measure the CPU time of each input.
        after: called after each `every` inputs.
    """
    while progress.next < until:
        number = progress.next
        began = time.perf_counter()
        name, raw, broken = attempt(progress.seed, number)
        if times:
            spent = time.perf_counter() - began
            most = MOST_S + MOST_S_PER_BYTE * len(raw)
            if spent > most:  # by the wall clock, which is cheap to read; it may have been another process
                spent = min(_cpu_of(progress.seed, number) for _ in range(3))
            progress.slowest_s = max(progress.slowest_s, spent)
            if spent > most:
                broken = [*broken, f"{spent:.3f} s of CPU for {len(raw):,} bytes"]
        progress.tried[name] += 1
        for problem in broken:
            shown = raw[:SHOWN_BYTES].decode("utf-8", "backslashreplace")
            progress.findings.append(Finding(number, name, problem, shown))
        progress.next = number + 1
        if progress.next % every == 0:
            after(progress)
    return progress


def ask_for_large_replies(
    progress: Progress, until: int, *, after: Callable[[Progress], None] = lambda _: None
) -> Progress:
    """Ask for replies of up to the size limit, some in a run; first those of every shape at the limit.

    Args:
        until: number of random replies; those of every shape come before the first of them.
        after: called after each run.
    """
    shapes = large_replies.all_shapes() if until and not progress.replies else []
    for start in range(0, len(shapes), REPLIES_AT_ONCE):
        _ask(progress, shapes[start : start + REPLIES_AT_ONCE])
        after(progress)
    while progress.replies < until:
        numbers = range(progress.replies, min(until, progress.replies + REPLIES_AT_ONCE))
        _ask(progress, [Recipe.random(progress.seed, number) for number in numbers])
        progress.replies = numbers.stop
        after(progress)
    return progress


def _ask(progress: Progress, recipes: Sequence[Recipe]) -> None:
    lag, broken = loop_lag.blocking(recipes)
    progress.worst_lag_s = max(progress.worst_lag_s, lag)
    progress.findings += [Finding(progress.replies, LARGE, problem, "") for problem in broken]


def _cpu_of(seed: int, number: int) -> float:
    began = time.thread_time()
    attempt(seed, number)
    return time.thread_time() - began
