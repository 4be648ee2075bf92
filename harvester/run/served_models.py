"""Count which models and builds answer, and notice response ids and texts that repeat."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

from harvester.api.error_body import excerpt
from harvester.api.request_key import short_digest
from harvester.api.types import Completion, Outcome
from harvester.errors import Parked, TermsRefused
from harvester.observe.counters import Counters
from harvester.terms import lineage

# Size of the fixed tables that detect repeated response ids and texts: about the last 65,536.
IDS_KEPT = 1 << 16
# A shorter text may be the right answer to many prompts.
SHORTEST_TEXT = 40


class ServedModels:
    """Counts answers by the model and build they name.

    Args:
        tally: gets the counts.
        strict: park the run when another model or build than the first one answers; `job` then pauses those
            to come.
        providers: providers that a router may use; empty for any.
    """

    def __init__(self, tally: Counters, *, strict: bool, providers: Sequence[str] = ()) -> None:
        self._tally = tally
        self._providers = tuple(providers)
        self._strict = strict
        self._ids = array("Q", bytes(8 * IDS_KEPT))
        # Of each text, and of the prompt that it answered.
        self._texts, self._prompts = (array("Q", bytes(8 * IDS_KEPT)) for _ in range(2))

    def note(self, answer: Completion, prompt_id: str) -> None:
        """Count one answer to a prompt. A repeated response id is only counted: it is not our key.

        Raises:
            Parked: another model or build answers now, and `strict` is set.
            TermsRefused: a router used a provider that the terms were not checked for.
        """
        if answer.response_id:
            self._note_id(answer.response_id)
        if answer.outcome is Outcome.OK and answer.text and len(answer.text) >= SHORTEST_TEXT:
            self._note_text(answer.text, prompt_id)
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

    def _note_text(self, text: str, prompt_id: str) -> None:
        digest, prompt = (short_digest(each.encode("utf-8", "surrogatepass")) for each in (text, prompt_id))
        slot = digest % IDS_KEPT
        is_repeated = self._texts[slot] == digest and self._prompts[slot] != prompt
        self._tally.repeated_texts += is_repeated
        if not is_repeated:
            self._texts[slot], self._prompts[slot] = digest, prompt
