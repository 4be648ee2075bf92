"""Test the search for duplicates against exact set similarities, planted copies and a plain dictionary."""

from __future__ import annotations

import random
from contextlib import closing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.quality.similarity import hash_table
from harvester.quality.similarity.duplicates import Duplicates, Match, rows_of_band, signature_of
from harvester.quality.similarity.hash_table import HashTable
from harvester.quality.similarity.texts import normalised, shingles_of, words_of

WORDS = [
    f"{first}{last}"
    for first in ("ba", "ke", "lo", "mi", "nu", "ra")
    for last in ("ton", "sel", "var", "dim")
]


def sentence(rng: random.Random, length: int = 40) -> str:
    return " ".join(rng.choice(WORDS) for _ in range(length))


def found(texts: list[str], how: str = "near", threshold: float = 0.8) -> list[Match | None]:
    with closing(Duplicates(how, threshold)) as duplicates:  # type: ignore[arg-type]
        return [duplicates.find(text, str(number)) for number, text in enumerate(texts)]


@given(st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), max_size=200))
def test_a_table_returns_what_a_dictionary_would(pairs: list[tuple[int, int]]) -> None:
    expected: dict[int, list[int]] = {}
    with closing(HashTable()) as table:
        for key, value in pairs:
            expected.setdefault(key or 1, []).append(value)  # 0 marks an empty slot
            table.add(key, value)
        assert {key: table.get(key) for key in expected} == expected


def test_a_table_grows_and_bounds_the_values_of_a_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hash_table, "FIRST_SLOTS", 4)
    with closing(HashTable()) as table:
        for number in range(1000):
            table.add(number * 7919, number)
            table.add(5, number)
        assert all(number in table.get(number * 7919) for number in range(1000))
        assert table.get(5) == list(range(hash_table.MOST_VALUES))
        assert len(table) == 1000 + hash_table.MOST_VALUES


def test_a_signature_estimates_the_similarity_of_the_sets() -> None:
    rng, errors = random.Random(1), []
    for _ in range(60):
        first = sentence(rng).split()
        second = [word if rng.random() < 0.8 else rng.choice(WORDS) for word in first]
        texts = [" ".join(first), " ".join(second)]
        sets = [set(shingles_of(text)) for text in texts]
        exact = len(sets[0] & sets[1]) / len(sets[0] | sets[1])
        signatures = [signature_of(text) for text in texts]
        equal = sum(a == b for a, b in zip(*signatures, strict=True))
        errors.append(equal / len(signatures[0]) - exact)
    assert abs(sum(errors) / len(errors)) < 0.02
    assert max(map(abs, errors)) < 0.16  # four standard deviations


def test_planted_copies_are_found_and_nothing_else() -> None:
    rng = random.Random(2)
    texts = [sentence(rng) for _ in range(300)]
    copies = []
    for text in texts[:100]:
        words = text.split()
        words[rng.randrange(len(words))] = "altered"
        copies.append(" ".join(words))
    matches = found(texts + copies)
    assert matches[:300] == [None] * 300
    labels = [match.label if match else None for match in matches[300:]]
    assert labels == [str(number) for number in range(100)]
    assert all(0.8 <= match.similarity < 1 for match in matches[300:] if match)


def test_equal_texts_are_found_whatever_their_form_case_and_space() -> None:
    texts = ["Hello  World", "hello\nworld", "ｈｅｌｌｏ world", "hello, world", "STRASSE", "straße"]
    for how in ("exact", "near"):
        matches = found(texts, how)
        assert [match and (match.label, match.similarity) for match in matches] == [
            None,
            ("0", 1.0),
            ("0", 1.0),
            None,
            None,
            ("4", 1.0),
        ]


def test_texts_whose_numbers_differ_are_two_questions() -> None:
    text = "Add the following two numbers and answer with the sum only, without any further words: {} and 6"
    assert found([text.format(12), text.format(13), text.format(12) + "!"])[1] is None
    assert found([text.format(12), text.format(13), text.format(12) + "!"])[2] is not None


@pytest.mark.parametrize(
    ("first", "second", "other"),
    [
        (
            "请用简单的语言解释为什么天空是蓝色的,并举一个日常生活中的例子来说明这个现象。",
            "请用简单的语言解释为什么天空是蓝色的,并举一个日常生活中的例子来说明这现象。",
            "请写一首关于秋天的短诗,并说明诗中每一个意象的含义和作者想要表达的感情。",
        ),
        (
            "กรุณาอธิบายว่าทำไมท้องฟ้าจึงเป็นสีฟ้าและยกตัวอย่างจากชีวิตประจำวันหนึ่งตัวอย่าง",
            "กรุณาอธิบายว่าทำไมท้องฟ้าจึงเป็นสีฟ้าและยกตัวอย่างจากชีวิตประจำวันสักหนึ่งตัวอย่าง",
            "เขียนบทกวีสั้นเกี่ยวกับฤดูใบไม้ร่วงและอธิบายความหมายของภาพแต่ละภาพในบทกวีนั้น",
        ),
    ],
)
def test_languages_without_spaces(first: str, second: str, other: str) -> None:
    matches = found([first, second, other])
    assert [match and match.label for match in matches] == [None, "0", None]
    assert len(words_of(normalised(first))) > 20


def test_guards_keep_texts_apart() -> None:
    with closing(Duplicates("near")) as duplicates:
        assert duplicates.find("describe the picture in a sentence", "a", guard="picture 1") is None
        assert duplicates.find("describe the picture in a sentence", "b", guard="picture 2") is None
        assert duplicates.match("describe the picture in a sentence.", guard="picture 2") is not None


def test_bands_leave_few_pairs_unseen() -> None:
    for threshold in (0.3, 0.5, 0.8, 0.9, 1.0):
        rows = rows_of_band(threshold)
        assert 1 - (1 - threshold**rows) ** (128 // rows) >= 0.99
    assert rows_of_band(0.8) == 6
