"""Write the prompts of a judge: one for each answer of a corpus, or two for each pair of answers.

The file lies beside the judge's store, which `[judge]` in its configuration makes the only prompts of that
harvest. So `plan`, `run`, `status` and every other command work for a judge as for any teacher, and what was
asked is never asked again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from harvester.config.config import HarvestConfig
from harvester.config.judge_section import JudgeSection
from harvester.errors import ConfigError, StoreError
from harvester.export.verdicts import FIELD, Order, Task, required_section, rubric_id
from harvester.prompts.template import PromptTemplate
from harvester.store.reader import Corpus, holds_answers
from harvester.store.shards.schema import Sample
from harvester.system import own_files

_COLUMNS = (
    *("key", "prompt_id", "sample_index", "messages"),
    *("completion", "outcome", "reference", "metadata_json"),
)
_JSON = {
    "": '{"score": NUMBER, "reason": "one sentence"}',
    "pair": '{"winner": "A" or "B" or "tie", "reason": "one sentence"}',
}


@dataclass(frozen=True, slots=True)
class Written:
    """What a prompt file of a judge holds.

    Attributes:
        prompts: lines of the file.
        rows: answers that are judged.
        left_out: answers that are not, by reason.
    """

    prompts: int
    rows: int
    left_out: Mapping[str, int]


def write_prompts(config: HarvestConfig, root: Path, repairs: frozenset[Task] = frozenset()) -> Written:
    """Write the prompt file of a judge.

    Args:
        repairs: tasks whose reply named no verdict; each is followed by a prompt that asks for JSON.

    Raises:
        ConfigError: no `[judge]`, no corpus, or a rubric that can't be read.
        PromptError: the rubric can't be filled for a row.
        StoreError: the corpus can't be read, or the file not written.
    """
    section = required_section(config)
    writer = _Writer(section, root, rubric_id(section, root))
    path = root / config.prompts.files[0]
    prompts = 0
    try:
        with own_files.replacing(path) as file:
            for line in writer.lines():
                file.write(orjson.dumps(line) + b"\n")
                prompts += 1
            for line in _repair_lines(config, root, repairs):
                file.write(orjson.dumps(line) + b"\n")
                prompts += 1
    except OSError as error:
        raise StoreError(f"can't be written: {error.strerror}", place=str(path)) from None
    return Written(prompts, writer.rows, dict(sorted(writer.left_out.items())))


class _Writer:
    """Renders the rubric for each row, and counts the rows."""

    def __init__(self, section: JudgeSection, root: Path, rubric: str) -> None:
        self._section, self._rubric = section, rubric
        self._template = PromptTemplate.load(section.rubric_path(root))
        self._corpus = _opened(root / section.corpus, "judge.corpus")
        self._others = {} if section.against is None else _answers(root / section.against)
        self.rows = 0
        self.left_out: Counter[str] = Counter()

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the prompt lines, in the order of the corpus."""
        for sample in self._corpus.samples(_COLUMNS):
            if sample.outcome != "ok" or not (sample.completion or "").strip():
                self.left_out[f"outcome_{sample.outcome}" if sample.outcome != "ok" else "blank"] += 1
                continue
            fields = self._fields(sample)
            if self._section.against is None:
                self.rows += 1
                yield self._line(sample, "", {**fields, "answer": sample.completion})
                continue
            other = self._others.get((sample.prompt_id, sample.sample_index))
            if other is None or other == sample.completion:
                self.left_out["no_other_answer" if other is None else "equal_answers"] += 1
                continue
            self.rows += 1
            yield self._line(sample, "ab", {**fields, "answer_a": sample.completion, "answer_b": other})
            yield self._line(sample, "ba", {**fields, "answer_a": other, "answer_b": sample.completion})

    def _fields(self, sample: Sample) -> dict[str, Any]:
        return {
            "question": conversation_text(sample),
            "messages": sample.messages,
            "reference": sample.reference,
            "metadata": sample.metadata,
            "mark": sample.key[:8],
            "lowest": self._section.lowest,
            "highest": self._section.highest,
        }

    def _line(self, sample: Sample, order: Order, fields: Mapping[str, Any]) -> dict[str, Any]:
        task = Task(sample.key, order, self._rubric)
        text = self._template.render(fields, f"row {sample.prompt_id}")
        return {"id": task.prompt_id, "prompt": text, FIELD: task.as_field()}


def conversation_text(sample: Sample) -> str:
    """Return what was asked: a lone user's text as it is, else every turn under its role."""
    turns = [(str(turn.get("role")), str(turn.get("content") or "")) for turn in sample.messages]
    if len(turns) == 1:
        return turns[0][1]
    return "\n\n".join(f"[{role}]\n{text}" for role, text in turns)


def _opened(folder: Path, key: str) -> Corpus:
    if not holds_answers(folder):
        raise ConfigError(
            f"no answers are stored in {folder}",
            place=key,
            remedy="name a folder that holds journal.db or shards/, relative to the configuration",
        )
    return Corpus.open(folder)


def _answers(folder: Path) -> dict[tuple[str, int], str]:
    """Return the complete answers of a corpus by prompt and sample; in memory, as a whole."""
    columns = ("prompt_id", "sample_index", "completion", "outcome")
    return {
        (sample.prompt_id, sample.sample_index): sample.completion
        for sample in _opened(folder, "judge.against").samples(columns)
        if sample.outcome == "ok" and sample.completion
    }


def _repair_lines(config: HarvestConfig, root: Path, repairs: frozenset[Task]) -> Iterator[dict[str, Any]]:
    """Yield a prompt for each reply without a verdict: the conversation so far, and the form once more."""
    if not repairs:
        return
    for sample in Corpus.open(root / config.store.path).samples(_COLUMNS):
        task = Task.of(sample)
        if task is None or task not in repairs:
            continue
        repair = Task(task.row, task.order, task.rubric, is_repair=True)
        form = _JSON["pair" if task.order else ""]
        asked = f"Your reply names no verdict. Reply with JSON alone: {form}"
        turns = [*sample.messages, {"role": "assistant", "content": sample.completion or "(nothing)"}]
        yield {
            "id": repair.prompt_id,
            "messages": [*turns, {"role": "user", "content": asked}],
            FIELD: repair.as_field(),
        }
