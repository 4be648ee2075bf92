"""Test each way to train: that it changes what it should and nothing else, and resumes to the same bits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from tests.tiers import rest_is_slow
from tests.trainer import tiny
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from tests.trainer.training.test_faults_checkpoints import half_done
from trainer import config as settings
from trainer.data.collator import collate
from trainer.errors import ConfigError, StudentError
from trainer.evaluation.evaluate import evaluate
from trainer.model import four_bit, model
from trainer.model.forward import lora_forward
from trainer.publish import export
from trainer.training import checkpoint, flops, memory, optim
from trainer.training.forward import pack_loss
from trainer.training.inputs import read_inputs
from trainer.training.train import Trained, train

CPU = torch.device("cpu")
UNTIED = {"tie_word_embeddings": False}
FULL = {"train": {"method": "full", "lr": 1e-3}, "lora": {"rank": 32, "alpha": 64}}
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
    "full": (FULL, {}, set()),
    "last norm": ({"lora": {"modules_to_save": ["norm"]}}, {}, {"norm"}),
}
TRAIN = {"epochs": 2, "pack_tokens": 128, "batch_tokens": 128, "log_every": 1}


def toml_of(folder: Path, sections: dict[str, Any], shape: dict[str, Any]) -> Path:
    train_section = {**TRAIN, **sections.get("train", {})}
    toml = tiny.train_toml(folder, tiny.skill(16, held_out=4), **{**sections, "train": train_section})
    if shape:
        tiny.base(folder / "base", **shape)
    return toml


def trained_tensors(toml: Path) -> dict[str, torch.Tensor]:
    out = toml.parent / "out"
    files = [*out.glob("adapter/adapter_model.safetensors"), *out.glob("model/model.safetensors")]
    assert len(files) == 1
    return load_file(files[0])


def kind_of(name: str) -> str:
    """The part of an adapter's tensor name that says what was trained."""
    parts = name.split(".")
    added = next((part for part in parts if part.startswith("lora_")), "")
    return added or parts[-2]


NEED_BITSANDBYTES = ("qlora", "qlora and dora")
OTHERS = [method for method in METHODS if method not in NEED_BITSANDBYTES]


@pytest.mark.parametrize(
    "method",
    [
        *rest_is_slow(OTHERS, first=1),
        *(pytest.param(method, marks=pytest.mark.qlora) for method in NEED_BITSANDBYTES),
    ],
)
def test_a_method_trains_what_it_names_and_a_stopped_one_ends_with_the_same_bits(tmp_path, method):
    sections, shape, more = METHODS[method]
    whole = toml_of(tmp_path / "whole", sections, shape)
    done = train(settings.load(whole))
    parts = toml_of(tmp_path / "parts", sections, shape)
    half_done(parts, 2)
    assert train(settings.load(parts)).steps_now == done.steps - 2
    wanted, mine = (trained_tensors(toml) for toml in (whole, parts))
    assert wanted.keys() == mine.keys()
    assert all(torch.equal(wanted[name], mine[name]) for name in wanted)
    # A tied output layer is saved under both names.
    tied = {"lm_head"} if method == "embeddings" else set()
    if method != "full":
        assert {kind_of(name) for name in wanted} - tied == {"lora_A", "lora_B", *more}
    newest, _ = checkpoint.newest_valid(whole.parent / "out" / "checkpoints")
    assert newest is not None
    untrained = model.trainable_parameters(model.load_new_student(settings.load(whole), CPU))
    assert untrained.keys() == newest.adapter.keys()
    same = [n for n, p in untrained.items() if torch.equal(p.detach(), newest.adapter[n])]
    assert same == []
    lineage = json.loads((settings.load(whole).student_path / "lineage.json").read_text(encoding="utf-8"))
    assert lineage.get("base_quantised") == sections.get("student", {}).get("quantise")
    assert lineage.get("method") == sections.get("train", {}).get("method")


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


@pytest.mark.parametrize(
    "method",
    [
        *rest_is_slow(["full", "embeddings", "both ends", "last norm"], first=1),
        pytest.param("qlora", marks=pytest.mark.qlora),
    ],
)
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
    student = model.load_trained_student(config, config.student_path, CPU)
    with torch.no_grad():
        wanted = student(input_ids=torch.arange(3, 40)[None]).logits
    assert torch.allclose(load_file(out)["logits"], wanted, atol=1e-4)
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert ("NF4" in card) == (method == "qlora")


def test_a_fully_trained_student_is_a_model_of_its_own(tmp_path, run_trainer):  # noqa: F811
    toml = toml_of(tmp_path, FULL, {})
    code, out, err = run_trainer("plan", toml, "--probe", "2", "--json")
    assert code == 0, err
    plan = json.loads(out)
    parameters = sum(p.numel() for p in model.load_base(tmp_path / "base", CPU).parameters())
    assert plan["adapter_parameters"] == parameters
    assert plan["memory"]["base"] < 1024  # buffers
    assert plan["memory"]["moments"] == 8 * parameters
    assert any(f"a checkpoint takes {12 * parameters / 2**20:,.1f} MiB" in note for note in plan["notes"])
    assert run_trainer("train", toml)[0] == 0
    config = settings.load(toml)
    newest, _ = checkpoint.newest_valid(config.out_path / "checkpoints")
    assert newest is not None
    held = sum(t.numel() for t in (*newest.adapter.values(), *newest.moments.values()) if t.ndim)
    assert held == 3 * parameters
    before, after = load_file(tmp_path / "base" / "model.safetensors"), trained_tensors(toml)
    assert {name: t.shape for name, t in before.items()} == {name: t.shape for name, t in after.items()}
    assert not any(torch.equal(before[name], after[name]) for name in before)
    card = (config.student_path / "README.md").read_text(encoding="utf-8")
    assert "A full fine-tuning of" in card
    assert "LoRA" not in card
    assert not (config.out_path / "adapter").exists()
    code, out, err = run_trainer("evaluate", toml, "--json")
    assert code == 0, err
    loss = json.loads(out)["loss"]
    assert loss["student"] < loss["base"]
    code, _, err = run_trainer("export", toml, tmp_path / "merged", "--dtype", "bfloat16", "--json")
    assert code == 0, err
    written = load_file(tmp_path / "merged" / "model.safetensors")
    assert all(torch.equal(written[name], after[name].bfloat16()) for name in after)


def test_the_base_is_there_while_a_full_student_is_switched_off(tmp_path):
    config = settings.load(toml_of(tmp_path, FULL, {}))
    train(config)
    student = model.load_trained_student(config, config.student_path, CPU)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        trained = student(input_ids=ids).logits
        with student.disable_adapter():
            switched_off = student(input_ids=ids).logits
        assert torch.equal(student(input_ids=ids).logits, trained)
        assert torch.equal(model.load_base(config.base, CPU)(input_ids=ids).logits, switched_off)
    assert not torch.equal(trained, switched_off)


def test_the_arithmetic_of_a_full_training_is_counted(tmp_path):
    config = settings.load(toml_of(tmp_path, FULL, {}))
    student = model.load_new_student(config, CPU)
    inputs = read_inputs(config)
    pack = inputs.packs(0)[0]
    with FlopCounterMode(display=False) as seen:  # it doesn't see our attention
        pack_loss(student, collate(pack))[0].backward()
    channels = 2 * 2 * 48  # query and value of two layers
    attention = sum(6 * (len(example.ids) - 1) ** 2 * channels for example in pack)
    assert flops.flop_counter(student, causal=False)(pack) == seen.get_total_flops() + attention


def test_all_weights_have_a_default_learning_rate_of_their_own(tmp_path, run_trainer):  # noqa: F811
    toml = tiny.train_toml(
        tmp_path,
        tiny.skill(12),
        train={"method": "full", "max_steps": 2},
        lora={"rank": 32, "alpha": 64},
    )
    text = toml.read_text(encoding="utf-8")
    assert settings.load(toml).train.lr == 1e-2, "what is set stays"
    toml.write_text(text.replace("lr = 0.01\n", ""), encoding="utf-8")
    assert settings.load(toml).train.lr == settings.FULL_LR < settings.TrainSection().lr
    code, out, _ = run_trainer("plan", toml, "--probe", 0, "--json")
    assert code == 0
    assert any("peak learning rate of 2e-05" in note for note in json.loads(out)["notes"])
    # As an earlier version trained it: with the default of an adapter.
    toml.write_text(text.replace("lr = 0.01", "lr = 2e-4"), encoding="utf-8")
    assert run_trainer("train", toml)[0] == 0
    toml.write_text(text.replace("lr = 0.01\n", ""), encoding="utf-8")
    code, _, err = run_trainer("train", toml)
    assert code != 0
    assert "train.lr" in err


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"lora": {"rank": 4}}, "leave [lora] out"),
        ({**FULL, "student": {"quantise": "nf4"}}, "4 bits"),
        ({**FULL, "train": {"method": "full", "compile": True}}, "can't be compiled"),
    ],
)
def test_what_does_not_go_with_a_full_training_is_refused(tmp_path, run_trainer, sections, message):  # noqa: F811
    toml = tiny.train_toml(tmp_path, tiny.skill(4), **{"train": {"method": "full"}, **sections})
    code, _, err = run_trainer("train", toml)
    assert code == 2
    assert message in err


def test_a_full_training_is_not_split_over_processes(tmp_path):
    sections = {**FULL, "train": {**FULL["train"], "shard": "always"}}
    with pytest.raises(ConfigError, match="can't be split"):
        memory.needs_sharding(settings.load(tiny.train_toml(tmp_path, tiny.skill(4), **sections)), 2)


def test_tied_weights_that_the_files_hold_twice_change_in_both_places(tmp_path):
    config = settings.load(toml_of(tmp_path, FULL, {}))
    file = config.base / "model.safetensors"
    tensors = load_file(file)
    save_file(
        {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"}
    )
    train(config)
    after = load_file(config.student_path / "model.safetensors")
    assert torch.equal(after["lm_head.weight"], after["model.embed_tokens.weight"])
    assert not torch.equal(after["lm_head.weight"], tensors["model.embed_tokens.weight"])
    assert model.load_base(config.student_path, CPU)


@pytest.mark.qlora
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
        ({"modules_to_save": ["embed_token"]}, "'embed_token' .did you mean 'embed_tokens'"),
        ({"modules_to_save": ["wte"]}, "the embedding of this base is 'embed_tokens', its output layer 'lm_"),
        ({"modules_to_save": ["embed_tokens"], "trainable_tokens": ["<|im_end|>"]}, "rows of all tokens"),
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


@pytest.mark.qlora
def test_quantised_layers_are_counted_in_the_notes(tmp_path):
    config = settings.load(toml_of(tmp_path, METHODS["qlora"][0], {}))
    done: Trained = train(config)
    assert any("14 layers of the base in 4 bits" in note for note in done.notes)
    assert len(four_bit.layers_of(model.load_base_of(config, CPU))) == 14
