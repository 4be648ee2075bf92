"""Write a student's answers as texts to score, and read what the teacher says of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow.compute as pc

from harvester.api.types import Outcome
from harvester.store.reader import Corpus
from trainer.data.chat_template import Renderer
from trainer.data.conversation import Conversation
from trainer.data.student_tokens import StudentTokens
from trainer.experiments.pool import PoolPrompt
from trainer.model.generate import Answer
from trainer.onpolicy.groups import Groups, TeacherToken, group, unscored

SCORED_COLUMNS = ("outcome", "request_json", "logprobs")


@dataclass(frozen=True, slots=True)
class TextToScore:
    """One answer as it is sent to the teacher.

    Attributes:
        line: the line of the prompt file.
        before: bytes before the answer in the text, None where the server puts the chat into its template.
        answer: the bytes that are scored: the answer, or the valid UTF-8 at its beginning.
        skipped: bytes at the beginning of the student's answer that its template wants and the teacher's
            does not have.
        is_whole: whether the answer ends there, so that the end of the turn is scored as well.
    """

    line: dict[str, Any]
    before: bytes | None
    answer: bytes
    skipped: int
    is_whole: bool

    @property
    def asked(self) -> str:
        """What the request asks about, as it is found in the store again."""
        return self.line["text"] if self.before is not None else _chat_key(self.line["messages"])


class TeacherTemplate:
    """Renders texts in the teacher's own chat template.

    Args:
        renderer: of the teacher's tokenizer; None: the server renders.
    """

    def __init__(self, renderer: Renderer | None) -> None:
        self._renderer = renderer
        self._end = ""
        if renderer is not None:
            self._end = renderer.decode(renderer.chat_shape.end_of_turn)

    def knows(self, prompt: PoolPrompt) -> bool:
        """Whether a prompt can be rendered: none of its texts holds a special token of the teacher."""
        if self._renderer is None:
            return True
        return not self._renderer.has_special_text(Conversation(prompt.messages))

    def before(self, prompt: PoolPrompt) -> str | None:
        """Return the text before an answer; None if the server renders."""
        if self._renderer is None:
            return None
        conversation = Conversation(prompt.messages)
        shape = self._renderer.chat_shape
        return self._renderer.learned_prompt(conversation, thinks=False) + shape.lead

    @property
    def end(self) -> str:
        """The text that ends a turn."""
        return self._end


def text_to_score(
    prompt: PoolPrompt,
    answer: Answer,
    tokens: StudentTokens,
    lead: str,
    template: TeacherTemplate,
    name: str,
) -> TextToScore | None:
    """Return an answer as it is sent; None if nothing of it can be: it is empty, or no text.

    Args:
        lead: white space that the student's template wants before an answer.
        name: id of the line.
    """
    raw = b"".join(tokens.data[token] for token in answer.ids)
    skipped = len(lead.encode()) if raw.startswith(lead.encode()) else 0
    spoken = raw[skipped:]
    text = _valid_start(spoken)
    is_whole = not answer.is_cut and len(text.encode()) == len(spoken)
    before = template.before(prompt)
    if not text and (before is None or not is_whole):
        return None
    messages = [dict(message) for message in prompt.messages]
    messages.append({"role": "assistant", "content": text})
    line: dict[str, Any] = {"id": name, "messages": messages}
    if not is_whole:
        line["open"] = True
    if before is not None:
        line["text"] = before + text + (template.end if is_whole else "")
    return TextToScore(line, None if before is None else before.encode(), text.encode(), skipped, is_whole)


def _valid_start(raw: bytes) -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        return raw[: error.start].decode()


def _chat_key(messages: Sequence[Mapping[str, Any]]) -> str:
    return json.dumps(messages, sort_keys=True)


# Tokens of a scored text: bytes (None where unknown) and log-probability.
Scored = tuple[tuple[bytes | None, float | None], ...]


def read_scores(corpus: Corpus, texts: Sequence[TextToScore]) -> dict[str, Scored]:
    """Return what the store holds of these texts, by `TextToScore.asked`.

    Log-probabilities are as shards hold them (float16), sealed or not, so that sealing changes nothing.

    Raises:
        StoreError, StoreCorrupt: a shard is missing or damaged.
    """
    wanted = {text.asked for text in texts}
    scores: dict[str, Scored] = {}
    for batch in corpus.batches(SCORED_COLUMNS):
        scored = batch.filter(pc.equal(batch.column("outcome"), Outcome.SCORED.value))
        for at, request in enumerate(scored.column("request_json").to_pylist()):
            body = json.loads(request)
            asked = _chat_key(body["messages"]) if "messages" in body else body.get("prompt") or body["text"]
            if asked in wanted:
                listed = scored.column("logprobs")[at].as_py() or ()
                scores[asked] = tuple(
                    (token["bytes"], None if token["logprob"] is None else float(token["logprob"]))
                    for token in listed
                )
    return scores


def groups_of(
    answer: Answer, text: TextToScore | None, scored: Scored | None, tokens: StudentTokens
) -> Groups:
    """Return the groups of an answer's tokens, those of its end included."""
    ends = not answer.is_cut
    if text is None or scored is None:
        return unscored(len(answer.ids) + ends)
    inside, end_logprob = _in_answer(text, scored)
    inside = [(first + text.skipped, stop + text.skipped, value) for first, stop, value in inside]
    sizes = [len(tokens.data[token]) for token in answer.ids]
    return group(sizes, inside, ends=ends, end_logprob=end_logprob if text.is_whole else None)


def _in_answer(text: TextToScore, scored: Scored) -> tuple[list[TeacherToken], float | None]:
    """Return the teacher's tokens that lie in the answer, and the log-probability of its end of the turn."""
    inside: list[TeacherToken] = []
    at = -len(text.before) if text.before is not None else 0
    size = len(text.answer)
    end: list[float | None] = []
    for data, logprob in scored:
        if at >= size:
            end.append(logprob)
            if text.before is None:
                break  # what the template writes after the end of the turn is not the model's
            continue
        stop = at + len(data or b"")
        if at >= 0 and stop <= size and data:
            inside.append((at, stop, logprob))
        at = stop
    known = [value for value in end if value is not None]
    return inside, float(np.sum(known)) if end and len(known) == len(end) else None


def count_answers(answers: Sequence[Answer], groups: Sequence[Groups]) -> dict[str, int]:
    """Return counts for the report."""
    counts = Counter(
        answers=len(answers),
        cut=sum(answer.is_cut for answer in answers),
        tokens=sum(len(each.of_token) for each in groups),
        scored_tokens=sum(each.scored for each in groups),
        unscored_answers=sum(each.scored == 0 for each in groups),
        clipped=sum(each.clipped for each in groups),
    )
    return dict(counts)
