"""Fuzz the parsers: mutated answers, streams, headers, prompt lines and prompt files, against an oracle.

An input is made from the seed and its number alone, so any of them can be made again (`--only`), and a run
that was stopped goes on where it was (`--state`). Exits with 1 if a rule was broken: an exception that is no
error of the harvester, a row stored as `ok` that says something else than the bytes, an echoed API key, CPU
time that grows faster than the input, a reply that blocks the event loop of a harvest for more than 250 ms.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from pathlib import Path

from fuzzing import scaling
from fuzzing.run import Progress, ask_for_large_replies, attempt, fuzz, load


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs in all (default: 100,000)")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--state", type=Path, help="file that remembers progress and findings")
    parser.add_argument("--only", type=int, help="try this input alone, and show it")
    parser.add_argument("--no-scaling", action="store_true", help="leave out the long inputs")
    parser.add_argument(
        "--replies",
        type=int,
        default=100,
        help="large replies of random kinds to ask for; 0: none",
    )
    arguments = parser.parse_args()
    if arguments.only is not None:
        name, raw, broken = attempt(arguments.seed, arguments.only)
        print(name, raw.decode("utf-8", "backslashreplace"), *broken, sep="\n")
        return 1 if broken else 0
    slow = [] if arguments.no_scaling else scaling.superlinear()
    for line in slow:
        print(line)
    progress = load(arguments.state, arguments.seed) if arguments.state else Progress(arguments.seed)
    first = progress.next

    def save() -> None:
        if arguments.state:
            progress.save(arguments.state)

    def after(progress: Progress) -> None:
        save()
        rate = (progress.next - first) / (time.monotonic() - began)
        print(f"{progress.next:,} inputs, {len(progress.findings):,} findings, {rate:,.0f}/s", flush=True)

    def asked(progress: Progress) -> None:
        save()
        print(f"{progress.replies} large replies, worst lag {1000 * progress.worst_lag_s:.0f} ms", flush=True)

    try:
        ask_for_large_replies(progress, arguments.replies, after=asked)
        began = time.monotonic()
        fuzz(progress, arguments.inputs, times=True, after=after)
    except KeyboardInterrupt:
        print("stopped")
    save()
    for finding in progress.findings[:20]:
        print(f"input {finding.number} ({finding.target}): {finding.problem}\n  {finding.raw[:300]!r}")
    print(*summary(progress), sep="\n")
    return 1 if progress.findings or slow else 0


def summary(progress: Progress) -> list[str]:
    """Return the lines that end the output."""
    tried = ", ".join(f"{name} {count:,}" for name, count in progress.tried.items())
    kinds = ("uncaught", "silently wrong", "refused though valid", "too slow")
    peak, of_child = (
        resource.getrusage(who).ru_maxrss >> 10 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return [
        f"{progress.next:,} inputs ({tried}), seed {progress.seed}",
        f"findings: {', '.join(f'{progress.kinds[kind]} {kind}' for kind in kinds)}",
        f"slowest input {1000 * progress.slowest_s:.1f} ms of CPU; worst lag of the event loop "
        f"{1000 * progress.worst_lag_s:.0f} ms over {progress.replies:,} large replies and all shapes",
        f"peak memory {peak:,} MiB, of a child process {of_child:,} MiB",
    ]


if __name__ == "__main__":
    sys.exit(main())
