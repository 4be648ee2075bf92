"""Decide which gates are held."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.quality.results import PHRASING, UNTAUGHT, Results


@dataclass(frozen=True)
class Gate:
    """A condition that `make quality` fails without.

    Attributes:
        measured: what was measured, in words.
    """

    name: str
    measured: str
    is_held: bool


def gates(results: Results) -> list[Gate]:
    """Return the gates whose experiments have been run."""
    found = []
    if recovery := results.recovery.get("E2"):
        is_held = recovery.value >= 0.90 and recovery.low >= 0.87
        found.append(Gate("E2 recovers 0.90 of the teacher, at least 0.87", str(recovery), is_held))
    if phrasing := results.splits.get(PHRASING, {}).get("E2", {}).get("recovery"):
        found.append(Gate("and 0.85 in held-out phrasings", str(phrasing), phrasing.value >= 0.85))
    if untaught := results.splits.get(UNTAUGHT, {}).get("E2", {}).get("accuracy"):
        found.append(Gate("a task never taught stays below 0.05", str(untaught), untaught.high < 0.05))
    for measure, unit in (("loss", "nats a token"), ("error", "calibration error")):
        # The bias of renormalising is that of the probability that isn't listed. The weaker teacher leaves
        # 0.001 beside its top 5, so E6 is judged with a teacher that leaves 0.13 beside its top 5.
        for pair in ("E5 - E2 small", "E5 unsure - E6 unsure"):
            if difference := results.differences.get(measure, {}).get(pair):
                name = f"{pair}: lower {unit}"
                found.append(Gate(name, str(difference), difference.high < 0))
    if results.loop:
        last = list(results.loop["difference"])[-1]
        difference = results.loop["difference"][last]
        found.append(Gate(f"E8 {last}: hard prompts beat random ones", str(difference), difference.low > 0))
    if results.curve is not None:
        error = abs(results.curve["prediction"]["error"])
        found.append(Gate("E11 predicts the largest size to 2 points", f"{100 * error:.1f}", error < 0.02))
    return found
