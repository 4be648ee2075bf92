"""Check the pools of rows that a neural teacher learns from: disjoint by content, repeatable, right."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch
from harvester_data import skill_rows
from harvester_data.float32_muon import orthogonal
from harvester_data.letter_tokenizers import BPE_TOKENS, bpe_tokenizer, byte_tokenizer

from harvester.mock_teacher.tasks.contents import content_key
from harvester.mock_teacher.tasks.phrasings import DOUBLE, PHRASINGS
from harvester.mock_teacher.tasks.rules import solve


@pytest.fixture(scope="module")
def pools() -> dict[str, list[skill_rows.Row]]:
    return {
        skill_rows.GOLD: list(islice(skill_rows.gold_rows(), 20_000)),
        skill_rows.HARVEST: skill_rows.harvest_rows(),
        skill_rows.TEST: skill_rows.held_out_rows(),
    }


def test_no_content_is_in_two_pools(pools):
    contents = {}
    for pool, rows in pools.items():
        solved = [solve(row["prompt"]) for row in rows]
        assert [entry.answer for entry in solved] == [row["reference"] for row in rows]
        contents[pool] = {content_key(entry.task, entry.slots) for entry in solved}
    assert not contents[skill_rows.GOLD] & contents[skill_rows.HARVEST]
    assert not contents[skill_rows.GOLD] & contents[skill_rows.TEST]
    assert not contents[skill_rows.HARVEST] & contents[skill_rows.TEST]


def test_counts_and_phrasings_are_those_stated(pools):
    assert len(pools[skill_rows.HARVEST]) == 8 * skill_rows.HARVEST_ROWS
    splits = Counter(row["split"] for row in pools[skill_rows.TEST])
    assert splits == {"held_out": 1280, "held_out_phrasing": 640, "held_out_task": 80}
    for pool in (skill_rows.HARVEST, skill_rows.TEST):
        assert len({row["prompt"] for row in pools[pool]}) == len(pools[pool])
        assert len({row["id"] for row in pools[pool]}) == len(pools[pool])
    for row in (*pools[skill_rows.GOLD], *pools[skill_rows.HARVEST]):
        assert row["task"] != DOUBLE
        assert row["phrasing"] in PHRASINGS[row["task"]].train


def test_equal_seeds_give_equal_rows(pools):
    assert skill_rows.held_out_rows() == pools[skill_rows.TEST]
    assert skill_rows.held_out_rows(seed=1) != pools[skill_rows.TEST]
    assert list(islice(skill_rows.gold_rows(), 100)) == pools[skill_rows.GOLD][:100]


@pytest.mark.parametrize("text", ["What is 12 + 30?", "grüße 日本 😀\n", "", "  a  b"])
def test_both_tokenizers_keep_any_text(text, pools):
    by_bytes = byte_tokenizer()
    by_pairs = bpe_tokenizer(row["prompt"] for row in pools[skill_rows.HARVEST][:2000])
    assert len(by_bytes) == 259
    assert len(by_pairs) == BPE_TOKENS
    assert len(by_bytes(text)["input_ids"]) == len(text.encode())
    for tokenizer in (by_bytes, by_pairs):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 16), (2, 16, 24)])
def test_newton_schulz_makes_singular_values_about_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    # The iteration maps singular values to 0.7 to 1.2, except those near 0.
    assert values.median(dim=1).values.min() > 0.6
    assert values.max() < 1.3
