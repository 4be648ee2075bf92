"""Test batches of rows that join and leave at any time: every row gets what it gets alone."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest

from harvester.mock_teacher.neural import batch as batch_module
from harvester.mock_teacher.neural.batch import Batch, GeneratedRow, group_sizes
from harvester.mock_teacher.neural.worker import load

BASE = Path(__file__).resolve().parents[3] / "data" / "base"


@pytest.fixture(scope="module")
def model():
    return load(BASE)[0]


def make_rows(rng, count):
    """Rows of several lengths and temperatures; every third has the prompt of the row before it."""
    prompts = [[rng.randrange(3, 250) for _ in range(rng.choice((2, 5, 9, 30, 70)))] for _ in range(count)]
    for at in range(2, count, 3):
        prompts[at] = prompts[at - 1]
    rows = []
    for at, prompt in enumerate(prompts):
        limit = rng.choice((1, 2, 7, 20, 70))
        rows.append(
            GeneratedRow(
                prompt,
                temperature=rng.choice((0.0, 0.8)),
                top_p=rng.choice((1.0, 0.9)),
                seed=b"%d" % at,
                wants_logprobs=True,
                is_done=lambda row, limit=limit: len(row.tokens) >= limit,
                done=lambda _: None,
                failed=lambda error: None,
            )
        )
    return rows


def run(model, groups):
    """Let groups of rows join, with a few steps between them, and finish all."""
    batch = Batch(model)
    for at, group in enumerate(groups):
        batch.join(group)
        for _ in range(at % 5):
            if len(batch):
                batch.step()
    while len(batch):
        batch.step()


def test_rows_get_in_any_company_what_they_get_alone(model):
    together, alone = make_rows(random.Random(1), 12), make_rows(random.Random(1), 12)
    run(model, [together[:5], together[5:6], together[6:9], together[9:]])
    for row, single in zip(together, alone, strict=True):
        run(model, [[single]])
        assert row.tokens == single.tokens
        assert row.logprobs == pytest.approx(single.logprobs, rel=1e-5, abs=1e-5)
        assert [ids for ids, _ in row.top] == [ids for ids, _ in single.top]
    assert len({len(row.tokens) for row in together}) > 3


def test_equal_prompts_are_read_once(model):
    calls = []

    class Counted:
        def __call__(self, **arguments):
            calls.append(arguments["input_ids"].shape)
            return model(**arguments)

    [row] = make_rows(random.Random(2), 1)
    copies = [
        GeneratedRow(row.prompt, 1.0, 1.0, b"%d" % at, False, row.is_done, row.done, row.failed)
        for at in range(6)
    ]
    Batch(Counted()).join(copies)
    assert calls == [(1, len(row.prompt))]
    assert len({tuple(copy.tokens) for copy in copies}) > 1


def test_groups_of_prompts_cost_least():
    rng = random.Random(3)
    for _ in range(20):
        lengths = sorted(rng.choices(range(1, 300), k=7))

        def cost(sizes, lengths=lengths):
            ends = list(itertools.accumulate(sizes))
            return sum(
                size * lengths[end - 1] + batch_module.CALL_TOKENS
                for size, end in zip(sizes, ends, strict=True)
            )

        sizes = group_sizes(lengths)
        assert sum(sizes) == len(lengths)
        cuts = itertools.product((False, True), repeat=len(lengths) - 1)
        every = []
        for cut in cuts:
            places = [0, *(at + 1 for at, is_cut in enumerate(cut) if is_cut), len(lengths)]
            every.append([end - start for start, end in itertools.pairwise(places)])
        assert cost(sizes) == min(map(cost, every))
    assert group_sizes([10] * 50) == [50]
    assert group_sizes([10] * 10 + [1000] * 10) == [10, 10]
