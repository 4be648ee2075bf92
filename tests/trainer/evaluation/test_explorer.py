"""Test the page of disagreements: its order, the nearest rows, and that texts of others are only text."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trainer import tiny
from trainer.data.conversation import Conversation
from trainer.data.held_out import HeldOut
from trainer.evaluation import explorer, neighbours
from trainer.evaluation.learned_texts import TextsInMemory


def held(number: int, prompt: str, teacher: str | None) -> HeldOut:
    conversation = Conversation(({"role": "user", "content": prompt},))
    return HeldOut(f"h{number}", conversation, None, "all", "held_out", teacher)


def test_the_nearest_texts_are_found_in_any_script():
    texts = [
        "What is the capital of Ghana?",
        "What is the capital of France?",
        "Sort these words: pear, fig",
        "ガーナの首都はどこですか",
    ]
    index = neighbours.TextIndex.of(texts)
    near = index.nearest("Tell me the capital city of Ghana!", 2)
    assert [n.place for n in near] == [0, 1]
    assert 0 < near[1].similarity < near[0].similarity < 1
    assert index.nearest("ガーナの首都", 1)[0].place == 3
    same = index.nearest(texts[2].upper(), 1)[0]
    assert (same.place, same.similarity) == (2, pytest.approx(1.0, abs=1e-5))
    assert index.nearest(texts[2], 1, but=2)[0].place != 2
    assert len(neighbours.TextIndex.of(["", "x"]).nearest("", 2)) == 2


def test_the_page_begins_with_the_largest_disagreement(tmp_path: Path):
    prompts = [
        held(0, "say the word fig", "fig"),
        held(1, "say the word pear", "pear tree"),
        held(2, "say <b>plum</b>", "plum"),
        held(3, "nobody answered", None),
    ]
    answers = {"base": ["", "", "", ""], "student": ["Fig.", "pear", "<script>alert(1)</script>", "x"]}
    train = [tiny.sample(n, f"say the word {word}", word) for n, word in enumerate(("pear", "apple"))]
    assert explorer.disagreements(prompts, answers["student"]) == [
        (1.0, 2),
        (pytest.approx(1 - 2 / 3), 1),
        (0.0, 0),
    ]
    page = explorer.write_page(prompts, answers, TextsInMemory(train), tmp_path / "d.html", "me").read_text()
    assert page.index("<h2>h2</h2>") < page.index("<h2>h1</h2>")
    assert "<h2>h0</h2>" not in page
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    after = page[page.index("<h2>h1</h2>") :]
    assert after.index("p0, similarity") < after.index("p1, similarity")
