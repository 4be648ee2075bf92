"""Compare soft targets of a teacher of letters and a student of longer tokens with exact sums.

The teacher is a Markov chain over letters, so that the probability of each of the student's tokens can be
summed over all continuations.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.trainer import teacher_logprobs, tiny
from tests.trainer.data.test_soft_targets import attached, targets
from trainer.data.chat_template import Renderer
from trainer.data.soft_targets import LEAST_COVERAGE
from trainer.data.token_paths import MOST_OPEN, Listing, Open, certain_tokens, follow

LETTERS = "abcd"
END = "<|im_end|>"
# Letters that are enumerated after a position: more than the student's longest token.
DEPTH = 5


class Chain:
    """A teacher: the next letter, or the end, depends on the letter before."""

    def __init__(self, seed: int, sharpness: float) -> None:
        draw = np.random.default_rng(seed)
        logits = sharpness * draw.standard_normal((len(LETTERS) + 1, len(LETTERS) + 1))
        logits[:, -1] -= 1  # answers of several letters
        logits[0, 1] += 1  # "ab", which students have a token for
        self.table = np.exp(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
        self.draw = draw

    def row(self, before: str) -> np.ndarray:
        """Probabilities of the letters and of the end, after a text."""
        return self.table[LETTERS.index(before[-1]) if before else len(LETTERS)]

    def answer(self) -> str:
        while True:
            text = ""
            while len(text) < 24:
                choice = int(self.draw.choice(len(LETTERS) + 1, p=self.row(text)))
                if choice == len(LETTERS):
                    break
                text += LETTERS[choice]
            if text:
                return text

    def logprobs(self, text: str) -> list:
        """What a server would list: every letter and the end, at each letter and at the end."""
        entries = []
        for at in range(len(text) + 1):
            row = self.row(text[:at]).clip(1e-30)
            top = [(letter.encode(), math.log(p)) for letter, p in zip([*LETTERS, END], row, strict=True)]
            chosen = LETTERS.index(text[at]) if at < len(text) else len(LETTERS)
            entries.append(teacher_logprobs.entry(*top[chosen], top))
        return entries

    def continuations(self, before: str):
        """All texts of up to `DEPTH` letters with their probabilities; a shorter one has ended."""
        for size in range(DEPTH + 1):
            for letters in itertools.product(LETTERS, repeat=size):
                probability, text = 1.0, before
                for letter in letters:
                    probability *= self.row(text)[LETTERS.index(letter)]
                    text += letter
                ended = self.row(text)[-1] if size < DEPTH else 1.0
                yield "".join(letters), probability * ended


def student_tokenizer(merges) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with these merges."""
    names = ["<|pad|>", "<|im_start|>", END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += dict.fromkeys("".join(pair) for pair in merges)
    backend = Tokenizer(models.BPE(vocab={name: at for at, name in enumerate(names)}, merges=list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names[:3]])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|pad|>", eos_token=END)
    made.chat_template = tiny.CHATML
    return made


def differences(chain, merges, count=40):
    """Listed and exact probability of every soft target, and the report."""
    renderer = Renderer(student_tokenizer(merges))
    rows = []
    for number in range(count):
        text = chain.answer()
        rows.append(tiny.sample(number, f"q{number}", text, logprobs=chain.logprobs(text)))
    examples, report = attached(rows, renderer)
    assert report.path == "bytes"
    exact: dict[str, dict[int, float]] = {}
    pairs = []
    for row, example in zip(rows, examples, strict=True):
        ids = example.ids[example.prompt_length :].tolist()
        for at, listed in targets(example).items():
            before = renderer.decode(ids[:at]) if at else ""
            assert row.completion.startswith(before)
            state = before[-1:]
            if state not in exact:
                exact[state] = exact_first_tokens(chain, before, renderer)
            pairs += [(p, exact[state].get(token, 0.0)) for token, p in listed.items()]
    return np.array(pairs), report


def exact_first_tokens(chain, before, renderer):
    """The probability of each token of the student after a text, summed over all continuations."""
    texts = list(chain.continuations(before))
    encoded = renderer.texts([text for text, _ in texts if text])
    firsts = [renderer.chat_shape.stop_id, *(ids[0] for ids in encoded)]
    sums: dict[int, float] = {}
    for token, (_, probability) in zip(firsts, texts, strict=True):
        sums[token] = sums.get(token, 0.0) + probability
    assert sum(sums.values()) == pytest.approx(1)
    return sums


@pytest.mark.parametrize(("seed", "sharpness"), [(1, 0.7), (2, 1.2), (8, 1.7)])
def test_a_teacher_of_letters_gives_a_students_tokens_their_exact_probabilities(seed, sharpness):
    merges = [("a", "b"), ("ab", "c"), ("d", "d")]
    pairs, report = differences(Chain(seed, sharpness), merges)
    listed, exact = pairs.T
    assert len(listed) > 200
    assert report.coverage == 1
    # Never too much, but for the rounding of up to four factors to float16; too little by what may be open.
    assert (listed <= exact * 1.01 + 1e-4).all()
    assert (listed >= exact * (1 - MOST_OPEN - 0.01) - 1e-4).all()
    assert np.median(np.abs(listed - exact)) < 1e-3


def test_a_sharp_teacher_of_letters_reaches_most_of_a_bpe_students_tokens():
    """Tokens that overlap make the sums inexact; a sharp teacher keeps coverage and error in bounds."""
    merges = [("c", "b"), ("a", "b"), ("c", "a"), ("ca", "b"), ("cb", "a"), ("a", "a"), ("cb", "c")]
    pairs, report = differences(Chain(4, 3.0), merges)
    listed, exact = pairs.T
    assert report.mapped_mass > LEAST_COVERAGE
    assert not report.faults
    assert np.abs(listed - exact).mean() < 0.03


def test_a_flat_teacher_of_letters_is_refused_in_words():
    merges = [("a", "b"), ("b", "a"), ("c", "a"), ("a", "c"), ("b", "c"), ("c", "b"), ("d", "a"), ("a", "d")]
    merges += [("ab", "c"), ("ab", "d"), ("ca", "b"), ("da", "b"), ("d", "b"), ("b", "d"), ("c", "d")]
    _, report = differences(Chain(5, 0.1), merges)
    [fault] = report.faults
    assert "of the listed probability has a student token, below 60%" in fault


def test_the_order_in_which_answers_are_read_changes_no_bit():
    chain = Chain(4, 2.0)
    renderer = Renderer(student_tokenizer([("a", "b"), ("b", "a"), ("c", "a"), ("d", "c"), ("ab", "c")]))
    texts = [chain.answer() for _ in range(30)]
    rows = [tiny.sample(n, f"q{n}", t, logprobs=chain.logprobs(t)) for n, t in enumerate(texts)]
    forwards, report = attached(rows, renderer)
    # Other numbers for the tokens, and another order of the alternatives.
    turned = [replace(r, logprobs=[{**e, "top": e["top"][::-1]} for e in r.logprobs]) for r in rows[::-1]]
    backwards, other = attached(turned, renderer)
    assert report.path == other.path == "bytes"
    assert report.mapped_mass == pytest.approx(other.mapped_mass)
    for one, two in zip(forwards, backwards[::-1], strict=True):
        assert np.array_equal(one.soft.ids, two.soft.ids)
        assert np.array_equal(one.soft.log_probs, two.soft.log_probs)


def listing(chosen, texts, ends=0.0):
    return Listing(chosen, texts, ends, sum(texts.values()) + ends)


def test_an_answer_is_followed_until_its_token_is_certain():
    steps = [
        listing(b"4", {b"4": 0.8, b"7": 0.2}),
        listing(b"2", {b"2": 0.5, b"3": 0.3}, ends=0.1),
        listing(b" ", {b" ": 0.9, b"0": 0.1}),
    ]
    ambiguous = {b"4", b"42", b"7"}
    paths = follow(steps, b"42", ambiguous.__contains__)
    assert paths.target == pytest.approx(0.8 * 0.5 * 0.9)
    assert paths.texts == pytest.approx({b"43": 0.24, b"420": 0.04})
    assert paths.ended == pytest.approx({b"4": 0.08})
    assert {each.text: each.probability for each in paths.open if not each.is_unlisted} == {b"7": 0.2}
    assert sum(each.probability for each in paths.open if each.is_unlisted) == pytest.approx(0.8 * 0.1)


def test_a_token_that_is_largely_open_goes_to_the_tail():
    data = [b"4", b"42", b"43", b"7", b"78", b"<end>"]
    first = {b"4": 0, b"43": 2, b"42": 1}.get
    paths = follow(
        [listing(b"4", {b"4": 0.8, b"7": 0.2}), listing(b"2", {b"2": 0.5, b"3": 0.3}, ends=0.2)],
        b"42",
        {b"4", b"7"}.__contains__,
    )
    tokens = certain_tokens(paths, 1, first, data, 5)
    assert tokens == pytest.approx({1: 0.4, 2: 0.24, 0: 0.16})  # "7" might be "78"
    paths.open.append(Open(b"42", 0.1))
    assert set(certain_tokens(paths, 1, first, data, 5)) == {2}  # "4" and "42" are in doubt


def test_an_answer_that_can_not_be_followed_is_open():
    paths = follow([listing(b"4", {b"4": 0.8, b"7": 0.2}), None], b"42", {b"4"}.__contains__)
    assert (paths.target, paths.open) == (0.0, [Open(b"4", 0.8)])
    assert certain_tokens(paths, 0, {b"7": 1}.get, [b"42", b"7"], 9) == {1: 0.2}
