"""Answers whose rows leave and join a batch are those of batches that end with their longest answer."""

from __future__ import annotations

import random

import pytest
import torch
import transformers

from tests.tiers import rest_is_slow
from tests.trainer.architectures import families
from tests.trainer.architectures.verbs import greedy_alone
from trainer.model import generate, generation_mode
from trainer.model.continuous_batch import ContinuousBatch, why_not
from trainer.model.tiny_copy import tiny_copy

LONGEST = 40
BATCH = 3


def prompts():
    draw = torch.Generator().manual_seed(1)
    lengths = (2, 30, 5, 9, 21, 3, 14, 7, 2, 11, 26, 4)
    return [torch.randint(10, 127, (length,), generator=draw).tolist() for length in lengths]


def limits(stop_id, **others):
    return generate.Limits(
        **{"max_new_tokens": LONGEST, "batch": BATCH, "pad_id": 3, **others}, stop_id=stop_id
    )


def whole_batches(monkeypatch, model, asked, **rest):
    """Answer as before there was refilling."""
    with monkeypatch.context() as patch:
        patch.setattr(generation_mode, "MODES", generation_mode.MODES[1:])
        return generate.generate(model, prompts(), asked, **rest)


class Counted:
    """Counts the rows of all forwards of a model: tokens that pass through it."""

    def __init__(self, model):
        self.tokens = 0
        model.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, _model, _args, kwargs):
        self.tokens += kwargs["input_ids"].numel()

    def during(self, work):
        before = self.tokens
        return work(), self.tokens - before


def skewed_stop(answers):
    """Return the token that ends the answers at the most different places."""
    tokens = {token for answer in answers for token in answer.ids}
    return max(
        sorted(tokens),
        key=lambda stop: len({a.ids.index(stop) if stop in a.ids else LONGEST for a in answers}),
    )


# A window of 8 tokens in all layers, in every second one, none; recurrent layers beside attention, and both
# in one layer.
@pytest.mark.parametrize(
    "name",
    rest_is_slow(
        ["mistral", "ministral", "gpt2", "qwen3_next", "falcon_h1", "deepseek_v3", "gemma3n_text"], first=3
    ),
)
def test_refilled_answers_are_those_of_whole_batches_in_fewer_rows(name, monkeypatch):
    model = tiny_copy(families.configuration(name)).eval()
    stop = skewed_stop(whole_batches(monkeypatch, model, limits(0)))
    counted = Counted(model)
    before, rows_before = counted.during(lambda: whole_batches(monkeypatch, model, limits(stop)))
    lengths = sorted(len(answer.ids) for answer in before)
    assert lengths[0] < 8 < LONGEST // 2 < lengths[-1]  # the answers are skewed, and longer than windows
    after, rows_after = counted.during(lambda: generate.generate(model, prompts(), limits(stop)))
    assert after == before
    assert rows_after < rows_before * 0.9
    for number in (1, 5):
        assert after[number].ids == greedy_alone(model, prompts()[number], LONGEST, stop)


def test_expected_lengths_change_the_order_and_no_answer(monkeypatch):
    model = tiny_copy(families.configuration("mistral")).eval()
    stop = skewed_stop(whole_batches(monkeypatch, model, limits(0)))
    answers = generate.generate(model, prompts(), limits(stop))
    expected = [len(answer.ids) for answer in answers]
    assert generate.generate(model, prompts(), limits(stop, expected=expected)) == answers
    orders = [
        generate._Work([[7] * n for n in (30, 100, 101, 31, 102)], each, None, print, print).in_order()
        for each in (limits(stop), limits(stop, expected=[5, 10, 30, 6, 20]))
    ]
    assert orders == [[0, 3, 1, 2, 4], [3, 0, 2, 4, 1]]  # in reach of 25 %, the longer answer begins first


def test_samples_are_those_of_whole_batches(monkeypatch):
    model = tiny_copy(families.configuration("ministral")).eval()
    seeds = list(range(20, 32))
    stop = skewed_stop(whole_batches(monkeypatch, model, limits(0), seeds=seeds))
    before = whole_batches(monkeypatch, model, limits(stop), seeds=seeds)
    assert len({len(answer.ids) for answer in before}) > 3
    assert generate.generate(model, prompts(), limits(stop), seeds=seeds) == before


def test_memory_that_runs_out_in_the_middle_changes_no_answer(monkeypatch):
    """Rows begin anew, sampled ones with their own random numbers."""
    model = tiny_copy(families.configuration("mistral")).eval()
    seeds = list(range(12))
    stop = skewed_stop(whole_batches(monkeypatch, model, limits(0), seeds=seeds))
    expected = generate.generate(model, prompts(), limits(stop), seeds=seeds)
    failed, notes, counts = [], [], []

    def no_memory(_model, _args, kwargs):
        rows, columns = kwargs.get("attention_mask", kwargs["input_ids"]).shape
        if rows > 2 and columns > 20:
            failed.append((rows, columns))
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(no_memory, with_kwargs=True)
    asked = limits(stop, batch=6)
    answers = generate.generate(
        model, prompts(), asked, seeds=seeds, on_note=notes.append, on_done=counts.append
    )
    assert answers == expected
    assert [rows for rows, _ in failed] == [6, 3]
    assert notes == [f"memory ran out: now {rows} prompts are answered together" for rows in (3, 1)]
    assert counts == sorted(set(counts))
    assert counts[-1] == 12


def test_progress_counts_every_answer_once(monkeypatch):
    model = tiny_copy(families.configuration("mistral")).eval()
    stop = skewed_stop(whole_batches(monkeypatch, model, limits(0)))
    counts = []
    generate.generate(model, prompts(), limits(stop), on_done=counts.append)
    assert counts == sorted(set(counts))
    assert counts[-1] == 12
    assert len(counts) > 4


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama4_text", "chunks"),  # the column decides where a chunk ends
        ("mamba", "doesn't know how long it is"),
        ("mistral", ""),
    ],
)
def test_caches_that_cant_be_cut_by_rows_are_named(name, reason):
    model = tiny_copy(families.configuration(name)).eval()
    found = why_not(model)
    assert reason in found
    assert bool(found) == bool(reason)
    mode = generation_mode.choose_mode(model)
    assert mode.refills != bool(reason)
    assert ("can't be cut row by row" in mode.note) == bool(reason)


def test_a_rotary_embedding_that_depends_on_the_longest_row_is_not_mixed():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10_000.0}
    config = transformers.LlamaConfig(**{**families.COMMON, "rope_parameters": rope})
    assert "longest row" in why_not(tiny_copy(config))


def test_a_row_computes_the_same_after_others_left_and_joined():
    """Against the model's own forward of the row alone, far beyond its window of 8 tokens."""
    model = tiny_copy(families.configuration("ministral")).eval()
    asked = prompts()
    kept = list(asked[3])
    with torch.inference_mode():
        batch = ContinuousBatch(model, pad_id=3)
        logits = batch.admit([asked[1], kept])[1]
        for token in range(40, 70):
            if token == 45:  # the longest one leaves: columns are cut
                batch.keep([1])
            if token == 48:
                batch.admit([asked[4], asked[5]])
            if token == 55:
                batch.keep([1, 0])
            alone = model(input_ids=torch.tensor([kept]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-4)
            place = 1 if len(batch) == 2 else 0
            kept.append(token)
            logits = batch.step(torch.full((len(batch),), token))[place]
    assert len(batch) == 2


class CountingBatch:
    """Stands in for `ContinuousBatch`: the row of prompt [n] ends after `LENGTHS[n]` tokens, or never."""

    def __init__(self, model, pad_id) -> None:
        self.device = torch.device("cpu")
        self.rows: list[list[int]] = []  # number, tokens after the prompt

    def admit(self, prompts):
        self.rows += [[prompt[0], 0] for prompt in prompts]
        return self._logits(self.rows[-len(prompts) :])

    def step(self, tokens):
        for row in self.rows:
            row[1] += 1
            assert row[1] < MOST_TOKENS, "a position beyond what a whole batch would use"
        return self._logits(self.rows)

    def keep(self, rows) -> None:
        self.rows = [self.rows[place] for place in rows]

    def _logits(self, rows):
        ends = torch.tensor([tokens + 1 >= LENGTHS[number] for number, tokens in rows])
        return torch.stack([ends.float(), 1 - ends.float()], dim=1)  # token 0 ends an answer


MOST_TOKENS = 12
LENGTHS = [chance.choice((1, 3, 7, 11, 99)) for chance in [random.Random(5)] for _ in range(200)]


def test_no_row_goes_on_beyond_the_limit_of_its_answer(monkeypatch):
    """Learned positions end there: a row that waits for others to end must not use further ones."""
    monkeypatch.setattr(generate, "ContinuousBatch", CountingBatch)
    limits = generate.Limits(stop_id=0, max_new_tokens=MOST_TOKENS, batch=32)
    work = generate._Work([[number] for number in range(200)], limits, None, lambda _: None, lambda _: None)
    generate._answer_refilling(None, work)
    found = [(len(work.answers[number].ids), work.answers[number].is_cut) for number in range(200)]
    assert found == [(min(length - 1, MOST_TOKENS), length > MOST_TOKENS) for length in LENGTHS]
