"""Rows whose rotary embedding depends on the longest one of a pass are computed as each is alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config

from tests.trainer import tiny
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from trainer import config as settings
from trainer.data.chat_template import Example
from trainer.errors import ConfigError
from trainer.model import model, rotary, self_test
from trainer.model.forward.rows import RotaryBorder, parts_of
from trainer.model.generate import Limits, generate
from trainer.training import student as students
from trainer.training.distributed import World
from trainer.training.forward import pack_losses

BORDER = 32
SHAPE = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 6,
    "long_factor": [6.0] * 6,
    "original_max_position_embeddings": BORDER,
    "factor": 8.0,
}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 8.0}
CONFIGS = {
    "phi3 longrope": Phi3Config(
        **SHAPE,
        max_position_embeddings=256,
        original_max_position_embeddings=BORDER,
        rope_parameters=LONGROPE,
    ),
    "llama longrope": LlamaConfig(**SHAPE, max_position_embeddings=256, rope_parameters=LONGROPE),
    "llama dynamic": LlamaConfig(**SHAPE, max_position_embeddings=BORDER, rope_parameters=DYNAMIC),
}
LENGTHS = (80, 60, BORDER + 2, BORDER + 1, BORDER, 20, 9)  # a document feeds one token less


def write_base(folder, name):
    """Weights are wide, so that angles matter."""
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(CONFIGS[name])
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6)
    made.save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return folder


def documents() -> list[Example]:
    draw = np.random.default_rng(0)
    return [Example(draw.integers(20, 300, length).astype(np.int32), 3) for length in LENGTHS]


def loss_alone(folder, example: Example) -> float:
    """By a model of transformers that has seen no other row."""
    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    ids = torch.tensor(example.ids.astype(np.int64))
    with torch.no_grad():
        logits = fresh(input_ids=ids[None, :-1], use_cache=False).logits[0].double()
    losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
    return float(losses[example.prompt_length - 1 :].sum())


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_pack_has_the_loss_of_its_rows_alone(tmp_path, name, packed):
    write_base(tmp_path, name)
    loaded = model.load_base(tmp_path, torch.device("cpu"))
    loaded.requires_grad_(False)
    forward = self_test.choose_forward(loaded, place="", may_pack=packed)
    assert forward.layout.packed is packed
    assert forward.layout.border == RotaryBorder(BORDER, "dynamic" in name)
    self_test.set_attention(loaded, forward.layout)
    wanted = [loss_alone(tmp_path, example) for example in documents()]
    with torch.no_grad():
        for _ in range(2):  # nothing of the first pass is left in the second
            for numbers in (range(len(LENGTHS)), (2, 4), (3,), (0, 6), (4, 5)):
                part = [documents()[number] for number in numbers]
                losses = pack_losses(loaded, part, torch.device("cpu"), forward)
                loss = float(sum(loss for loss, _ in losses))
                assert loss == pytest.approx(sum(wanted[number] for number in numbers), rel=1e-5)


def test_documents_are_parted_at_the_border_longest_first():
    lengths = [9, 7, 5, 4, 4, 1]
    assert parts_of(lengths, None) == [slice(0, 6)]
    assert parts_of(lengths, RotaryBorder(9, by_length=False)) == [slice(0, 6)]
    assert parts_of(lengths, RotaryBorder(5, by_length=False)) == [slice(0, 2), slice(2, 6)]
    assert parts_of(lengths, RotaryBorder(0, by_length=False)) == [slice(0, 6)]
    longer = [slice(0, 1), slice(1, 2), slice(2, 3), slice(3, 6)]
    assert parts_of(lengths, RotaryBorder(4, by_length=True)) == longer
    assert parts_of([], RotaryBorder(4, by_length=True)) == [slice(0, 0)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_prompt_has_the_answer_that_it_has_alone(tmp_path, name):
    write_base(tmp_path, name)
    draw = np.random.default_rng(1)
    prompts = [draw.integers(20, 300, length).tolist() for length in (5, 60, 12, BORDER - 2, 24)]
    limits = Limits(stop_id=2, max_new_tokens=8, batch=8, pad_id=0)

    def answers(asked):
        return [a.ids for a in generate(loaded, asked, limits, on_note=notes.append)]

    notes: list[str] = []
    loaded = model.load_base(tmp_path, torch.device("cpu"))
    together = answers(prompts)
    assert any("2 of 5 prompts are answered alone" in note for note in notes)
    assert together == [answers([prompt])[0] for prompt in prompts]


def test_only_angles_that_depend_on_the_length_have_a_border():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 1e4}
    assert rotary.border_of(LlamaConfig(rope_parameters=yarn, max_position_embeddings=256)) is None
    assert rotary.border_of(LlamaConfig()) is None
    nested = {"full_attention": LONGROPE, "sliding_attention": {"rope_type": "default", "rope_theta": 1.0}}
    assert rotary.kinds_of(nested) == {"longrope", "default"}


@pytest.mark.parametrize("name", CONFIGS)
def test_without_its_weights_a_base_has_the_border_of_its_own_configuration(tmp_path, name):
    write_base(tmp_path / "base", name)
    forward = self_test.check_architecture(tmp_path / "base")
    assert forward is not None
    assert forward.layout.border == RotaryBorder(BORDER, "dynamic" in name)


@pytest.mark.parametrize("name", ["llama longrope", "llama dynamic"])
def test_a_split_base_refuses_rows_beyond_the_border_and_the_plan_says_so_before(
    tmp_path,
    monkeypatch,
    run_trainer,  # noqa: F811
    name,
):
    path = tiny.train_toml(tmp_path, tiny.skill(4, held_out=1), train={"max_length": 64, "shard": "always"})
    write_base(tmp_path / "base", name)
    monkeypatch.setattr(students.memory, "needs_sharding", lambda *_, **__: True)
    monkeypatch.setattr(students.fsdp, "shard_base", lambda *_: 0)
    config = settings.load(path)
    with pytest.raises(ConfigError, match="32 tokens") as refused:
        students.load_student(config, documents(), World())
    assert "max_length = 32" in str(refused.value.remedy)
    monkeypatch.undo()
    code, _, err = run_trainer("plan", path, "--processes", 2, "--probe", 0)
    assert code == 2
    assert refused.value.message in err
    assert str(refused.value.remedy) in err
    path.write_text(path.read_text().replace("max_length = 64", "max_length = 32"))
    code, _, err = run_trainer("plan", path, "--processes", 2, "--probe", 0)
    assert code == 0, err
