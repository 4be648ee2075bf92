"""Write the prompts of a judge: one for each answer of a corpus, or two for each pair of answers.

`judged_rows` reads what is judged, `harvester.export.verdicts` the replies.

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
from harvester.errors import ConfigError
from harvester.export.verdicts import FIELD, Order, Task, Verdicts, required_section, rubric_id
from harvester.prompts.template import PromptTemplate
from harvester.run.judged_rows import JudgedRow, rows_of
from harvester.store.journal.sqlite import disk_error
from harvester.store.reader import Corpus
from harvester.system import output_path, own_files

# What a file of verdicts begins with.
_VERDICT = b'{"id":'
_REPLY_COLUMNS = ("key", "messages", "completion", "metadata_json", "sample_index")
_JSON = {
    "": '{"score": NUMBER, "reason": "one sentence"}',
    "pair": '{"winner": "A" or "B" or "tie", "reason": "one sentence"}',
}


@dataclass(frozen=True, slots=True)
class Written:
    """What a prompt file of a judge holds.

    Attributes:
        prompts: lines of the file.
        rows: answers, or pairs of them, that are judged.
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
        ConfigError: no `[judge]`, nothing to judge, or a rubric that can't be read.
        PromptError: the rubric can't be filled for a row.
        StoreError: the corpus can't be read, or the file not written.
    """
    section = required_section(config)
    writer = _Writer(section, root)
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
        raise disk_error(error, path) from None
    return Written(prompts, writer.rows, dict(sorted(writer.left_out.items())))


class _Writer:
    """Renders the rubric for each row, and counts the rows."""

    def __init__(self, section: JudgeSection, root: Path) -> None:
        self._section, self._root = section, root
        self._rubric = rubric_id(section, root)
        self._template = PromptTemplate.load(section.rubric_path(root))
        self.rows = 0
        self.left_out: Counter[str] = Counter()

    def lines(self) -> Iterator[dict[str, Any]]:
        """Yield the prompt lines, in the order of the rows. Equal pairs are asked once."""
        asked: set[str] = set()
        for row in rows_of(self._section, self._root):
            if row.left_out:
                self.left_out[row.left_out] += 1
                continue
            self.rows += 1
            if row.key in asked:
                continue
            asked.add(row.key)
            fields = self._fields(row)
            if row.other is None:
                yield self._line(row, "", {**fields, "answer": row.answer})
                continue
            yield self._line(row, "ab", {**fields, "answer_a": row.answer, "answer_b": row.other})
            yield self._line(row, "ba", {**fields, "answer_a": row.other, "answer_b": row.answer})

    def _fields(self, row: JudgedRow) -> dict[str, Any]:
        return {
            "question": row.question,
            "messages": row.messages,
            "reference": row.reference,
            "metadata": row.metadata,
            "mark": row.key[:8],
            "lowest": self._section.lowest,
            "highest": self._section.highest,
        }

    def _line(self, row: JudgedRow, order: Order, fields: Mapping[str, Any]) -> dict[str, Any]:
        task = Task(row.key, order, self._rubric)
        text = self._template.render(fields, f"row {row.id}")
        return {"id": task.prompt_id, "prompt": text, FIELD: task.as_field()}


def check_target(config: HarvestConfig, root: Path, path: Path) -> None:
    """Check, before anything is paid, that verdicts can be written to a file; raises as `write_verdicts`."""
    section = required_section(config)
    for corpus in filter(None, (config.store.path, section.corpus, section.against)):
        output_path.check(path, root / corpus, _VERDICT)
    if section.pairs is not None and path.resolve() == (root / section.pairs).resolve():
        raise ConfigError("holds the pairs that are judged", place=str(path), remedy="name a new file")


def write_verdicts(config: HarvestConfig, root: Path, verdicts: Verdicts, path: Path) -> None:
    """Write a line of JSON for each row: its id and key, and what the judge said of it.

    A line has `score`, or `winner` ("win": the row's own answer won) with `orders`, the winner in each order;
    null without a verdict. `left_out` says why the judge was not asked.

    Raises:
        ConfigError: as `judged_rows.rows_of`; the file can't be written, or another one is there.
        StoreFull: the disk is full.
    """
    section = required_section(config)
    with output_path.replacing(path, root / config.store.path, _VERDICT) as file:
        for row in rows_of(section, root):
            line: dict[str, Any] = {"id": row.id, "sample": row.sample_index, "key": row.key}
            if section.compares:
                line |= {"winner": verdicts.winner(row.key), "orders": verdicts.orders(row.key)}
            else:
                line["score"] = verdicts.score(row.key)
            file.write(orjson.dumps({**line, "left_out": row.left_out or None}) + b"\n")


def _repair_lines(config: HarvestConfig, root: Path, repairs: frozenset[Task]) -> Iterator[dict[str, Any]]:
    """Yield a prompt for each reply without a verdict: the conversation so far, and the form once more."""
    if not repairs:
        return
    for sample in Corpus.open(root / config.store.path).samples(_REPLY_COLUMNS):
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
