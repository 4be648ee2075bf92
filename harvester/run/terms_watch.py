"""Asks the terms again while a run lives: a permission runs out, an answer names another model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from harvester.errors import HarvesterError, TermsRefused
from harvester.system.clock import Clock

ASK_EVERY_S = 60.0
ASK_AGAIN_S = 10.0
"""How soon terms that could not be read are looked at again."""
MOST_LOOKS = 12
"""Looks in a row at terms that can't be read, until unknown means no. An editor needs less."""
LISTEN_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class TermsHooks:
    """What the warden hears and whom it tells.

    `ask` raises TermsRefused when the run may not go on, or not with these voices; `voices` are the models
    and builds that answers named so far. `refused` is told once, and `complain` of terms that can't be read.
    """

    ask: Callable[[Collection[str]], None]
    voices: Callable[[], Mapping[str, int]]
    refused: Callable[[TermsRefused], None]
    complain: Callable[[Exception], None]


async def watch(ears: TermsHooks, clock: Clock) -> None:
    """Until cancelled, or until the answer is no: also when nobody could read the terms for too long."""
    never = asyncio.Event()
    heard: set[str] = set()
    due_at, looks = -math.inf, 0
    while True:
        fresh = set(ears.voices()) - heard
        if clock.now() >= due_at or (fresh and not looks):
            try:
                await asyncio.to_thread(ears.ask, fresh)
            except TermsRefused as error:
                ears.refused(error)
                return
            except (HarvesterError, OSError) as error:
                looks += 1
                if looks == 1:
                    ears.complain(error)
                if looks == MOST_LOOKS:
                    ears.refused(unreadable_terms(error))
                    return
            else:
                heard |= fresh
                looks = 0
            due_at = clock.now() + (ASK_AGAIN_S if looks else ASK_EVERY_S)
        await clock.wait(never, LISTEN_EVERY_S)


def unreadable_terms(error: Exception) -> TermsRefused:
    """What it means that the terms can't be read: unknown means no."""
    return TermsRefused(
        f"the terms can't be asked: {error}",
        remedy="mend or remove the file, then run again: what is stored stays",
    )
