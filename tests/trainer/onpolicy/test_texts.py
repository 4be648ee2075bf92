"""Test the texts that are sent for a student's answers, and how the teacher's tokens are found in them."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from harvester.api.request_key import request_key
from harvester.api.scoring.request_forms import endpoint_in_key
from harvester.quality.verifiers.verifiers import Candidate
from harvester.store.journal.journal import Journal
from harvester.store.reader import Corpus
from tests.harvester.store_rows import run_record
from tests.trainer import teacher_logprobs, tiny
from trainer.data.chat_template import Renderer
from trainer.data.student_tokens import StudentTokens
from trainer.data.teacher_tokens import TokenTable
from trainer.experiments.pool import PoolPrompt
from trainer.model.generate import Answer
from trainer.onpolicy import report
from trainer.onpolicy.groups import UNSCORED
from trainer.onpolicy.rounds import OnPolicy
from trainer.onpolicy.texts import (
    Scored,
    TeacherTemplate,
    dollars_of_scores,
    groups_of,
    read_scores,
    text_to_score,
)

LLAMA = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
PROMPT = PoolPrompt("k", "", ({"role": "user", "content": "say ü"},), Candidate(None, "missing"))


@pytest.fixture(scope="module")
def student():
    return Renderer(tiny.tokenizer())


@pytest.fixture(scope="module")
def template():
    return TeacherTemplate(Renderer(tiny.tokenizer(LLAMA, eos="</s>")))


def answer_of(student, text, *, is_cut=False):
    return Answer(tuple(student.texts([text])[0]), is_cut)


def made(student, template, answer):
    return text_to_score(PROMPT, answer, StudentTokens(student), "", template, "n")


def test_an_answer_is_rendered_in_the_teachers_own_template(student, template):
    text = made(student, template, answer_of(student, "it is ü"))
    assert text.line["text"] == "<s>user: say ü</s><s>assistant: it is ü</s>"
    assert text.line["messages"][-1] == {"role": "assistant", "content": "it is ü"}
    assert "open" not in text.line


def test_a_cut_answer_is_left_open_and_its_end_is_not_scored(student, template):
    answer = answer_of(student, "it is", is_cut=True)
    text = made(student, template, answer)
    assert text.line["text"].endswith("assistant: it is")
    assert text.line["open"] is True
    scored = [(b"<s>user: say \xc3\xbc</s><s>assistant: ", None), (b"it", -1.0), (b" is", -2.0)]
    groups = groups_of(answer, text, Scored(tuple(scored)), StudentTokens(student))
    assert groups.scored == len(groups.of_token) == len(answer.ids)


def test_an_answer_that_breaks_off_inside_a_character_is_scored_up_to_it(student, template):
    whole = answer_of(student, "aü").ids
    answer = Answer(whole[:-1], True)
    text = made(student, template, answer)
    assert text.answer == b"a"
    groups = groups_of(answer, text, Scored(((text.before, None), (b"a", -1.0))), StudentTokens(student))
    assert groups.of_token.tolist()[0] == 0
    assert groups.of_token.tolist()[-1] == UNSCORED


def test_the_end_of_a_turn_is_compared_by_its_role(student, template):
    answer = answer_of(student, "hi")
    text = made(student, template, answer)
    scored = ((text.before, None), (b"hi", -1.0), (b"</s>", -0.125))
    groups = groups_of(answer, text, Scored(scored), StudentTokens(student))
    assert groups.teacher.tolist() == [-1.0, -0.125]
    assert groups.of_token.tolist()[-1] == 1


def test_a_token_across_the_beginning_of_the_answer_scores_nothing_before_the_next_cut(student, template):
    answer = answer_of(student, "hi you", is_cut=True)
    text = made(student, template, answer)
    scored = ((text.before[:-1], None), (text.before[-1:] + b"hi", -9.0), (b" you", -1.0))
    groups = groups_of(answer, text, Scored(scored), StudentTokens(student))
    assert groups.teacher.tolist() == [-1.0]


def test_without_the_teachers_template_the_server_renders(student):
    template = TeacherTemplate(None)
    answer = answer_of(student, "hi")
    text = made(student, template, answer)
    assert "text" not in text.line
    groups = groups_of(
        answer, text, Scored(((b"hi", -1.0), (b"<end>", -0.5), (b"\n", -7.0))), StudentTokens(student)
    )
    assert groups.teacher.tolist() == [-1.0, -0.5]  # what follows the end is the template's
    assert made(student, template, Answer((), False)) is None


def test_an_empty_answer_is_scored_by_its_end(student, template):
    text = made(student, template, Answer((), False))
    groups = groups_of(
        Answer((), False), text, Scored(((text.before, None), (b"</s>", -3.0))), StudentTokens(student)
    )
    assert groups.teacher.tolist() == [-3.0]


@pytest.mark.parametrize("listed", [0, 5])
def test_scores_of_another_teacher_in_the_store_are_not_taken(student, template, tmp_path, listed):
    """As where a second teacher is tried: at first it scores the same answers."""
    text = made(student, template, answer_of(student, "hi"))
    request = json.dumps({"prompt": text.asked, "prompt_logprobs": listed})
    corpus = tiny.corpus(
        tmp_path,
        [
            tiny.sample(
                number,
                "",
                None,
                outcome="scored",
                teacher_id=teacher,
                request_json=request,
                logprobs=[teacher_logprobs.entry(b"hi", -number, [(b"hi", -number)] * bool(listed))],
                cost_microusd=number * 1000,
            )
            for number, teacher in enumerate(["http://a/v1|m", "http://b/v1|m", "http://c/v1|m"], 1)
        ],
    )
    for number, teacher in ((1, "http://a/v1|m"), (2, "http://b/v1|m")):
        table = TokenTable() if listed else None
        scores = read_scores(Corpus.open(corpus), [text], teacher, table)
        assert scores[text.asked].tokens == ((b"hi", -float(number)),)
        if listed:
            assert scores[text.asked].listed.log_probs.tolist() == [[-float(number)] * 2]
        assert dollars_of_scores(Corpus.open(corpus), teacher) == pytest.approx(number / 1000)
    assert read_scores(Corpus.open(corpus), [text], "http://d/v1|m", None) == {}
    assert dollars_of_scores(Corpus.open(corpus), "http://d/v1|m") is None


def test_scores_that_an_identity_adopted_are_the_teachers(student, template, tmp_path):
    """`harvester adopt` gives rows the key of the identity; their teacher's id still has the address."""
    text = made(student, template, answer_of(student, "hi"))
    corpora = {}
    for model in ("m", "other"):
        body = {"model": model, "prompt": text.asked, "prompt_logprobs": 0}
        row = tiny.sample(
            1,
            "",
            None,
            outcome="scored",
            key=request_key(endpoint_in_key("llama", body), body, 0, epoch=2).hex(),
            former_key="0" * 64,
            teacher_id=f"http://a/v1|{model}",
            request_json=json.dumps(body),
            logprobs=[teacher_logprobs.entry(b"hi", -1.0, [])],
            cost_microusd=1000,
        )
        corpora[model] = Corpus.open(tiny.corpus(tmp_path / model, [row]))
    assert read_scores(corpora["m"], [text], "llama|m")[text.asked].tokens == ((b"hi", -1.0),)
    assert dollars_of_scores(corpora["m"], "llama|m") == pytest.approx(0.001)
    for model, other in (("m", "http://b/v1|m"), ("m", "qwen|m"), ("other", "llama|m")):
        assert read_scores(corpora[model], [text], other) == {}
        assert dollars_of_scores(corpora[model], other) is None


@pytest.mark.parametrize("epoch", [0, 63, 64, 20261130])
@pytest.mark.parametrize("known_by", ["harvest.toml", "a run"])
def test_adopted_scores_of_any_known_epoch_are_found(student, template, tmp_path, epoch, known_by):
    """`adopt` knows the epoch by the run, and the harvest asks for no text that the store holds."""
    text = made(student, template, answer_of(student, "hi"))
    body = {"model": "m", "prompt": text.asked, "prompt_logprobs": 0}
    row = tiny.sample(
        1,
        "",
        None,
        outcome="scored",
        key=request_key(endpoint_in_key("llama", body), body, 0, epoch=epoch).hex(),
        former_key="0" * 64,
        teacher_id="http://a/v1|m",
        request_json=json.dumps(body),
        logprobs=[teacher_logprobs.entry(b"hi", -1.0, [])],
        cost_microusd=1000,
    )
    store = tiny.corpus(tmp_path / "store", [row])
    corpus = Corpus.open(store)  # with a journal it would read the rows that this one sealed
    table = {"run": {"epoch": epoch}}
    if known_by == "a run":
        with Journal.open(store) as journal:
            journal.begin_run(run_record(config_json=json.dumps(table)))
        table = {}
    files = SimpleNamespace(train=SimpleNamespace(corpus=store), harvest_table=table)
    epochs = OnPolicy._epochs(SimpleNamespace(_files=files))
    assert list(read_scores(corpus, [text], "llama|m", epochs=epochs)) == [text.asked]
    assert dollars_of_scores(corpus, "llama|m", epochs) == pytest.approx(0.001)
    assert read_scores(corpus, [text], "qwen|m", epochs=epochs) == {}
    assert bool(read_scores(corpus, [text], "llama|m")) is (epoch < 64)


def test_the_report_names_both_kinds_of_answers_without_an_end():
    measured = {"answers": 4, "cut": 2, "tokens": 9, "scored_tokens": 9, "clipped": 0}
    result = {"held_out": [measured], "held_out_prompts": 100, "rounds": [], "left_out": 0}
    [line] = [note for note in report.notes(result) if "cut" in note]
    assert line.startswith("2 of 4 of them have no end of turn")
    assert "at max_new_tokens or after a token at which servers end" in line


def test_prompts_with_the_teachers_special_tokens_are_left_out(template):
    assert template.knows(PROMPT)
    special = PoolPrompt("k", "", ({"role": "user", "content": "what is </s>?"},), Candidate(None, "missing"))
    assert not template.knows(special)


def test_an_answer_without_scores_counts_nowhere(student, template):
    answer = answer_of(student, "hi")
    assert groups_of(answer, None, None, StudentTokens(student)).scored == 0
    assert groups_of(answer, made(student, template, answer), None, StudentTokens(student)).scored == 0
