"""Count which models and builds answer, and notice response ids that repeat."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from harvester.api.error_body import excerpt
from harvester.api.request_key import short_digest
from harvester.api.types import Completion
from harvester.errors import Parked, TermsRefused
from harvester.observe.counters import Counters
from harvester.terms import lineage

# Size of the fixed table that detects repeated response ids: about the last 65,536.
IDS_KEPT = 1 << 16


class ServedModels:
    """Counts answers by the model and build they name.

    Args:
        tally: gets the counts.
        strict: park the run when another model or build than the first one answers.
        providers: providers that a router may use; empty for any.
    """

    def __init__(self, tally: Counters, *, strict: bool, providers: Sequence[str] = ()) -> None:
        self._tally = tally
        self._providers = tuple(providers)
        self._strict = strict
        self._ids = array("Q", bytes(8 * IDS_KEPT))

    def note(self, answer: Completion) -> None:
        """Count one answer. A repeated response id is only counted: it is not our key.

        Raises:
            Parked: another model or build answers now, and `strict` is set.
            TermsRefused: a router used a provider that the terms were not checked for.
        """
        if answer.response_id:
            self._note_id(answer.response_id)
        if self._tally.note_model(answer.served_model) and self._strict:
            raise Parked(0.0, f"another teacher answers now: {excerpt(answer.served_model)}")
        if not lineage.is_allowed_provider(answer.provider, self._providers):
            raise TermsRefused(
                f"answered by {lineage.unexpected_provider(answer.provider, self._providers)}",
                place="provider",
                remedy="the answer stays journalled; ask the router why, or declare that host's record too",
            )

    def _note_id(self, response_id: str) -> None:
        digest = short_digest(response_id.encode("utf-8", "surrogatepass"))
        slot = digest % IDS_KEPT
        self._tally.repeated_ids += self._ids[slot] == digest
        self._ids[slot] = digest
