"""Count what the operator should know about the prompts before they are paid for."""

from __future__ import annotations

from array import array
from collections import Counter

from harvester.api.request_key import short_digest
from harvester.api.types import Prompt
from harvester.config.config import ROW_SETTINGS, SamplingSection
from harvester.prompts.recognise import SENT_FIELDS
from harvester.quality.similarity.leaks import user_texts
from harvester.quality.similarity.texts import normalised

# Fields of a prompt line that look as if they were sent. They are metadata: [sampling] sets them for all.
_LOOK_SENT = frozenset(SamplingSection.model_fields) - {"extra", "stream", "samples"}
_LOOK_SENT |= {*SENT_FIELDS, "functions", "function_call", "max_completion_tokens", "model", "system"}


class PromptNotes:
    """Counts over the prompts of a harvest."""

    def __init__(self) -> None:
        self._prompts = self._ends_with_assistant = 0
        self._not_sent: Counter[str] = Counter()
        # Digests of what prompts with a split ask, of those for training and of those held out.
        self._train: array[int] = array("Q")
        self._held_out: set[int] = set()

    def add(self, prompt: Prompt) -> None:
        """Count one prompt."""
        self._prompts += 1
        self._ends_with_assistant += prompt.messages[-1].get("role") == "assistant"
        if prompt.metadata:
            self._not_sent.update(_LOOK_SENT.intersection(prompt.metadata))
            self._add_split(prompt)

    def _add_split(self, prompt: Prompt) -> None:
        split = prompt.metadata.get("split")
        if not isinstance(split, str) or not split:
            return
        text = "\x1f".join(normalised(text) for text in user_texts(prompt.messages))
        digest = short_digest(text.encode("utf-8", "surrogatepass"))
        if split == "train":
            self._train.append(digest)
        else:
            self._held_out.add(digest)

    def lines(self) -> tuple[str, ...]:
        """Return one line for each thing to check."""
        lines = []
        if self._ends_with_assistant:
            lines.append(
                f"{self._ends_with_assistant:,} of {self._prompts:,} prompts end with an assistant turn, "
                'which is sent as it is; [prompts] last_assistant = "reference" keeps it as the reference '
                "instead"
            )
        for name, count in sorted(self._not_sent.items()):
            why = "is not in the form that is sent" if name in SENT_FIELDS else "is not sent"
            remedy = "[sampling] sets what is sent with every prompt"
            if name in ROW_SETTINGS:
                remedy += f'; with [prompts] row_settings = ["{name}"] each row sends its own'
            lines.append(
                f"{count:,} of {self._prompts:,} prompts have a field {name!r}, which {why}: it is kept as "
                f"metadata; {remedy}"
            )
        if leaked := sum(digest in self._held_out for digest in self._train if self._held_out):
            lines.append(
                f"{leaked:,} prompts for training ask the same as a held-out prompt: a table [decontaminate] "
                "skips them, and those that nearly do"
            )
        return tuple(lines)
