"""Test packing: nothing lost, nothing over budget, little waste, the same every time."""

from __future__ import annotations

import random
from bisect import bisect_left, insort

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data.packing import pack

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=200)


@given(LENGTHS, st.integers(64, 300), st.integers(0, 9), st.integers(1, 50))
def test_every_example_sits_once_and_no_pack_overflows(lengths, budget, seed, most):
    packing = pack(lengths, budget, seed=seed, max_documents=most)
    assert sorted(i for p in packing.packs for i in p) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in p) <= budget for p in packing.packs)
    assert all(len(p) <= most for p in packing.packs)
    assert packing.waste == pytest.approx(1 - sum(lengths) / (len(packing.packs) * budget))


def packs_of_lists(lengths, budget, seed, most):
    """The rule as it was written for lists: a checkpoint of those days resumes with the same packs."""
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda i: -max(lengths[i], budget // 16))
    packs, open_packs = [], []
    for i in order:
        position = bisect_left(open_packs, (lengths[i], -1))
        left, number = open_packs.pop(position) if position < len(open_packs) else (budget, len(packs))
        if number == len(packs):
            packs.append([])
        packs[number].append(i)
        left -= lengths[i]
        if left > 0 and len(packs[number]) < most:
            insort(open_packs, (left, number))
    return tuple(map(tuple, packs))


@given(LENGTHS, st.integers(64, 3000), st.integers(0, 9), st.integers(1, 50))
def test_packs_are_those_of_earlier_versions(lengths, budget, seed, most):
    packing = pack(np.array(lengths, dtype=np.int32), budget, seed=seed, max_documents=most)
    assert packing.packs == packs_of_lists(lengths, budget, seed, most)


@given(LENGTHS, st.integers(64, 300), st.integers(0, 9))
def test_packing_is_a_function_of_its_arguments(lengths, budget, seed):
    assert pack(lengths, budget, seed=seed).packs == pack(lengths, budget, seed=seed).packs


@given(LENGTHS, st.integers(64, 100))
def test_packs_stay_within_the_bound_of_best_fit_decreasing(lengths, budget):
    packs = len(pack(lengths, budget).packs)
    assert packs <= 11 / 9 * -(-sum(lengths) // budget) * 1.5 + 1


def test_pairs_that_fit_exactly_are_found():
    packing = pack([60, 40, 70, 30, 50, 50], 100)
    assert len(packing.packs) == 3
    assert packing.waste == 0


def test_small_examples_of_all_lengths_are_mixed():
    lengths = [10] * 500 + [20] * 500
    first = pack(lengths, 1000, seed=1).packs[0]
    assert {lengths[i] for i in first} == {10, 20}
    assert first != pack(lengths, 1000, seed=2).packs[0]


@pytest.mark.parametrize("length", [0, 101])
def test_what_does_not_fit_is_refused_not_dropped(length):
    with pytest.raises(ValueError, match=r"1\.\.100"):
        pack([50, length], 100)
