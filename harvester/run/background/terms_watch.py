"""Check the terms again during a run: a permission may expire, or an answer may name another model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from harvester.errors import HarvesterError, TermsRefused
from harvester.system.clock import Clock

ASK_EVERY_S = 60.0

# Terms that could not be read are read again after this time.
ASK_AGAIN_S = 10.0

# After this many failed readings in a row (two minutes: somebody may be editing the file) the run ends as if
# the terms refused it.
MOST_LOOKS = 12

# How often new model names in answers are looked for.
LISTEN_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class TermsHooks:
    """What the watch calls.

    `check` raises TermsRefused when the run may not go on, or not with these models. `served_models` returns
    the models and builds that answers named so far. `on_refused` is called once; `on_error` when the terms
    can't be read.
    """

    check: Callable[[Collection[str]], None]
    served_models: Callable[[], Mapping[str, int]]
    on_refused: Callable[[TermsRefused], None]
    on_error: Callable[[Exception], None]


async def watch(hooks: TermsHooks, clock: Clock) -> None:
    """Check every minute, and at each new model name. Return when the terms refuse the run."""
    never = asyncio.Event()
    checked: set[str] = set()
    due_at, failures = -math.inf, 0
    while True:
        new_names = set(hooks.served_models()) - checked
        if clock.now() >= due_at or (new_names and not failures):
            try:
                await asyncio.to_thread(hooks.check, new_names)
            except TermsRefused as error:
                hooks.on_refused(error)
                return
            except (HarvesterError, OSError) as error:
                failures += 1
                if failures == 1:
                    hooks.on_error(error)
                if failures == MOST_LOOKS:
                    hooks.on_refused(unreadable_terms(error))
                    return
            else:
                checked |= new_names
                failures = 0
            due_at = clock.now() + (ASK_AGAIN_S if failures else ASK_EVERY_S)
        await clock.wait(never, LISTEN_EVERY_S)


def unreadable_terms(error: Exception) -> TermsRefused:
    """Return the refusal of a run whose terms can't be read: unknown means no."""
    return TermsRefused(
        f"the terms can't be asked: {error}",
        remedy="mend or remove the file, then run again: what is stored stays",
    )
