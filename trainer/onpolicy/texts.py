"""Write a student's answers as texts to score, and read what the teacher says of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from harvester.api.request_key import request_key
from harvester.api.scoring.request_forms import endpoint_in_key, listed_of
from harvester.api.types import Outcome
from harvester.store.reader import Corpus
from harvester.store.where import epochs_of_runs
from trainer.data.chat_template import Renderer
from trainer.data.conversation import Conversation
from trainer.data.student_tokens import StudentTokens
from trainer.data.teacher_tokens import TeacherTokens, TokenTable, read_column
from trainer.experiments.pool import PoolPrompt
from trainer.model.generate import Answer
from trainer.onpolicy.groups import Groups, TeacherToken, group, unscored

_COLUMNS_OF_TEACHER = ("outcome", "teacher_id", "request_json", "key", "former_key", "sample_index")
SCORED_COLUMNS = (*_COLUMNS_OF_TEACHER, "logprobs")
# An adopted row does not say the epoch that is part of its key. Those that are known are tried, and these.
_EPOCHS = range(64)


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


@dataclass(frozen=True, slots=True)
class Scored:
    """What the teacher says of a text.

    Attributes:
        tokens: bytes (None where unknown) and log-probability of each.
        listed: the likeliest tokens at each of them; None where none were asked for.
    """

    tokens: tuple[tuple[bytes | None, float | None], ...]
    listed: TeacherTokens | None = None


def known_epochs(store: Path, harvest_table: Mapping[str, Any]) -> tuple[int, ...]:
    """Return the epochs in which a harvest.toml and the runs of its store ask.

    Raises:
        StoreError: the journal can't be read.
    """
    own = int(harvest_table.get("run", {}).get("epoch", 0))
    return tuple(sorted({own, *epochs_of_runs(store).values()}))


def read_scores(
    corpus: Corpus,
    texts: Sequence[TextToScore],
    teacher_id: str,
    table: TokenTable | None = None,
    *,
    epochs: Collection[int] = (),
) -> dict[str, Scored]:
    """Return what a teacher says of these texts in the store, by `TextToScore.asked`.

    Log-probabilities are as shards hold them (float16), sealed or not, so that sealing changes nothing.

    Args:
        teacher_id: of the teacher. A store may hold what others say of the same texts.
        table: takes the teacher's tokens; None: the likeliest tokens are not read. With a table only replies
            to requests for several of them count.
        epochs: of the store, see `known_epochs`.

    Raises:
        StoreError, StoreCorrupt: a shard is missing or damaged.
    """
    wanted = {text.asked for text in texts}
    scores: dict[str, Scored] = {}
    for batch in corpus.batches(SCORED_COLUMNS):
        scored = batch.filter(pc.equal(batch.column("outcome"), Outcome.SCORED.value))
        asked_at: dict[int, str] = {}
        for at, row in enumerate(scored.select(list(_COLUMNS_OF_TEACHER)).to_pylist()):
            if not _is_of_teacher(teacher_id, row, epochs):
                continue
            body = json.loads(row["request_json"])
            asked = _chat_key(body["messages"]) if "messages" in body else body.get("prompt") or body["text"]
            if asked in wanted and (listed_of(body) > 0) == (table is not None):
                asked_at[at] = asked
        column = scored.column("logprobs").take(pa.array(list(asked_at), pa.int64()))
        arrays = [None] * len(column) if table is None else read_column(column, table)
        for asked, entries, array in zip(asked_at.values(), column.to_pylist(), arrays, strict=True):
            tokens = tuple(
                (token["bytes"], None if token["logprob"] is None else float(token["logprob"]))
                for token in entries or ()
            )
            scores[asked] = Scored(tokens, None if array is None else TeacherTokens(*array))
    return scores


def _is_of_teacher(teacher_id: str, row: Mapping[str, Any], epochs: Collection[int]) -> bool:
    """Whether a row is of a teacher, or of an address whose rows its identity has adopted.

    `harvester adopt` changes their keys only: they keep the teacher's id, with the address.
    """
    if row["teacher_id"] == teacher_id:
        return True
    name, _, model = teacher_id.partition("|")
    if not row["former_key"] or row["teacher_id"].partition("|")[2] != model:
        return False
    body = json.loads(row["request_json"])
    endpoint = endpoint_in_key(name, body)
    tried = dict.fromkeys((*epochs, *_EPOCHS))
    keys = (request_key(endpoint, body, row["sample_index"], epoch) for epoch in tried)
    return any(key.hex() == row["key"] for key in keys)


def dollars_of_scores(corpus: Corpus, teacher_id: str, epochs: Collection[int] = ()) -> float | None:
    """Return what a teacher's scored texts in the store cost; None without a price.

    Args:
        epochs: of the store, see `known_epochs`.

    Raises:
        StoreError, StoreCorrupt: a shard is missing or damaged.
    """
    microusd = sum(
        sample.cost_microusd
        for sample in corpus.samples([*_COLUMNS_OF_TEACHER, "cost_microusd"])
        if sample.outcome == Outcome.SCORED.value
        and _is_of_teacher(teacher_id, {name: getattr(sample, name) for name in _COLUMNS_OF_TEACHER}, epochs)
    )
    return microusd / 1e6 if microusd else None


def groups_of(
    answer: Answer, text: TextToScore | None, scored: Scored | None, tokens: StudentTokens
) -> Groups:
    """Return the groups of an answer's tokens, those of its end included."""
    ends = not answer.is_cut
    if text is None or scored is None:
        return unscored(len(answer.ids) + ends)
    part = _in_answer(text, scored)
    inside = [(first + text.skipped, stop + text.skipped, value) for first, stop, value in part.tokens]
    sizes = [len(tokens.data[token]) for token in answer.ids]
    return group(sizes, inside, ends=ends, end_logprob=part.end_logprob if text.is_whole else None)


def listed_of_answer(text: TextToScore, scored: Scored) -> TeacherTokens | None:
    """Return the likeliest tokens at each teacher's token of an answer and at its end; None: none."""
    if scored.listed is None:
        return None
    numbers = _in_answer(text, scored).numbers
    return TeacherTokens(scored.listed.tokens[numbers], scored.listed.log_probs[numbers])


class _Part(NamedTuple):
    """The part of a scored text that is the answer.

    Attributes:
        tokens: the teacher's tokens that lie in the answer.
        numbers: of these among all tokens of the text, and of the first one after them.
        end_logprob: log-probability of its end of the turn; None: it is unknown.
    """

    tokens: list[TeacherToken]
    numbers: list[int]
    end_logprob: float | None


def _in_answer(text: TextToScore, scored: Scored) -> _Part:
    inside: list[TeacherToken] = []
    numbers: list[int] = []
    at = -len(text.before) if text.before is not None else 0
    size = len(text.answer)
    end: list[float | None] = []
    for number, (data, logprob) in enumerate(scored.tokens):
        if at >= size:
            end.append(logprob)
            if len(end) == 1:
                numbers.append(number)
            if text.before is None:
                break  # what the template writes after the end of the turn is not the model's
            continue
        stop = at + len(data or b"")
        if at >= 0 and stop <= size and data:
            inside.append((at, stop, logprob))
            numbers.append(number)
        at = stop
    known = [value for value in end if value is not None]
    return _Part(inside, numbers, float(np.sum(known)) if end and len(known) == len(end) else None)


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
