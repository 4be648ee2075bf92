"""Test which tokens of a student's answer get the distribution that the teacher lists there."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from harvester.store.shards.schema import COLUMNS
from tests.trainer import tiny
from tests.trainer.onpolicy.test_texts import LLAMA, answer_of, made
from tests.trainer.teacher_logprobs import entry, of_text
from trainer.data.chat_template import Example, Renderer
from trainer.data.student_tokens import StudentTokens
from trainer.data.teacher_tokens import TeacherTokens, TokenTable, read_column
from trainer.onpolicy.distributions import with_distributions
from trainer.onpolicy.groups import divergence, log_ratios
from trainer.onpolicy.texts import Scored, TeacherTemplate, groups_of

LOGPROBS = next(kind for name, kind, *_ in COLUMNS if name == "logprobs")
PROMPT_IDS = [3, 4, 5]


@pytest.fixture(scope="module")
def student():
    return Renderer(tiny.tokenizer())


@pytest.fixture(scope="module")
def template():
    return TeacherTemplate(Renderer(tiny.tokenizer(LLAMA, eos="</s>")))


def example_of(student, answer):
    end = [] if answer.is_cut else [student.chat_shape.stop_id]
    ids = np.array([*PROMPT_IDS, *answer.ids, *end], dtype=np.int32)
    return Example(ids, len(PROMPT_IDS), not answer.is_cut)


def scored_of(entries, table):
    """What is read of a row of the store with these entries."""
    [arrays] = read_column(pa.array([entries], LOGPROBS), table)
    tokens = tuple((e["bytes"], e["logprob"]) for e in entries)
    return Scored(tokens, TeacherTokens(*arrays))


def distributed(student, template, answer, entries):
    """The example with its distributions, and its groups."""
    table, text = TokenTable(), made(student, template, answer)
    scored = scored_of([entry(text.before, None), *entries], table)
    groups = groups_of(answer, text, scored, StudentTokens(student))
    example = example_of(student, answer)
    [result] = with_distributions([example], [text], [scored], [groups], table, student)
    return result, groups


def test_every_token_gets_the_listed_tokens_where_the_tokenizers_are_equal(student, template):
    answer = answer_of(student, "it is ü and more")
    entries = of_text(student.tokenizer, "it is ü and more", k=4)
    ends = [*entries, entry(b"</s>", -0.25, [(b"</s>", -0.25), (b"it", -2.0)])]
    example, groups = distributed(student, template, answer, ends)
    assert groups.scored == example.supervised
    assert example.soft.positions.tolist() == list(range(example.supervised))
    bytes_of = StudentTokens(student).data
    for ids, log_probs, listed in zip(example.soft.ids, example.soft.log_probs, entries, strict=False):
        mapped = {bytes_of[i]: p for i, p in zip(ids, log_probs, strict=True) if np.isfinite(p)}
        expected = {t["bytes"]: np.float16(t["logprob"]) for t in listed["top"]}
        assert mapped == pytest.approx(expected)
    assert example.soft.ids[-1, 0] == student.chat_shape.stop_id  # by its role, and the likeliest
    assert example.soft.log_probs[-1, 0] == pytest.approx(-0.25)


def test_a_token_that_the_teacher_cuts_otherwise_keeps_its_single_score(student, template):
    answer = answer_of(student, "it is", is_cut=True)
    assert len(answer.ids) >= 2
    together = entry(b"it is", -3.0, [(b"it is", -3.0), (b"no", -1.0)])
    example, groups = distributed(student, template, answer, [together])
    assert groups.scored == len(answer.ids)  # one group of all
    assert example.soft is None


def test_a_row_without_lists_has_none(student, template):
    answer = answer_of(student, "it is", is_cut=True)
    table, text = TokenTable(), made(student, template, answer)
    scored = Scored(((text.before, None), (b"it is", -3.0)))
    groups = groups_of(answer, text, scored, StudentTokens(student))
    example = example_of(student, answer)
    given = with_distributions([example, example], [text, None], [scored, None], [groups] * 2, table, student)
    assert [each.soft for each in given] == [None, None]


def test_the_divergence_of_a_list_replaces_the_log_ratio_of_its_token(student, template):
    answer = answer_of(student, "it is", is_cut=True)
    _, groups = distributed(student, template, answer, of_text(student.tokenizer, "it is", k=2))
    mine = np.full(len(groups.of_token), -0.5, dtype=np.float32)
    unknown = np.full_like(mine, np.nan)
    assert divergence(groups, mine, unknown) == pytest.approx(log_ratios(groups, mine).sum())
    known = unknown.copy()
    known[0] = 0.75
    expected = log_ratios(groups, mine)[1:].sum() + 0.75
    assert divergence(groups, mine, known) == pytest.approx(expected)
