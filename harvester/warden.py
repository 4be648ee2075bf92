"""Asks the terms again while a run lives: a permission runs out, an answer names another model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Collection, Mapping

from harvester.clock import Clock
from harvester.errors import TermsRefused

TERMS = "terms"
ASK_EVERY_S = 60.0
LISTEN_EVERY_S = 1.0


async def keep(
    ask: Callable[[Collection[str]], None],
    voices: Callable[[], Mapping[str, int]],
    refused: Callable[[TermsRefused], None],
    clock: Clock,
) -> None:
    """Until cancelled, or until the answer is no.

    Args:
        ask: raises TermsRefused when the run may not go on, or not with these voices.
        voices: models and builds that answers named so far.
        refused: told once.
    """
    never = asyncio.Event()
    heard: set[str] = set()
    asked_at = -math.inf
    while True:
        fresh = set(voices()) - heard
        if fresh or clock.now() - asked_at >= ASK_EVERY_S:
            try:
                await asyncio.to_thread(ask, fresh)
            except TermsRefused as error:
                refused(error)
                return
            heard |= fresh
            asked_at = clock.now()
        await clock.wait(never, LISTEN_EVERY_S)
