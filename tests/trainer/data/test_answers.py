"""Test which of a prompt's answers are learned, and how much each counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.quality.verifiers.settings import VerifierSection
from harvester.quality.verifiers.verifiers import Verifiers
from tests.trainer import tiny
from trainer import config as settings
from trainer.config import DataSection
from trainer.data import dataset
from trainer.data.answers import agreement, choose
from trainer.errors import DataError
from trainer.training.inputs import read_inputs

EXACT = Verifiers({"*": VerifierSection(kind="exact")}, Path())
ANSWERS = st.lists(st.tuples(st.integers(0, 3), st.sampled_from(["4", "4 ", "5", "6"])), max_size=12)


def chosen(pairs: list[tuple[int, str]], **data: Any) -> tuple[list[tuple[str, int, str]], list[float]]:
    """Choose among answers to prompts by number, whose reference is 4; return what is learned."""
    rows = [
        tiny.sample(n, f"prompt {prompt}", text, reference="4", sample_index=n)
        for n, (prompt, text) in enumerate(pairs)
    ]
    section = DataSection(corpus="c", **data)
    result = choose(rows, [dataset.prompt_key(row.messages) for row in rows], section, EXACT)
    assert len(result.samples) + sum(result.excluded.values()) == len(rows), "every row is accounted for"
    weights = list(result.weights) or [1.0] * len(result.samples)
    assert all(weight > 0 for weight in weights)
    return [
        (row.messages[0]["content"], row.sample_index, row.completion or "") for row in result.samples
    ], weights


def by_prompt(learned: list[tuple[str, int, str]], weights: list[float]) -> dict[str, list[float]]:
    result: dict[str, list[float]] = {}
    for (prompt, _, _), weight in zip(learned, weights, strict=True):
        result.setdefault(prompt, []).append(weight)
    return result


@given(ANSWERS, st.sampled_from(["all", "best", "verified", "majority"]), st.integers(1, 4))
def test_no_prompt_has_more_rows_than_the_cap_and_rows_keep_their_order(
    answers: list[tuple[int, str]], how: str, cap: int
):
    learned, weights = chosen(answers, answers=how, per_prompt=cap, weights="prompt")
    assert [number for _, number, _ in learned] == sorted(number for _, number, _ in learned)
    for of_prompt in by_prompt(learned, weights).values():
        assert len(of_prompt) <= cap
        assert sum(of_prompt) == pytest.approx(1.0), "each prompt counts alike"


@given(ANSWERS)
def test_verified_rows_are_those_that_pass(answers: list[tuple[int, str]]):
    learned, weights = chosen(answers, answers="verified")
    assert [number for _, number, _ in learned] == [
        n for n, (_, text) in enumerate(answers) if text.strip() == "4"
    ]
    assert set(weights) <= {1.0}


@given(ANSWERS)
def test_the_best_row_passes_if_any_does(answers: list[tuple[int, str]]):
    learned, _ = chosen(answers, answers="best")
    assert len(learned) == len({prompt for prompt, _ in answers})
    for prompt, _, text in learned:
        texts = [other.strip() for number, other in answers if f"prompt {number}" == prompt]
        assert (text.strip() == "4") == ("4" in texts)


def test_without_a_verdict_the_best_row_is_the_one_that_most_agree_with():
    learned, _ = chosen([(0, "5"), (0, "6"), (0, "6")], answers="best")
    assert learned == [("prompt 0", 1, "6")]


def test_the_majority_is_learned_with_the_weight_of_its_share():
    learned, weights = chosen([(0, "5"), (0, "6"), (0, "5.")], answers="majority", weights="agreement")
    assert [text for _, _, text in learned] == ["5", "5."]
    assert weights == pytest.approx([2 / 3, 2 / 3])
    learned, weights = chosen([(0, "5"), (0, "6"), (0, "5.")], weights="agreement")
    assert weights == pytest.approx([2 / 3, 1 / 3, 2 / 3])


@given(st.lists(st.sampled_from(["a", "A", "b", ""]), min_size=1, max_size=9))
def test_agreement_is_a_share_that_the_order_does_not_change(texts: list[str]):
    shares = agreement(texts)
    assert sum(1 / (share * len(texts)) for share in shares) == pytest.approx(len(set(map(str.lower, texts))))
    assert agreement(texts[::-1]) == shares[::-1]


def test_a_corpus_is_read_with_its_weights_and_they_are_part_of_its_hash(tmp_path: Path):
    rows = [
        tiny.sample(n, "backwards: abcd", text, prompt_id="p", sample_index=n, reference="dcba")
        for n, text in enumerate(["dcba", "dcba", "abcd"])
    ]
    rows += tiny.skill(7)[3:]
    toml = tiny.train_toml(tmp_path, rows, data={"eval_share": 0.0})
    plain = dataset.read(settings.load(toml))
    assert (len(plain.train), plain.weights) == (7, ())
    toml.write_text(
        toml.read_text().replace(
            'corpus = "store"', 'corpus = "store"\nanswers = "verified"\nweights = "prompt"'
        )
        + '[verify.reverse]\nkind = "exact"\n[verify."*"]\nkind = "exact"\n'
    )
    config = settings.load(toml)
    read = dataset.read(config)
    assert read.weights == (0.5, 0.5, 1.0, 1.0, 1.0, 1.0)
    assert read.excluded["verification: failed"] == 1


@pytest.mark.parametrize("stored", [False, True])
def test_prompts_count_alike_where_some_of_their_answers_are_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: bool
):
    if stored:
        monkeypatch.setattr(dataset, "STORED_ROWS", 1)
    texts = ["dcba", "x" * 400, "y" * 400, "abcd"]
    rows = [
        tiny.sample(n, "backwards: abcd", text, prompt_id="p", sample_index=n, reference="dcba")
        for n, text in enumerate(texts)
    ]
    rows += tiny.skill(7)[4:]
    toml = tiny.train_toml(tmp_path, rows, data={"eval_share": 0.0, "weights": "prompt"})
    inputs = read_inputs(settings.load(toml), rehearses=False)
    assert inputs.dataset.excluded["too long"] == 2
    assert sorted(example.weight for example in inputs.dataset.examples) == [0.5, 0.5, 1.0, 1.0, 1.0]


def test_verified_answers_need_a_verifier(tmp_path: Path):
    toml = tiny.train_toml(tmp_path, tiny.skill(2), data={"answers": "verified"})
    with pytest.raises(settings.ConfigError, match=r"needs a table \[verify"):
        settings.load(toml)


def test_rows_that_mix_settings_are_named_and_chosen(tmp_path: Path):
    rows = tiny.skill(6)
    brief = {"role": "system", "content": "Be brief."}
    rows = [replace(row, messages=[brief, *row.messages]) if n % 2 else row for n, row in enumerate(rows)]
    toml = tiny.train_toml(tmp_path, rows, data={"eval_share": 0.0})
    read = dataset.read(settings.load(toml))
    assert len(read.train) == 6
    assert ["2 system prompts: none (3 rows); Be brief. (3 rows)" in note for note in read.mixed] == [True]
    plain = toml.read_text()
    toml.write_text(plain.replace('corpus = "store"', 'corpus = "store"\nwhere = {system = "Be brief."}'))
    read = dataset.read(settings.load(toml))
    assert (len(read.train), read.mixed, read.excluded["not chosen by where"]) == (3, (), 3)
    toml.write_text(plain.replace('corpus = "store"', 'corpus = "store"\nwhere = \'model = "c"\''))
    with pytest.raises(DataError, match="chooses none of 6 rows"):
        dataset.read(settings.load(toml))
    toml.write_text(plain.replace('corpus = "store"', "corpus = \"store\"\nwhere = 'modell = 1'"))
    with pytest.raises(settings.ConfigError, match="unknown field 'modell'"):
        settings.load(toml)
