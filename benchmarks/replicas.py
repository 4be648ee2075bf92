"""Measure whether several addresses of one teacher add up, and what is kept of one that turns to garbage.

    python benchmarks/replicas.py [--seconds 20] [--scale 1.0] [--only slots]

Each address is a mock teacher in a process of its own; --scale multiplies all rates. `slots`: servers that
work on 20, 12, 6 and 2 requests at once for 0.2 s each, which is 100, 60, 30 and 10 answers a second, and
queue all others. `limits`: the same rates as limits per minute that headers don't state, at 0.2 s latency.
`credential`: all four behind a limit of the credential that is known, of 80 % of what they could do
together. Each rate is first measured by a harvest of that address alone, in the same run; printed is the
rate of a harvest of all four over the sum, without the seconds in which the windows grow.

`garbage`: in the middle of a run the fastest of the four answers nothing but noise, with status 200 and a
good finish reason. Printed is how many of these answers are in the store at the end, over those that it
gave.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from one_pass import configured, one_pass

from harvester.config.config import HarvestConfig
from harvester.mock_teacher.running import RunningMock, start_process
from harvester.store.reader import Corpus

SLOT_S = 0.2
SLOTS = (20, 12, 6, 2)
GOAL, GARBAGE_GOAL = 0.95, 0.02
# Seconds in which windows and learned rates grow.
SETTLE_S = 8.0
COLUMNS = ("created_at", "endpoint")
NOISE = "qzx vrrk lmbo pfft wug"


def replicated(mocks: Sequence[RunningMock], limits: dict[str, Any], **tables: Any) -> HarvestConfig:
    """A configuration for several addresses."""
    config = configured(mocks[0].base_url, {"max_concurrency": 256, **limits}, **tables)
    others = tuple(mock.base_url for mock in mocks[1:])
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"replicas": others})})


def answers_per_s(config: HarvestConfig, seconds: float) -> list[float]:
    """Answers per second of each address in a harvest, after the windows have grown."""
    rates: list[float] = []

    def look(store: Path) -> None:
        came = [(s.created_at.timestamp(), s.endpoint) for s in Corpus.open(store).samples(COLUMNS)]
        begun = min(at for at, _ in came) + SETTLE_S
        for url in config.teacher.base_urls:
            count = sum(endpoint == url and begun <= at < begun + seconds for at, endpoint in came)
            rates.append(count / seconds)

    asyncio.run(one_pass(config, SETTLE_S + seconds + 1, look=look))
    return rates


def flags_of(case: str, scale: float) -> list[list[str]]:
    """The mock teachers of a case, one after the other."""
    if case == "limits":
        return [
            ["--rpm", str(60 * slots / SLOT_S * scale), "--latency", str(SLOT_S), "--hide-limits"]
            for slots in SLOTS
        ]
    return [["--slots", str(slots), "--slot-seconds", str(SLOT_S / scale)] for slots in SLOTS]


def tell_sum(case: str, seconds: float, scale: float) -> None:
    """Measure each address alone and then all together."""
    with ExitStack() as stack:
        mocks = [stack.enter_context(start_process(*flags)) for flags in flags_of(case, scale)]
        alone = [slots / SLOT_S * scale for slots in SLOTS]  # the limits themselves: learning takes its time
        if case != "limits":
            alone = [rate for mock in mocks for rate in answers_per_s(replicated([mock], {}), seconds / 2)]
        limits, best = {}, sum(alone)
        if case == "credential":
            best *= 0.8
            limits = {"requests_per_minute": 60 * best}
        rates = answers_per_s(replicated(mocks, limits), seconds)
    together = sum(rates)
    each = ", ".join(f"{rate:.1f} of {best:.1f}" for rate, best in zip(rates, alone, strict=True))
    print(
        f"{case:10} together {together:.1f}/s of {best:.1f}/s ({each} alone): {together / best:.3f}"
        f"   load {os.getloadavg()[0]:.1f}   to reach: {GOAL}",
        flush=True,
    )


def tell_garbage(seconds: float, scale: float) -> None:
    """Let the fastest address answer noise from the middle of a run on."""
    rows = int(sum(SLOTS) / SLOT_S * scale * seconds)
    kept: list[int] = []

    def look(store: Path) -> None:
        kept.append(sum(sample.completion == NOISE for sample in Corpus.open(store).samples(["completion"])))

    with ExitStack() as stack:
        mocks = [stack.enter_context(start_process(*flags)) for flags in flags_of("slots", scale)]

        async def turn() -> None:
            await asyncio.sleep(seconds / 2)
            await asyncio.to_thread(mocks[0].set_faults, [{"action": "content", "value": NOISE}])

        config = replicated(mocks, {}, canary={"replicas_every_s": 5})
        shots = asyncio.run(one_pass(config, 20 * seconds, turn, rows=rows, look=look))
        given = sum(mocks[0].fired().values())
    last = shots[-1][1]
    print(
        f"garbage    {kept[0]} of {given} answers since it turned are kept: {kept[0] / max(1, given):.4f}; "
        f"{last.taken_back} taken back, {last.answers_stored} of {rows} rows answered"
        f"   load {os.getloadavg()[0]:.1f}   to reach: at most {GARBAGE_GOAL}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20)
    parser.add_argument("--scale", type=float, default=1.0)
    cases = ("slots", "limits", "credential", "garbage")
    parser.add_argument("--only", choices=cases, action="append")
    chosen = parser.parse_args()
    for case in chosen.only or cases:
        if case == "garbage":
            tell_garbage(chosen.seconds, chosen.scale)
        else:
            tell_sum(case, chosen.seconds, chosen.scale)


if __name__ == "__main__":
    main()
