"""Measure what a student recovers of the small neural teacher, by method: E0 to E11 and E13.

    python -m benchmarks.quality [--smoke] [--only NAME,...] [--out FOLDER]

The teachers in data/skills are served by the mock teacher; `harvester run`, `trainer train`, `evaluate`,
`loop`, `curve` and `onpolicy` do the rest, everything over HTTP. Every harvest, training and score is known
by the hash of what goes into it: what is there is read instead of made again, and an interrupted run goes on.
Writes quality.html and quality.json, and ends with exit code 1 if a gate is missed. With --smoke a few small
arms run, and no gate counts but that the student learned something.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from benchmarks.quality import cache, commands, report
from benchmarks.quality.experiments import FULL, SMOKE, SMOKE_ARMS, Arm, Sizes, arms
from benchmarks.quality.gates import Gate, gates
from benchmarks.quality.harvests import Harvest, Harvests, serve
from benchmarks.quality.onpolicy import OnPolicy
from benchmarks.quality.procedures import Procedures
from benchmarks.quality.results import Results, compute
from benchmarks.quality.trainings import Trainings

PROCEDURES = ("E8", "E11", "E13")
ROOT = Path(__file__).resolve().parents[2]


class Run:
    """One run of the experiments.

    Args:
        chosen: the arms.
        procedures: those of E8, E11 and E13 that run, too.
    """

    def __init__(self, out: Path, sizes: Sizes, chosen: dict[str, Arm], procedures: Sequence[str]) -> None:
        self._sizes = sizes
        self._chosen = chosen
        self._procedure_names = procedures
        self._pool = commands.Pool(len(os.sched_getaffinity(0)))
        self._harvests = Harvests(out)
        self._trainings = Trainings(out, self._harvests, self._pool)
        self._procedures = Procedures(out, self._harvests, self._pool, sizes)
        self._on_policy = OnPolicy(out, self._harvests, self._trainings, self._pool)
        small = arms(sizes)["E2 small"].training
        self._starts = [small.with_seed(seed) for seed in sizes.seeds] if "E13" in procedures else []
        self.seconds: dict[str, float] = {}

    def make(self) -> None:
        """Make what is not there yet."""
        began = time.monotonic()
        harvests = dict.fromkeys(arm.training.harvest for arm in self._chosen.values())
        for number, harvest in enumerate(harvests, start=1):
            print(f"harvest {number} of {len(harvests)}: {harvest}", flush=True)
            self._harvests.make(harvest)
        if "E8" in self._procedure_names:
            self._harvests.make(self._procedures.loop_harvest())
        self.seconds["harvests"] = time.monotonic() - began
        began = time.monotonic()
        try:
            self._train()
        except BaseException:
            self._pool.close(stops=True)
            raise
        self._pool.close()
        self.seconds["trainings, loops, curve and scores"] = time.monotonic() - began

    def _train(self) -> None:
        """Start what takes longest first: the curve is one process."""
        started = []
        if "E11" in self._procedure_names:
            started.append(("E11", self._procedures.start_curve()))
        for name, arm in self._chosen.items():
            for seed in arm.seeds(self._sizes):
                future = self._trainings.start(arm.training.with_seed(seed))
                started.append((f"{name} with seed {seed}", future))
        with ExitStack() as stack:
            if "E8" in self._procedure_names:
                loops = [self._procedures.start_loop(seed) for seed in self._sizes.seeds]
                if any(loops):
                    served = self._procedures.loop_harvest()
                    stack.enter_context(serve(served, self._harvests.port, ROOT))
                names = (f"E8 with seed {seed}" for seed in self._sizes.seeds)
                started += zip(names, loops, strict=True)
            for number, (what, future) in enumerate(started, start=1):
                if future is not None:
                    future.result()
                    print(f"{number} of {len(started)}: {what}", flush=True)
        self._distil_on_policy()

    def _distil_on_policy(self) -> None:
        """Start from trained students, with one server for all seeds."""
        with ExitStack() as stack:
            if not all(map(self._on_policy.is_done, self._starts)):
                served = self._on_policy.pool_of(self._starts[0])
                stack.enter_context(serve(served, self._harvests.port, ROOT))
            distillations = [self._on_policy.start(start) for start in self._starts]
            for start, future in zip(self._starts, distillations, strict=True):
                if future is not None:
                    future.result()
                    print(f"E13 with seed {start.seed}", flush=True)

    def folders(self) -> dict[str, list[Path]]:
        """Return the folders of the trainings by arm, one a seed."""
        found = {
            name: [self._trainings.folder_of(arm.training.with_seed(seed)) for seed in arm.seeds(self._sizes)]
            for name, arm in self._chosen.items()
        }
        if self._starts:
            found["E13"] = [self._on_policy.folder_of(start) / "out" for start in self._starts]
        return found

    def results(self) -> Results:
        """Compute the results."""
        results, students = compute(self.folders())
        if "E8" in self._procedure_names:
            scores = [self._procedures.loop_scores(seed, students.prompts) for seed in self._sizes.seeds]
            totals = students.of_loops(scores)
            interval = students.bootstrap.interval
            rounds = range(1, self._sizes.loop_rounds + 1)
            for choice in ("hard", "random"):
                results.loop[choice] = {f"round {n}": interval(totals[choice, n]) for n in rounds}
            results.loop["difference"] = {
                f"round {n}": interval(totals["hard", n] - totals["random", n]) for n in rounds
            }
        if "E11" in self._procedure_names:
            results.curve = cache.read_json(self._procedures.curve_folder() / "out" / "curve.json")
        if self._starts:
            measured = [facts["held_out"] for facts in self._on_policy.facts(self._starts)]
            results.reverse_kl = [(of[0]["reverse_kl"], of[-1]["reverse_kl"]) for of in measured]
        return results

    def spent(self) -> dict[str, float]:
        """Return the CPU seconds of what was made, now or before."""
        cpu = {}
        for name, folders in self.folders().items():
            folders = [folder.parent for folder in folders] if name == "E13" else folders
            cpu[name] = sum(cache.read_json(folder / "seconds.json")["cpu"] for folder in folders)
        if "E8" in self._procedure_names:
            folders = [self._procedures.loop_folder(seed) for seed in self._sizes.seeds]
            cpu["E8"] = sum(cache.read_json(folder / "seconds.json")["cpu"] for folder in folders)
        if "E11" in self._procedure_names:
            cpu["E11"] = cache.read_json(self._procedures.curve_folder() / "seconds.json")["cpu"]
        harvests = dict.fromkeys(arm.training.harvest for arm in self._chosen.values())
        return {
            **{f"CPU of {name}, all seeds": value for name, value in cpu.items()},
            **{f"wall time of {_named(h)}": self._harvest_seconds(h) for h in harvests},
        }

    def _harvest_seconds(self, harvest: Harvest) -> float:
        seconds: float = cache.read_json(self._harvests.folder_of(harvest) / "harvest.json")["seconds"]
        return seconds


def _named(harvest: Harvest) -> str:
    answers = f"{harvest.prompts:,} prompts x {harvest.samples} of {harvest.teacher}"
    return f"harvest of {answers}{', corrupted' if harvest.corrupted else ''}"


def main() -> None:
    """Run what is not done yet, write the report, and print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few small arms, in half a minute")
    parser.add_argument("--only", default="", help="experiments to run, such as E2,E8; default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "quality")
    flags = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    began = time.monotonic()
    sizes = SMOKE if flags.smoke else FULL
    listed = arms(sizes)
    only = flags.only.split(",") if flags.only else [*(SMOKE_ARMS if flags.smoke else listed), *PROCEDURES]
    chosen = {name: listed[name] for name in listed if _is_asked(name, only, whole=not flags.smoke)}
    procedures = [] if flags.smoke else [name for name in PROCEDURES if name in only]
    listed["E13"] = replace(listed["E2 small"], name="E13", what="E2 small, then on-policy")
    run = Run(flags.out.resolve(), sizes, chosen, procedures)
    run.make()
    began_report = time.monotonic()
    results = run.results()
    now = time.monotonic()
    seconds = {"all": now - began, **run.seconds, "results": now - began_report, **run.spent()}
    reached = smoke_gates(results) if flags.smoke else gates(results)
    page = report.write(flags.out, results, reached, listed, seconds)
    show(results, reached, listed)
    print(f"{page}; {seconds['all']:,.0f} s")
    sys.exit(0 if all(gate.is_held for gate in reached) else 1)


def _is_asked(name: str, only: Sequence[str], *, whole: bool) -> bool:
    """Return whether an arm runs: by its own name, or by that of its whole experiment."""
    return name in only or (whole and name.split()[0] in only)


def smoke_gates(results: Results) -> list[Gate]:
    """Return the one gate of a smoke: the student answers what its base did not."""
    learned = results.accuracy["E2"]
    assert results.base is not None
    return [Gate("E2 learned something", str(learned), learned.low > results.base.high)]


def show(results: Results, reached: Sequence[Gate], listed: dict[str, Arm]) -> None:
    """Print the results."""
    print(f"E0 base {results.base}")
    for row in report.table_of(results, listed):
        print(" | ".join(row))
    for measure, pairs in results.differences.items():
        for pair, value in pairs.items():
            print(f"{measure}: {pair} {value}")
    for split, of in results.splits.items():
        for name, values in of.items():
            print(f"{split}: {name}", ", ".join(f"{key} {value}" for key, value in values.items()))
    for name, rounds in results.loop.items():
        print(f"E8 {name}:", ", ".join(f"{at} {value}" for at, value in rounds.items()))
    if results.curve is not None:
        print("E11", results.curve["prediction"], "next", results.curve["next"], results.curve["verdict"])
    for before, after in results.reverse_kl:
        print(f"E13 reverse KL {before:.3f}, then {after:.3f} nats a token")
    for gate in reached:
        print(f"{'held  ' if gate.is_held else 'MISSED'} {gate.name}: {gate.measured}")


if __name__ == "__main__":
    main()
