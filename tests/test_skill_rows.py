"""Check the pools of rows that a neural teacher learns from: disjoint by content, repeatable, right."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
import torch
from harvester_data import make_base, skill_rows
from harvester_data.base_document import Document
from harvester_data.base_tokenizer import make_tokenizer
from harvester_data.float32_muon import Float32Muon, orthogonal
from harvester_data.letter_tokenizers import BPE_TOKENS, bpe_tokenizer, letter_tokenizer
from harvester_data.make_neural_teacher import gold_documents
from harvester_data.skill_phrasings import WIDE

from harvester.mock_teacher.tasks.contents import content_key
from harvester.mock_teacher.tasks.phrasings import DOUBLE, PHRASINGS, pattern_of
from harvester.mock_teacher.tasks.rules import SOLVERS, solve


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
        contents[pool] = set()
        for row in rows:
            slots = pattern_of(row["phrasing"]).fullmatch(row["prompt"]).groupdict()
            if row["task"] != "repeat":
                assert row["reference"] == SOLVERS[row["task"]](slots)
            contents[pool].add(content_key(row["task"], slots))
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
        assert row["phrasing"] in WIDE.get(row["task"], skill_rows.REPEAT)


def test_held_out_phrasings_are_not_among_the_wide_ones_and_the_rules_read_both():
    for task, templates in WIDE.items():
        assert not {*templates} & {*PHRASINGS[task].held_out}
        assert {*PHRASINGS[task].train} < {*templates}
        assert len({*templates}) == len(templates) > 20
    for row in skill_rows.held_out_rows():
        assert solve(row["prompt"]).answer == row["reference"]


def test_equal_seeds_give_equal_rows(pools):
    assert skill_rows.held_out_rows() == pools[skill_rows.TEST]
    assert skill_rows.held_out_rows(seed=1) != pools[skill_rows.TEST]
    assert list(islice(skill_rows.gold_rows(), 100)) == pools[skill_rows.GOLD][:100]


@pytest.fixture(scope="module")
def tokenizers(pools):
    return letter_tokenizer(), bpe_tokenizer(row["prompt"] for row in pools[skill_rows.HARVEST][:2000])


@pytest.mark.parametrize("text", ["What is 12 + 30?", "grüße 日本 😀\n", "", "  a  b"])
def test_both_tokenizers_keep_any_text(text, tokenizers):
    assert len(tokenizers[1]) == BPE_TOKENS
    for tokenizer in tokenizers:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_contents_are_spelt_and_instructions_are_whole_words():
    tokenizer = letter_tokenizer()
    ids = tokenizer("Sort the letters of kfuz.")["input_ids"]
    pieces = [tokenizer.decode([number]) for number in ids]
    assert pieces == ["Sort", " the", " letters", " of", " ", "k", "f", "u", "z", "."]
    turn = [{"role": "user", "content": "Add 12 and 7."}]
    ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    pieces = [tokenizer.decode([number]) for number in ids]
    assert "".join(pieces) == "<|im_start|>user\nAdd 12 and 7.<|im_end|>\n<|im_start|>assistant\n"
    assert pieces[0] == "<|im_start|>user\n"
    assert pieces[-1] == "<|im_start|>assistant\n"


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 24, 16), (2, 16, 24)])
def test_newton_schulz_makes_singular_values_about_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonal(matrices))
    # The iteration maps singular values to 0.7 to 1.2, except those near 0.
    assert values.median(dim=1).values.min() > 0.6
    assert values.max() < 1.3


def test_an_interrupted_training_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.setattr(make_base, "SAVE_STEPS", 2)
    tokenizer = letter_tokenizer()

    class Interrupted(Exception):
        pass

    def trained(state, stop_after=None):
        def groups():
            for at, group in enumerate(make_base.batches(gold_documents(), tokenizer)):
                if at == stop_after:
                    raise Interrupted
                yield group

        model = make_base.make_model(tokenizer, layers=1, width=16, intermediate_size=16)
        make_base.train(model, groups(), 5, Float32Muon, state)
        return model.state_dict()

    state = tmp_path / "training.pt"
    with pytest.raises(Interrupted):
        trained(state, stop_after=3)
    assert torch.load(state, weights_only=True)["step"] == 2
    resumed, whole = trained(state), trained(None)
    assert all(torch.equal(resumed[name], weight) for name, weight in whole.items())


def test_the_prompts_of_a_training_are_those_of_the_chat_template():
    for tokenizer in (letter_tokenizer(), make_tokenizer(("say",))):
        document = Document("say abc", "abc")
        [(ids, weights)] = make_base.weigh([document], tokenizer)
        prompt = make_base.prompt_ids("say abc", tokenizer)
        assert ids == prompt + tokenizer("abc<|im_end|>")["input_ids"]
        assert weights == [make_base.PROMPT_WEIGHT] * len(prompt) + [1.0] * (len(ids) - len(prompt))
