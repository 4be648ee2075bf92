"""Test the rules of Gopher, C4 and FineWeb with texts that lie just inside and just outside each limit."""

from __future__ import annotations

import math

import pytest

from harvester.errors import ConfigError
from harvester.export import filters, quality_rules
from harvester.export.drops import Drop
from tests.harvester.export.test_more_filters import reason, sample

# Sixty different words, five characters on average, two of the common ones among them.
WORDS = ["the", "with", *(f"w{n:02}{'abcdef'[n % 6] * (1 + n % 5)}" for n in range(58))]
PLAIN = " ".join(WORDS)


def broken(name: str, text: str) -> set[str]:
    """Return the rules that a text breaks at the published thresholds."""
    rule_set = quality_rules.RULE_SETS[name]
    found = {rule for rule, _ in rule_set.rules(text, rule_set.limits)}
    assert found <= set(rule_set.names)
    return found


def words(count: int, length: int = 5) -> str:
    """Return so many different words of a length, with two common ones."""
    return " ".join(["the", "with", *(f"{n:x}".rjust(length, "x") for n in range(count - 2))])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (PLAIN, set()),
        (words(50), set()),
        (words(49), {"too_few_words"}),
        (words(100_001), {"too_many_words"}),
        ("of to " * 30, {"short_words"}),
        (words(60, 11), {"long_words"}),
        # Sixty words: six symbols are a tenth, seven are more.
        (PLAIN + "#" * 6, set()),
        (PLAIN + "#" * 7, {"hashes"}),
        (PLAIN.replace(" ", "... ", 6), set()),
        (PLAIN.replace(" ", "… ", 7), {"ellipses"}),
        # Ten lines: nine with a bullet are 90 %, ten are more.
        ("\n".join(["- " * (n > 0) + words(50) for n in range(10)]), set()),
        ("\n".join(["• " + words(50) for _ in range(10)]), {"bullet_lines"}),
        ("\n".join([words(50) + "..." * (n < 3) for n in range(10)]), set()),
        ("\n".join([words(50) + "..." * (n < 4) for n in range(10)]), {"ellipsis_lines"}),
        # Fifteen numbers beside sixty words: 80 % have a letter.
        (PLAIN + " 12345" * 15, set()),
        (PLAIN + " 12345" * 16, {"no_letters"}),
        (PLAIN.replace("with", "xxxx"), {"no_stop_words"}),
        (PLAIN.replace("with", "Have."), set()),
        ("", {"too_few_words"}),
    ],
)
def test_gopher_quality_at_its_limits(text: str, expected: set[str]) -> None:
    assert broken("gopher_quality", text) == expected


def test_gopher_repetition_counts_lines_and_paragraphs() -> None:
    lines = [f"{n}{words(20)}"[:40] for n in range(10)]
    assert not broken("gopher_repetition", "\n".join(dict.fromkeys(lines))) & {"repeated_lines"}
    # Three of ten repeat an earlier one: 30 % of the lines, and with the line breaks less of the text.
    three = [*lines[:7], *lines[:3]]
    assert "repeated_lines" not in broken("gopher_repetition", "\n".join(three))
    assert "characters_in_repeated_lines" in broken("gopher_repetition", "\n".join(three))
    four = [*lines[:6], *lines[:4]]
    assert {"repeated_lines", "characters_in_repeated_lines"} <= broken("gopher_repetition", "\n".join(four))
    paragraphs = broken("gopher_repetition", "\n\n".join(four))
    assert {"repeated_paragraphs", "characters_in_repeated_paragraphs"} <= paragraphs


@pytest.mark.parametrize(("length", "share"), [(2, 0.20), (3, 0.18), (4, 0.16)])
def test_gopher_repetition_measures_the_commonest_run(length: int, share: float) -> None:
    """A run of words stands five times, between others that occur once."""
    run = " ".join(f"run{n}" for n in range(length))
    at_limit = math.ceil(5 * len(run) / share)  # characters of a text of which five runs are the share
    for characters, is_broken in ((at_limit, False), (at_limit - 2, True)):
        text = " ".join(f"{run} {n:x}" for n in range(5))
        text = f"{text} {'z' * (characters - len(text) - 1)}"
        assert len(text) == characters
        assert (f"top_{length}_words" in broken("gopher_repetition", text)) is is_broken


def test_a_run_that_occurs_once_repeats_nothing() -> None:
    assert broken("gopher_repetition", "Accra is the capital of Ghana.") == set()
    assert broken("gopher_repetition", "Yes.") == set()
    assert broken("gopher_repetition", " \n ") == set()


@pytest.mark.parametrize("length", range(5, 11))
def test_gopher_repetition_measures_runs_that_came_before(length: int) -> None:
    """A run of words stands twice: its second half counts, every character once."""
    run = " ".join(f"run{n}" for n in range(length))
    share = 0.20 - length / 100
    whole = len(run) / share  # characters of a text of which the run is exactly the share
    for characters, is_broken in ((int(whole) + 2, False), (int(whole) - 2, True)):
        filler = characters - 2 * len(run) - 2
        text = f"{run} {'z' * filler} {run}"
        assert len(text) == characters
        assert (f"repeated_{length}_words" in broken("gopher_repetition", text)) is is_broken


SENTENCE = "This line has five words."


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" ".join([SENTENCE] * 5), set()),
        ("\n".join([SENTENCE] * 5), set()),
        ("\n".join([SENTENCE] * 4), {"too_few_sentences"}),
        ("\n".join([SENTENCE] * 4 + ["No end here"]), {"too_few_sentences"}),
        ("\n".join([SENTENCE] * 4 + ["It goes on..."]), {"too_few_sentences"}),
        ("\n".join([SENTENCE] * 4 + ["Two words."]), {"too_few_sentences"}),
        ("\n".join([SENTENCE] * 4 + ["It was said so.[12]"]), set()),
        ("\n".join([SENTENCE] * 4 + ["Please turn on Javascript."]), {"too_few_sentences"}),
        ("\n".join([SENTENCE] * 4 + ["This site uses cookies now."]), {"too_few_sentences"}),
        ("\n".join([SENTENCE] * 4 + [f"A very {'x' * 1001} word."]), {"too_few_sentences"}),
        ("\n".join([SENTENCE] * 5 + ["Lorem Ipsum dolor"]), {"lorem_ipsum"}),
        ("\n".join([SENTENCE] * 5 + ["f() { }"]), {"curly_bracket"}),
    ],
)
def test_c4_quality(text: str, expected: set[str]) -> None:
    assert broken("c4_quality", text) == expected


LONG = "a line of prose that is longer than thirty characters, number {}"


def long_lines(count: int, ended: int) -> list[str]:
    return [LONG.format(n) + "." * (n < ended) for n in range(count)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n".join(long_lines(25, 4)), set()),
        ("\n".join(long_lines(25, 3)), {"unended_lines"}),
        # 66 of 100 lines with thirty characters, then 67.
        (
            "\n".join(long_lines(34, 34) + [f"{n:02} has words, not so many now."[:30] for n in range(66)]),
            set(),
        ),
        (
            "\n".join(long_lines(33, 33) + [f"{n:02} has words, not so many now."[:30] for n in range(67)]),
            {"short_lines"},
        ),
        ("\n\n".join([*long_lines(9, 9), long_lines(1, 1)[0]]), {"characters_in_repeated_lines"}),
        ("\n\n".join([*long_lines(10, 10), long_lines(1, 1)[0]]), set()),
        ("\n".join(f"word{n:026}x two." for n in range(10)), {"line_breaks"}),
        ("  \n ", {"no_line"}),
        ("これは日本語の文で、句点で終わり、三十文字よりも長い一つの行として書かれています。", set()),
    ],
)
def test_fineweb_quality(text: str, expected: set[str]) -> None:
    assert broken("fineweb_quality", text) == expected


def test_thresholds_are_set_and_rules_left_out_in_curate_toml() -> None:
    short = sample("Accra is the capital of Ghana.")
    assert reason(filters.named("gopher_quality"), short) == "gopher_too_few_words"
    lenient = filters.named("gopher_quality", {"least_words": 3, "least_stop_words": 1})
    assert reason(lenient, short) == ""
    assert reason(filters.named("c4_quality"), short) == "c4_too_few_sentences"
    code = sample("\n".join([SENTENCE] * 5 + ["x = {}"]))
    assert reason(filters.named("c4_quality", {"without": ["curly_bracket"]}), code) == ""
    dropped = filters.named("c4_quality")(short)
    assert isinstance(dropped, Drop)
    assert dropped.detail == "1 in lines that C4 keeps"


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (5, "needs a table"),
        ({"least_word": 5}, "no threshold 'least_word'"),
        ({"least_words": "many"}, "'least_words' is a number from 0 on"),
        ({"most_symbols": math.nan}, "'most_symbols' is a number from 0 on"),
        ({"least_words": 10, "most_words": 2}, "'least_words' is above 'most_words'"),
        ({"without": "curly"}, "'without' is a list"),
        ({"without": ["curly"]}, "no rule 'curly'"),
    ],
)
def test_a_value_of_another_form_is_refused(value: object, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        filters.named("gopher_quality", value)
