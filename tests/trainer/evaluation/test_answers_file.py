"""Test what reads answers.jsonl again: the judge and the scores of GGUF files, without holding it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.peak_memory import most_held
from tests.trainer import tiny
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from trainer import config as settings
from trainer.data.chat_template import Renderer
from trainer.evaluation import answers_file, gguf_scores, preferences
from trainer.evaluation.answers_file import WrittenAnswers
from trainer.model import model


def row(number: int, student: str = "yes", teacher: str | None = "no") -> dict[str, object]:
    """A line as `trainer evaluate` writes it."""
    return {
        "prompt_id": f"p{number}",
        "task": "all",
        "tags": [],
        "split": "held_out",
        "messages": [{"role": "user", "content": f"backwards: {number}"}],
        "reference": None,
        "base": "",
        "student": student,
        "teacher": teacher,
        "base_cut": False,
        "student_cut": False,
    }


def test_what_is_read_is_what_was_written_whatever_the_texts_hold(tmp_path):
    texts = ["plain", "line\u2028separator\x85next\x1crecord", "two\nlines\r\n", "", "é😀"]
    rows = [row(number, text) for number, text in enumerate(texts)]
    answers_file.write(tmp_path, rows)
    assert list(WrittenAnswers(tmp_path)) == rows
    assert WrittenAnswers(tmp_path)[-1] == rows[-1]
    assert WrittenAnswers(tmp_path)[1:3] == rows[1:3]
    assert list(WrittenAnswers(tmp_path / "none")) == []


def test_answers_with_line_separators_are_those_of_the_evaluation(tmp_path):
    rows = tiny.skill(4, held_out=2)
    config = settings.load(tiny.train_toml(tmp_path, rows))
    written = [row(0, "a\u2028b") | {"prompt_id": "p4"}, row(1, "c") | {"prompt_id": "p5"}]
    answers_file.write(config.out_path, written)
    (config.out_path / "scorecard.json").write_text('{"cut": {"max_new_tokens": 7}}')
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    answered, limit = gguf_scores._answered(config, None, renderer)
    assert [prompt.student for prompt in answered] == ["a\u2028b", "c"]
    assert [prompt.held.prompt_id for prompt in answered] == ["p4", "p5"]
    assert limit == 7


def test_the_pairs_of_a_large_file_are_made_without_holding_it(tmp_path):
    count, text = 400, "word " * 20_000
    answers_file.write(tmp_path, (row(number, text) for number in range(count)))
    size = (tmp_path / answers_file.FILE).stat().st_size
    assert size > 40_000_000

    def pairs() -> int:
        rows = WrittenAnswers(tmp_path)
        chosen = preferences._chosen(rows, "held_out", 0)
        return sum(len(json.dumps(line)) for line in preferences._lines(rows, chosen))

    assert pairs() > 40_000_000
    assert most_held(pairs) < size / 20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt_id": "p1", "split"', "is no line of JSON: the file is damaged"),
        ("[1, 2]", "is no JSON object"),
        (
            '{"prompt_id": "p1", "task": "all", "tags": [], "split": "x"}',
            "earlier version, without 'messages'",
        ),
        ('{"a": "\udcff"}', "is no line of JSON"),
    ],
)
def test_a_damaged_file_is_named_with_the_line(tmp_path, run_trainer, text, words):  # noqa: F811
    toml = tiny.train_toml(tmp_path, tiny.skill(4), evaluate={"judge": "judge.toml"})
    write_judge(tmp_path)
    out = tmp_path / "out"
    answers_file.write(out, [row(0)])
    (out / "scorecard.json").write_text("{}")
    with (out / answers_file.FILE).open("ab") as file:
        file.write(text.encode("utf-8", "surrogateescape"))
    code, _, err = run_trainer("evaluate", toml, "--judge-only")
    assert code == 2
    assert words in err
    assert "answer 2" in err
    assert "run `trainer evaluate` again" in err


def write_judge(folder: Path) -> None:
    """A judge that nobody asks."""
    (folder / "judge.toml").write_text(
        '[teacher]\nbase_url = "http://127.0.0.1:9/v1"\nmodel = "mock-teacher"\nterms = "mock-teacher"\n'
        '[store]\npath = "judged"\n'
    )
