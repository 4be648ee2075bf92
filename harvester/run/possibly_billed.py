"""Requests that may have been billed without an answer to hold: `[run] retry_possibly_billed = false`.

An intent stays in the journal until its answer or refund comes, so those of every run are known, also of one
that was killed.
"""

from __future__ import annotations

from harvester.api.types import Request
from harvester.config.config import HarvestConfig
from harvester.errors import GaveUp, PossiblyBilled
from harvester.store.journal.journal import Journal

WHY = "possibly billed, so not sent again: [run] retry_possibly_billed is false"


class PossiblyBilledRequests:
    """Keys that must not be sent again, from before this pass.

    Args:
        spared: whether the run is told to send nothing twice; otherwise nobody is suspect.
    """

    def __init__(self, keys: frozenset[bytes] = frozenset(), *, spared: bool = False) -> None:
        self._keys = keys
        self._spared = spared

    @classmethod
    def of(cls, journal: Journal, config: HarvestConfig) -> PossiblyBilledRequests:
        """Those that the journal remembers, if the configuration asks for it."""
        if config.run.retry_possibly_billed:
            return cls()
        with journal.reading() as connection:
            found = connection.execute("SELECT DISTINCT key FROM intents").fetchall()
        return cls(frozenset(key for (key,) in found), spared=True)

    def sentence(self, request: Request) -> GaveUp | None:
        """Its dead letter, if this request was sent before and nobody knows whether it was billed."""
        if request.key not in self._keys:
            return None
        return GaveUp(PossiblyBilled(f"an earlier attempt brought no answer; {WHY}", maybe_billed=True), 0)

    def named(self, gone: GaveUp) -> GaveUp:
        """The dead letter of an attempt of this pass, by the reason why it was the last one."""
        error = gone.error
        if not (self._spared and error.maybe_billed) or error.is_permanent:
            return gone
        last = PossiblyBilled(f"{error.message}; {WHY}", status=error.status, maybe_billed=True)
        last.place = error.place
        return GaveUp(last, gone.attempts)
