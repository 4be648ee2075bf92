"""Test each way to train: that it changes what it should and nothing else, and resumes to the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file

from tests.tiers import rest_is_slow
from tests.trainer import tiny
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from tests.trainer.training.test_faults_checkpoints import half_done
from trainer import config as settings
from trainer.errors import StudentError
from trainer.evaluation.evaluate import evaluate
from trainer.model import four_bit, lora_forward, model
from trainer.publish import export
from trainer.training import checkpoint, optim
from trainer.training.train import Trained, train

CPU = torch.device("cpu")
UNTIED = {"tie_word_embeddings": False}
# The sections of train.toml, the base's shape, and which trained tensors there are beside A and B.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], set[str]]] = {
    "qlora": ({"student": {"quantise": "nf4"}}, {}, set()),
    "embeddings": ({"lora": {"modules_to_save": ["embed_tokens"]}}, {}, {"embed_tokens"}),
    "qlora and dora": (
        {"student": {"quantise": "nf4"}, "lora": {"dora": True}},
        {},
        {"lora_magnitude_vector"},
    ),
    "dora": ({"lora": {"dora": True}}, {}, {"lora_magnitude_vector"}),
    "rslora": ({"lora": {"rslora": True}}, {}, set()),
    "lora+": ({"lora": {"plus_ratio": 8.0}}, {}, set()),
    "both ends": (
        {"lora": {"modules_to_save": ["embed_tokens", "lm_head"]}},
        UNTIED,
        {"embed_tokens", "lm_head"},
    ),
    "last norm": ({"lora": {"modules_to_save": ["norm"]}}, {}, {"norm"}),
}
TRAIN = {"epochs": 2, "pack_tokens": 128, "batch_tokens": 128, "log_every": 1}


def toml_of(folder: Path, sections: dict[str, Any], shape: dict[str, Any]) -> Path:
    train_section = {**TRAIN, **sections.get("train", {})}
    toml = tiny.train_toml(folder, tiny.skill(16, held_out=4), **{**sections, "train": train_section})
    if shape:
        tiny.base(folder / "base", **shape)
    return toml


def kind_of(name: str) -> str:
    """The part of an adapter's tensor name that says what was trained."""
    parts = name.split(".")
    added = next((part for part in parts if part.startswith("lora_")), "")
    return added or parts[-2]


@pytest.mark.parametrize("method", rest_is_slow(METHODS, first=2))
def test_a_method_trains_what_it_names_and_a_stopped_one_ends_with_the_same_bits(tmp_path, method):
    sections, shape, more = METHODS[method]
    whole = toml_of(tmp_path / "whole", sections, shape)
    done = train(settings.load(whole))
    parts = toml_of(tmp_path / "parts", sections, shape)
    half_done(parts, 2)
    assert train(settings.load(parts)).steps_now == done.steps - 2
    wanted, mine = (
        load_file(toml.parent / "out" / "adapter" / "adapter_model.safetensors") for toml in (whole, parts)
    )
    assert wanted.keys() == mine.keys()
    assert all(torch.equal(wanted[name], mine[name]) for name in wanted)
    # A tied output layer is saved under both names.
    tied = {"lm_head"} if method == "embeddings" else set()
    assert {kind_of(name) for name in wanted} - tied == {"lora_A", "lora_B", *more}
    newest, _ = checkpoint.newest_valid(whole.parent / "out" / "checkpoints")
    assert newest is not None
    untrained = model.trainable_parameters(model.load_new_student(settings.load(whole), CPU))
    assert untrained.keys() == newest.adapter.keys()
    same = [n for n, p in untrained.items() if torch.equal(p.detach(), newest.adapter[n])]
    assert same == []
    lineage = json.loads((whole.parent / "out" / "adapter" / "lineage.json").read_text(encoding="utf-8"))
    assert lineage.get("base_quantised") == sections.get("student", {}).get("quantise")


def test_a_training_without_these_methods_has_no_word_of_them(learned):
    """Settings, lineage and configuration of earlier versions: theirs must resume."""
    config, _ = learned
    newest, _ = checkpoint.newest_valid(config.out_path / "checkpoints")
    assert newest is not None
    words = ("quantise", "modules_to_save", "method", "trackers", "show_answers")
    assert [key for key in newest.state["settings"] if any(word in key for word in words)] == []
    lineage = (config.out_path / "adapter" / "lineage.json").read_text(encoding="utf-8")
    assert "quantised" not in lineage
    dumped = config.model_dump_json()
    assert [word for word in words if word in dumped] == []


@pytest.mark.parametrize("kind", ["lora", "rslora"])
def test_rslora_scales_by_the_root_of_the_rank(tmp_path, kind):
    toml = tiny.train_toml(tmp_path, tiny.skill(4), lora={"rank": 16, "alpha": 8, "rslora": kind == "rslora"})
    student = model.load_new_student(settings.load(toml), CPU)
    scales = {m.scaling["default"] for m in student.modules() if isinstance(m, LoraLayer)}
    assert scales == {8 / 4 if kind == "rslora" else 8 / 16}


def test_lora_plus_gives_b_its_own_learning_rate(tmp_path):
    toml = tiny.train_toml(tmp_path, tiny.skill(4), lora={"plus_ratio": 8.0}, train={"lr": 1e-3})
    config = settings.load(toml)
    named = model.trainable_parameters(model.load_new_student(config, CPU))
    optimiser = optim.adamw(named.items(), config.train, config.lora)
    names = {id(p): name for name, p in named.items()}
    rates = {
        group["lr"]: {"lora_B" in names[id(p)] for p in group["params"]} for group in optimiser.param_groups
    }
    assert rates == {1e-3: {False}, 8e-3: {True}}


@pytest.mark.parametrize("method", rest_is_slow(["embeddings", "qlora", "both ends", "last norm"], first=1))
def test_the_merged_student_answers_as_base_and_adapter(tmp_path, method, fork_server):
    sections, shape, _ = METHODS[method]
    config = settings.load(toml_of(tmp_path, sections, shape))
    train(config)
    parity = export.export_merged(config, tmp_path / "merged")
    assert parity["fold_difference"] <= 1e-5
    assert parity["max_logit_difference"] <= 1e-4
    out = tmp_path / "logits"
    ended = fork_server("logits", base=tmp_path / "merged", out=out)
    assert (ended["code"], ended["signal"]) == (0, 0), ended["err"]
    student = model.load_trained_student(config, config.out_path / "adapter", CPU)
    with torch.no_grad():
        wanted = student(input_ids=torch.arange(3, 40)[None]).logits
    assert torch.allclose(load_file(out)["logits"], wanted, atol=1e-4)
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert ("NF4" in card) == (method == "qlora")


def test_a_base_in_four_bits_is_the_one_that_is_evaluated(tmp_path):
    toml = toml_of(tmp_path, METHODS["qlora"][0], {})
    config = settings.load(toml)
    train(config)
    card = evaluate(config)
    assert card["speed"]["student"]["parameters"] == sum(
        p.numel() for p in model.load_base(config.base, CPU).parameters()
    )
    toml.write_text(toml.read_text(encoding="utf-8").replace('quantise = "nf4"', ""), encoding="utf-8")
    with pytest.raises(StudentError, match="quantise = 'nf4'"):
        evaluate(settings.load(toml))


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"modules_to_save": ["lm_head"]}, "lm_head is tied"),
        ({"modules_to_save": ["embed_token"]}, "no module is named 'embed_token'"),
        ({"modules_to_save": ["q_proj"], "target": ["q_proj", "v_proj"]}, "as a whole and have an adapter"),
    ],
)
def test_a_module_that_can_not_be_trained_as_a_whole_is_refused_by_name(tmp_path, lora, message):
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(4), lora=lora))
    with pytest.raises(StudentError, match=message):
        model.load_new_student(config, CPU)


def test_a_whole_module_is_fp32_over_a_narrow_base(tmp_path):
    """As on CUDA: the base is bf16, the trained copy fp32, and its forward in bf16."""
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(4)))
    base = model.load_base(config.base, CPU, dtype=torch.bfloat16)
    lora = config.lora.model_copy(update={"modules_to_save": ("embed_tokens", "norm")})
    student = model.adapter.add_adapter(base, lora).train()
    lora_forward.replace_lora_forward(student)
    logits = student(input_ids=torch.arange(3, 40)[None]).logits
    assert logits.dtype == torch.bfloat16
    logits.float().square().sum().backward()
    trained = model.trainable_parameters(student)
    assert {p.dtype for p in trained.values()} == {torch.float32}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in trained.values())


def test_quantised_layers_are_counted_in_the_notes(tmp_path):
    config = settings.load(toml_of(tmp_path, METHODS["qlora"][0], {}))
    done: Trained = train(config)
    assert any("14 layers of the base in 4 bits" in note for note in done.notes)
    assert len(four_bit.layers_of(model.load_base_of(config, CPU))) == 14
