"""A base that can't read rows of any length: what is longer is left out, and answers are cut there."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from tests.trainer import tiny
from tests.trainer.architectures import families
from tests.trainer.architectures.verbs import run_verb
from trainer import config as settings
from trainer.data import dataset, row_rules
from trainer.model import self_test
from trainer.model.generate import Limits, generate

SMALL = {"bos_token_id": 2, "eos_token_id": 2}
BASES = {
    "gpt2": lambda vocabulary, positions: transformers.GPT2Config(
        vocab_size=vocabulary, n_positions=positions, n_embd=48, n_layer=2, n_head=4, **SMALL
    ),
    "opt": lambda vocabulary, positions: transformers.OPTConfig(
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        hidden_size=48,
        word_embed_proj_dim=48,
        ffn_dim=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        pad_token_id=0,
        **SMALL,
    ),
    "llama": lambda vocabulary, positions: transformers.LlamaConfig(
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        **SMALL,
    ),
}
POSITIONS = 64


def write_base(folder, kind) -> None:
    for file in folder.iterdir():
        file.unlink()
    speech = tiny.tokenizer()
    torch.manual_seed(0)
    config = BASES[kind](len(speech), POSITIONS)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    speech.save_pretrained(folder)


def toml(tmp_path, kind, most: int = 5):
    rows = [
        tiny.sample(
            number,
            f"say {number}",
            "long answer " * (1 + number % most),
            metadata_json=json.dumps({"split": "train" if number < 12 else "held_out"}),
        )
        for number in range(17)
    ]
    path = tiny.train_toml(tmp_path, rows)
    write_base(tmp_path / "base", kind)
    return path


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_rows_beyond_the_positions_of_a_base_are_left_out_by_every_command(tmp_path, kind):
    path = toml(tmp_path, kind)
    config = settings.load(path)
    assert row_rules.longest_row(config) == POSITIONS < config.train.max_length
    for verb in ("plan", "doctor", "train", "evaluate"):
        code, err = run_verb(verb, path)
        assert (verb, code, "Traceback" in err) == (verb, 0, False)
        if verb == "train":
            assert "rows of more than 64 tokens are left out" in err
    card = json.loads((tmp_path / "out" / "scorecard.json").read_text())
    assert card["cut"]["answers"] == 5


def test_a_corpus_whose_rows_are_all_beyond_it_says_so(tmp_path):
    path = toml(tmp_path, "gpt2")
    text = path.read_text()
    config = settings.load(path)
    error = dataset.nothing_fits(config)
    assert ("64 tokens" in error.message, "no positions for more" in str(error.remedy)) == (True, True)
    path.write_text(text.replace("max_length = 128", "max_length = 32"))
    assert dataset.nothing_fits(settings.load(path)).remedy == "raise [train] max_length"


def test_rows_beyond_what_a_rotary_base_was_made_for_are_learned_and_counted(tmp_path):
    path = toml(tmp_path, "llama")
    config = settings.load(path)
    assert row_rules.longest_row(config) == config.train.max_length
    code, err = run_verb("train", path)
    assert code == 0
    assert "of 12 rows have more tokens than the 64 that the base was made for" in err


@pytest.mark.parametrize("kind", ["gpt2", "opt"])
def test_an_answer_is_cut_at_the_last_position(tmp_path, kind):
    (tmp_path / "base").mkdir()
    write_base(tmp_path / "base", kind)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    prompts = [list(range(20, 20 + length)) for length in (5, POSITIONS - 3, POSITIONS, POSITIONS + 9)]
    limits = Limits(stop_id=1, max_new_tokens=8, batch=4, pad_id=0, positions=POSITIONS)
    notes: list[str] = []
    answers = generate(model, prompts, limits, on_note=notes.append)
    assert [(len(answer.ids), answer.is_cut) for answer in answers] == [
        (8, True),
        (3, True),
        (0, True),
        (0, True),
    ]
    assert any("3 of 4 answers are cut" in note for note in notes)


@pytest.mark.parametrize(
    ("family", "limit"),
    [("gpt2", 256), ("opt", 256), ("gptj", 256), ("gpt_neo", 256), ("llama", 0), ("bloom", 0), ("falcon", 0)],
)
def test_whether_a_base_has_a_last_position_is_tried_on_a_copy(tmp_path, family, limit):
    families.configuration(family).save_pretrained(tmp_path)
    assert self_test.position_limit(tmp_path) == limit
