"""Test metrics of texts against published implementations' values, and the choice of a comparison."""

from __future__ import annotations

import pytest

from harvester.quality.verifiers.refusals import is_refusal
from harvester.quality.verifiers.verifiers import Candidate
from trainer.console import FEWEST_ANSWERS, text_score_lines
from trainer.data.conversation import Conversation
from trainer.data.held_out import HeldOut
from trainer.evaluation import comparison_choice, intervals, text_metrics, text_scores

# F-measures of rougeL by rouge-score 0.1.2, and chrF2 by sacrebleu 2.6.0.
PUBLISHED = [
    ("the cat sat on the mat", "the cat was on a mat today", 0.615385, 0.3134),
    ("The capital of Ghana is Accra.", "Accra", 0.285714, 0.4214),
    ("a b c d e f g", "g f e d c b a", 0.142857, 0.1667),
    ("police killed the gunman", "the gunman kill police", 0.5, 0.6679),
    ("x", "y", 0.0, 0.0),
]


@pytest.mark.parametrize(("answer", "reference", "rouge_l", "chrf"), PUBLISHED)
def test_rouge_and_chrf_are_those_of_the_published_programs(answer, reference, rouge_l, chrf):
    assert text_metrics.rouge_l(answer, reference) == pytest.approx(rouge_l, abs=1e-6)
    assert text_metrics.chrf(answer, reference) == pytest.approx(chrf, abs=1e-4)


def test_words_are_found_in_any_script():
    assert text_metrics.words("Été, 東京タワー 2x!") == ["été", "東", "京", "タ", "ワ", "ー", "2x"]
    assert text_metrics.token_f1("東京です", "東京") == pytest.approx(2 * 2 / 6)
    assert text_metrics.rouge_l("Москва", "москва") == 1.0


def test_each_metric_applies_to_its_references_only():
    metrics = text_metrics.available_metrics()
    answer = "So the answer is 1,042."
    assert [metrics[name](answer, "$1042") for name in ("exact", "numeric", "choice")] == [0.0, 1.0, None]
    assert [metrics[name]("(B) cats", "B") for name in ("numeric", "choice")] == [None, 1.0]
    assert [metrics[name]("It is Accra.", "Accra") for name in ("normalised", "contains")] == [0.0, 1.0]
    assert metrics["contains"]("yes", "?!") is None


def test_metrics_of_packages_that_are_not_installed_are_left_out_and_named(monkeypatch):
    monkeypatch.setattr(text_metrics, "find_spec", lambda name: None)
    assert {"chrf", "rouge_l"}.isdisjoint(text_metrics.available_metrics())
    assert text_metrics.missing_metrics() == ["sacrebleu", "rapidfuzz"]
    [line] = text_score_lines({"missing_packages": text_metrics.missing_metrics()})
    assert "sacrebleu, rapidfuzz" in line


@pytest.mark.parametrize("count", [1, 3, 12])
def test_means_over_prompts_that_all_give_the_same_claim_no_certainty(count):
    conversation = Conversation(({"role": "user", "content": "where?"},))
    held_out = [HeldOut(f"h{n}", conversation, "Accra", "t", "held_out", "Accra") for n in range(count)]
    texts = {"base": ["Rome"] * count, "student": ["Accra"] * count, "teacher": ["Accra"] * count}
    scored = text_scores.reference_scores(held_out, texts, 100)
    for metrics in (scored["metrics"], scored["tasks"]["t"]["metrics"]):
        assert metrics["exact"]["student"] == intervals.mean_of_points([1.0] * count)
        assert metrics["exact"]["base"] == intervals.mean_of_points([0.0] * count)
        difference = intervals.difference_of_points([1.0] * count, [0.0] * count)
        assert metrics["exact"]["student_minus_base"] == difference
        assert metrics["exact"]["student_minus_teacher"]["low"] < 0


def test_few_prompts_have_the_interval_of_a_share():
    conversation = Conversation(({"role": "user", "content": "where?"},))
    held_out = [HeldOut(f"h{n}", conversation, "a b c d", "t", "held_out", "a b") for n in range(3)]
    texts = {"student": ["a b", "a b c", None]}
    found = text_scores.reference_scores(held_out, texts, 100)["metrics"]["token_f1"]["student"]
    assert found == intervals.mean_of_points([2 / 3, 6 / 7, 0.0])


def test_few_answers_are_said_to_be_too_few():
    assert FEWEST_ANSWERS == intervals.FEW
    few, enough = ({"likelihood": {"answers": n}, "forgetting": {"answers": n}} for n in (9, 10))
    lines = text_score_lines(few)
    assert [line.split(" are too few")[0] for line in lines] == ["9 held-out answers", "9 general answers"]
    assert text_score_lines(enough) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("well, I like cats. I like cats. I like cats. I like cats.", True),
        ("zzzzzzzzzzzzzzzzzzzzzzzzzz", True),
        ("ha ha ha", False),
        ("a list: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13", False),
        ("                                  ", False),
    ],
)
def test_an_endless_answer_repeats_its_end(text, expected):
    assert text_metrics.ends_in_loop(text) is expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I’m sorry, but I can’t help with that.", True),
        ("Es tut mir leid, aber das kann ich nicht beantworten.", True),
        ("Je suis désolé, mais je ne peux pas répondre.", True),
        ("Lo siento, pero no puedo ayudar.", True),
        ("我无法回答这个问题。", True),
        ("申し訳ありませんが、お答えできません。", True),
        ("К сожалению, я не могу помочь.", True),
        ("I'm sorry for the delay; the answer is 4.", False),
        ("The phrase 'I can't help with that' is a refusal.", False),
        ("I can help with that.", False),
    ],
)
def test_refusals_are_found_in_several_languages(text, expected):
    assert is_refusal(text) is expected


def chosen(*pairs: tuple[str, str], task: str = "t") -> dict[str, str]:
    table = comparison_choice.choose(Candidate(a, "ok", r, metadata={"task": task}) for a, r in pairs)
    return {name: section.kind for name, section in table.items()}


def test_the_teachers_answers_choose_the_strictest_comparison_that_fits():
    sentence = [("The capital of Ghana is Accra.", "Accra"), ("It is Rome.", "Rome"), ("No idea.", "Oslo")]
    assert chosen(*sentence) == {"*": "exact", "t": "contains"}
    assert chosen(*[(r, r) for _, r in sentence]) == {"*": "exact", "t": "exact"}
    assert chosen(*[(f" {r.lower()}.", r) for _, r in sentence])["t"] == "normalised"
    assert chosen(("so 12", "12"), ("that is 13.0", "13"))["t"] == "numeric"
    assert chosen(("(B) cats", "B"), ("The answer is C.", "C"))["t"] == "choice"
    # A teacher that is never right says nothing about the comparison.
    assert chosen(("x", "Accra"))["t"] == "exact"
    # One answer in fifty that only a lenient comparison passes does not loosen it for all.
    assert chosen(*[("Rome", "Rome")] * 49, ("It is Oslo.", "Oslo"))["t"] == "exact"
    assert chosen(("It is Rome.", "Rome"), task="") == {"*": "contains"}
