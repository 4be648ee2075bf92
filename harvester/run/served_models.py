"""Who answers, as the answers say it: model and build, and ids that should be each answer's own."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from harvester.api.error_body import excerpt
from harvester.api.request_key import short_digest
from harvester.api.types import Completion
from harvester.errors import Parked, TermsRefused
from harvester.observe.counters import Tally
from harvester.terms import lineage

IDS_KEPT = 1 << 16
"""An id that comes again is noticed among about so many of the last ones: each has one place in a table that
is as large on the first day as on the last."""


class ServedModels:
    """Counts what answers call themselves into a tally.

    Args:
        strict: another voice than the first one's parks the run.
        providers: those a router is held to; none: whoever serves.
    """

    def __init__(self, tally: Tally, *, strict: bool, providers: Sequence[str] = ()) -> None:
        self._tally = tally
        self._providers = tuple(providers)
        self._strict = strict
        self._ids = array("Q", bytes(8 * IDS_KEPT))

    def hear(self, answer: Completion) -> None:
        """Count one stored answer. An id is not our key: one that comes twice is counted, and that is all.

        Raises:
            Parked: another teacher answers now, and the run is strict about it.
            TermsRefused: a router let another provider answer than the terms were asked for.
        """
        if answer.response_id:
            self._note_id(answer.response_id)
        if self._tally.note_voice(answer.voice) and self._strict:
            raise Parked(0.0, f"another teacher answers now: {excerpt(answer.voice)}")
        if not lineage.is_allowed_provider(answer.provider, self._providers):
            raise TermsRefused(
                f"answered by {lineage.unexpected_provider(answer.provider, self._providers)}",
                place="provider",
                remedy="the answer stays journalled; ask the router why, or declare that host's record too",
            )

    def _note_id(self, told: str) -> None:
        number = short_digest(told.encode("utf-8", "surrogatepass"))
        place = number % IDS_KEPT
        self._tally.repeated_ids += self._ids[place] == number
        self._ids[place] = number
