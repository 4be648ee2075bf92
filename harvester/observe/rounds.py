"""The rounds of canaries so far, in the canaries' own store: what each found, and what was answered."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from harvester.observe import canary
from harvester.observe.canary import CanaryReply, Known
from harvester.store import paths
from harvester.store.reader import Corpus

_COLUMNS = ("completion", "refusal", "response_model", "system_fingerprint", "metadata_json")


def read_rounds(store: Path) -> list[dict[str, Any]]:
    """The rounds so far, oldest first; a torn last line is left out."""
    rounds = []
    with contextlib.suppress(OSError):
        for line in (
            (store / paths.CANARY / paths.CANARY_ROUNDS)
            .read_text(encoding="utf-8", errors="replace")
            .splitlines()
        ):
            with contextlib.suppress(ValueError):
                found = json.loads(line)
                if isinstance(found, dict) and "round" in found:
                    rounds.append(found)
    return rounds


def write_down(store: Path, told: Mapping[str, Any]) -> None:
    """Append a round; a disk that refuses loses the line, not the run."""
    with (
        contextlib.suppress(OSError),
        (store / paths.CANARY / paths.CANARY_ROUNDS).open("a", encoding="utf-8") as file,
    ):
        file.write(json.dumps(told) + "\n")


def news_of(rounds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the status shows of earlier rounds: no news of this process, and still true."""
    if not rounds:
        return {}
    changed, last = [one for one in rounds if one.get("changes")], rounds[-1]
    return {
        "rounds": last["round"],
        "asked_at": last.get("at"),
        "distance": last.get("distance"),
        "changes": len(changed),
        "said": "; ".join(changed[-1]["changes"]) if changed else "",
    }


def remembered(store: Path) -> tuple[Known, int]:
    """What to compare with, from the rounds that were written down, and the number of the last round.

    Raises:
        StoreError, StoreCorrupt: the canaries' store can't be read.
    """
    rounds = {one["round"]: one for one in read_rounds(store)}
    last = max(rounds, default=0)

    def answers() -> Iterator[tuple[int, str, CanaryReply]]:
        nonlocal last
        for sample in Corpus.open(store / paths.CANARY).samples(columns=_COLUMNS):
            number, asks = sample.metadata.get("round", 0), sample.metadata.get("asks", "")
            last = max(last, number)
            if number in rounds or not rounds:  # the others were cut short: nobody has compared them
                text = sample.completion or sample.refusal or ""
                yield number, asks, CanaryReply(text, sample.response_model, sample.system_fingerprint)

    changed = {number for number, one in rounds.items() if one.get("changes")}
    return canary.recollect(answers(), changed), last
