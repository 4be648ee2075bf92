"""Test that every verb refuses a base whose files and configuration disagree, and a misspelt target."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.trainer import tiny
from tests.trainer.architectures import bases
from tests.trainer.command_line import run_trainer, toml  # noqa: F401
from trainer.errors import StudentError
from trainer.model import loading
from trainer.model.weights import check_base, vocabulary_size

VERBS = ("plan", "doctor", "train")


def rewrite(base, change):
    """Replace the tensors of a base by `change` of them."""
    path = base / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def without_layer(tensors):
    return {name: tensor for name, tensor in tensors.items() if "layers.1." not in name}


def with_prefix(tensors):
    return {f"language_model.{name}": tensor for name, tensor in tensors.items()}


def with_another_shape(tensors):
    return {**tensors, "model.norm.weight": torch.zeros(7)}


def with_leftover(tensors):
    return {**tensors, "model.odd.weight": torch.zeros(7)}


def with_another_tied_head(tensors):
    return {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + 1}


CASES = [
    (without_layer, "9 missing (first: model.layers.1."),
    (with_prefix, "unexpected (first: language_model."),
    (with_another_shape, "1 of another shape (first: model.norm.weight)"),
    (with_leftover, "1 unexpected (first: model.odd.weight)"),
    (with_another_tied_head, "ties lm_head.weight to model.embed_tokens.weight"),
]


@pytest.mark.parametrize(("change", "message"), CASES, ids=[change.__name__ for change, _ in CASES])
def test_tensors_that_do_not_fit_the_configuration_are_refused_by_name(run_trainer, toml, change, message):  # noqa: F811
    rewrite(toml.parent / "base", change)
    for verb in VERBS:
        code, _, err = run_trainer(verb, toml)
        assert code in (1, 2), verb
        assert message in err, verb


def test_an_output_layer_that_is_missing_is_not_drawn_at_random(run_trainer, toml):  # noqa: F811
    file = toml.parent / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": False}))
    for verb in VERBS:
        code, _, err = run_trainer(verb, toml)
        assert code in (1, 2), verb
        assert "1 missing (first: lm_head.weight)" in err, verb


def test_a_misspelt_target_among_right_ones_is_refused_with_the_nearest_name(run_trainer, tmp_path):  # noqa: F811
    path = tiny.train_toml(tmp_path, tiny.skill(8), lora={"target": ["q_proj", "v_prjo"]})
    for verb in VERBS:
        code, _, err = run_trainer(verb, path)
        assert code in (1, 2), verb
        assert "'v_prjo'" in err, verb


def test_the_vocabulary_of_a_nested_configuration_is_found(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {"vocab_size": 320}}))
    assert vocabulary_size(tmp_path) == 320


def test_no_tensor_that_the_student_holds_is_called_unused(tmp_path):
    """GPT-2's class names buffers of old files by patterns that match its own `c_attn.bias` too."""
    bases.write_base(tmp_path, "gpt2")
    assert loading.unused_tensors(loading.load_shapes(tmp_path), tmp_path) == []


@pytest.mark.parametrize(
    ("value", "is_refused"), [([48, 48], False), ([48, -1], True), ([], True), ("48", True), (True, True)]
)
def test_sizes_by_layer_are_no_fault_of_config_json(tmp_path, value, is_refused):
    """Gemma-3n lists `intermediate_size` by layer."""
    base = tiny.base(tmp_path)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "intermediate_size": value}))
    with pytest.raises(StudentError, match="intermediate_size") if is_refused else nullcontext():
        check_base(base)
