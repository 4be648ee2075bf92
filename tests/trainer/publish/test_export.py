"""Check the export: merged in fp32, equal to base and adapter, compared from disk and in a fresh process."""

from __future__ import annotations

import json
import shlex
import warnings

import peft
import pytest
import torch
import transformers
from peft.tuners.lora.layer import Linear
from safetensors.torch import load_file, save_file

from tests.trainer import tiny
from tests.trainer.architectures import bases, families
from tests.trainer.chat_templates import SHAPES
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from trainer import config as settings
from trainer.data.chat_template import Renderer
from trainer.errors import ConfigError, StudentError
from trainer.model import model, weights
from trainer.publish import export, merge
from trainer.training.train import train

KINDS = {
    "lora": ({}, {}),
    "rslora": ({"rslora": True}, {}),
    "dora": ({"dora": True}, {}),
    "tied": ({}, {"tie_word_embeddings": True}),
    "head": ({"target": ["lm_head", "q_proj"]}, {"tie_word_embeddings": False}),
}


def in_bfloat16(base):
    """Rewrite a base in bf16: its weights and the dtype in its configuration."""
    file = base / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
    config = base / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "dtype": "bfloat16"}))


def trained(folder, lora=None, shape=None, speech=None, change_base=lambda _: None, **sections):
    path = tiny.train_toml(folder, tiny.skill(24), lora=lora or {}, **sections)
    tiny.base(folder / "base", speech=speech, **(shape or {"tie_word_embeddings": False}))
    change_base(folder / "base")
    config = settings.load(path)
    train(config)
    return config


@pytest.mark.slow  # a fresh process for each
@pytest.mark.parametrize("kind", KINDS)
def test_33_adapter_and_merged_folder_give_a_fresh_process_equal_logits(tmp_path, fork_server, kind):
    lora, shape = KINDS[kind]
    config = trained(tmp_path, lora, shape)
    parity = export.export_merged(config, tmp_path / "merged")
    assert parity["fold_difference"] <= 1e-5
    assert parity["max_logit_difference"] <= 1e-5
    assert parity["greedy_agreement"] == 1
    assert json.loads((tmp_path / "merged" / "parity.json").read_text()) == parity
    result = {}
    for name, values in {
        "base": {"base": config.base},
        "adapter": {"base": config.base, "adapter": config.out_path / "adapter"},
        "merged": {"base": tmp_path / "merged"},
    }.items():
        ended = fork_server("logits", out=tmp_path / f"{name}.logits", **values)
        assert ended["code"] == 0, ended["err"]
        result[name] = load_file(tmp_path / f"{name}.logits")["logits"]
    assert torch.allclose(result["adapter"], result["merged"], atol=1e-5)
    assert not torch.allclose(result["base"], result["merged"], atol=1e-3)
    stored = load_file(tmp_path / "merged" / "model.safetensors")
    assert ("lm_head.weight" in stored) is not shape.get("tie_word_embeddings", False)


TOKENS = {"trainable_tokens": ["<|im_start|>", "<|im_end|>"]}


@pytest.mark.parametrize(
    ("lora", "shape"),
    [
        (TOKENS, {"tie_word_embeddings": True}),
        pytest.param(TOKENS, {"tie_word_embeddings": False}, marks=pytest.mark.slow),
        pytest.param({"dora": True}, {"tie_word_embeddings": False}, marks=pytest.mark.slow),
    ],
)
def test_the_merged_weights_are_those_of_pefts_own_merge(tmp_path, lora, shape):
    config = trained(tmp_path, lora, shape)
    export.export_merged(config, tmp_path / "merged")
    assert_merged_as_by_peft(config, tmp_path)
    before, after = (
        load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
        for folder in (config.base, tmp_path / "merged")
    )
    ids = model.load_tokenizer(config.base).convert_tokens_to_ids(lora.get("trainable_tokens", []))
    changed = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert changed == sorted(ids)


def test_experts_that_transformers_stores_otherwise_are_merged_under_the_names_of_the_base(tmp_path):
    config = settings.load(bases.train_toml(tmp_path, "mixtral", train={"max_steps": 2}))
    train(config)
    export.export_merged(config, tmp_path / "merged")
    assert_merged_as_by_peft(config, tmp_path)
    before, after = (load_file(f / "model.safetensors") for f in (config.base, tmp_path / "merged"))
    assert before.keys() == after.keys()
    experts = [name for name in before if ".experts." in name]
    assert len(experts) == 24
    assert not any(torch.equal(before[name], after[name]) for name in experts)


def test_adapters_inside_a_module_with_parameters_of_its_own_are_merged_once(tmp_path):
    """A model may hold a parameter beside its layers, such as the first state of a recurrence."""
    config = trained(tmp_path)
    student = model.load_trained_student(config, config.out_path / "adapter", torch.device("cpu"))
    student.get_base_model().model.state = torch.nn.Parameter(torch.zeros(3))
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        learned = student(input_ids=ids, use_cache=False).logits
        with merge.float32_forward(student, merge=True):
            merged = student(input_ids=ids, use_cache=False).logits
    assert torch.allclose(learned, merged, atol=1e-5)


def assert_merged_as_by_peft(config, folder):
    """Compare the merged folder with what transformers and PEFT alone make of base and adapter."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = transformers.AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.float32)
        plain = peft.PeftModel.from_pretrained(plain, config.out_path / "adapter").merge_and_unload()
        plain.save_pretrained(folder / "by-peft")
    theirs, ours = (load_file(folder / name / "model.safetensors") for name in ("by-peft", "merged"))
    assert theirs.keys() == ours.keys()
    differing = [name for name in theirs if not torch.allclose(theirs[name], ours[name], atol=1e-6)]
    assert not differing


# Limit of the memory test: bytes a parameter beyond the base's file, and what an export of any size takes.
MAX_BYTES = 2.5
FIXED_BYTES = 48 << 20


@pytest.mark.slow  # the base must be large enough to show a copy of itself
def test_an_export_holds_the_base_and_little_more(tmp_path, fork_server):
    """Measured in a process of its own. Three copies of the model in fp32 took 12 bytes a parameter."""
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "vocab_size": 320}
    config = wide_student(tmp_path, "mixtral", wide)
    ended = fork_server("export", toml=tmp_path / "train.toml", out=tmp_path / "memory.json")
    assert ended["code"] == 0, ended["err"]
    used = json.loads((tmp_path / "memory.json").read_text())
    parameters = sum(torch.Size(shape).numel() for shape in weights.tensor_shapes(config.base).values())
    file = (config.base / "model.safetensors").stat().st_size
    assert 2 * parameters > FIXED_BYTES  # a copy in bf16 would pass the limit
    assert used["peak"] - used["before"] < file + MAX_BYTES * parameters + FIXED_BYTES


def wide_student(folder, family, shape):
    """A base in bf16 with a trained adapter; returns the configuration."""
    path = bases.train_toml(folder, family, train={"max_steps": 1, "batch_tokens": 128})
    config = settings.load(path)
    made = families.configuration(family)
    for name, value in shape.items():
        setattr(made, name, value)
    for file in config.base.glob("*.safetensors*"):
        file.unlink()
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(made, dtype=torch.bfloat16).save_pretrained(config.base)
    train(config)
    return config


def test_an_adapter_on_a_tied_output_layer_is_refused_before_it_is_lost(tmp_path):
    with pytest.raises(StudentError, match="lm_head is tied"):
        trained(tmp_path, {"target": ["lm_head"]}, {"tie_word_embeddings": True})


def test_merged_in_fp32_then_cast_once(tmp_path):
    config = trained(tmp_path)
    full = export.export_merged(config, tmp_path / "full", "float32")
    half = export.export_merged(config, tmp_path / "half", "bfloat16")
    assert (full["dtype"], half["dtype"]) == ("float32", "bfloat16")
    assert full["fold_difference"] == half["fold_difference"]
    assert 0 < half["mean_logit_difference"] <= half["max_logit_difference"] < 0.05
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("full", "half"))
    assert all(torch.equal(first[name].to(torch.bfloat16), second[name]) for name in first)  # cast last, once
    with pytest.raises(ConfigError, match="no such dtype"):
        export.export_merged(config, tmp_path / "odd", "int4")


def test_a_base_in_bf16_stays_bf16(tmp_path):
    config = trained(tmp_path, change_base=in_bfloat16)
    assert export.export_merged(config, tmp_path / "merged")["dtype"] == "bfloat16"


def with_a_token_beyond_the_embedding(base):
    """Add a token to the tokenizer only, as Llama 2's users add one to pad with."""
    speech = model.load_tokenizer(base)
    speech.add_tokens(["<|pad2|>"], special_tokens=True)
    speech.save_pretrained(base)
    assert len(speech) > weights.vocabulary_size(base)


def test_a_tokenizer_with_more_ids_than_the_embedding_is_exported_without_a_bar(tmp_path, run_trainer):  # noqa: F811
    trained(tmp_path, change_base=with_a_token_beyond_the_embedding)
    code, _, err = run_trainer("export", tmp_path / "train.toml", tmp_path / "merged")
    assert code == 0, err
    assert "Writing model shards" not in err


def damage_written_file(monkeypatch):
    original = merge.write_safetensors

    def write_and_damage(file, entries, tensors):
        hashes = original(file, entries, tensors)
        stored = load_file(file)
        stored["model.norm.weight"] = stored["model.norm.weight"] * 1.001
        save_file(stored, file, metadata={"format": "pt"})
        return hashes

    monkeypatch.setattr(merge, "write_safetensors", write_and_damage)


def merge_nothing(monkeypatch):
    monkeypatch.setattr(Linear, "merge", lambda self, **_: None)


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        (damage_written_file, "not the merged ones: model.norm.weight"),
        (merge_nothing, "merging the adapter changes"),
    ],
)
def test_a_merge_that_is_not_equal_fails_and_leaves_nothing(tmp_path, monkeypatch, plant, message):
    config = trained(tmp_path)
    plant(monkeypatch)
    with pytest.raises(StudentError, match=message):
        export.export_merged(config, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert not list(tmp_path.glob(".merged*"))


def test_the_folder_of_something_else_is_not_overwritten(tmp_path):
    config = trained(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="something else"):
        export.export_merged(config, tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
    for _ in range(2):  # an earlier merge is replaced
        export.export_merged(config, tmp_path / "merged")


@pytest.mark.parametrize("name", ["llama-3", pytest.param("qwen-3", marks=pytest.mark.slow)])
def test_a_server_that_opens_the_folder_renders_as_was_learned(tmp_path, fork_server, run_trainer, name):  # noqa: F811
    shape = SHAPES[name]
    config = trained(tmp_path, speech=shape.tokenizer())
    code, out, _ = run_trainer("export", tmp_path / "train.toml", tmp_path / "merged")
    assert code == 0
    renderer = Renderer(model.load_tokenizer(config.base))
    talk = [{"role": "user", "content": "backwards: abcd"}]
    for folder in (config.out_path / "adapter", tmp_path / "merged"):
        ended = fork_server("prompt", folder=folder, messages=talk, out=tmp_path / "ids")
        assert ended["code"] == 0, ended["err"]
        assert json.loads((tmp_path / "ids").read_text()) == renderer.prompts([talk])[0]
        eos = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
        assert (eos if isinstance(eos, int) else eos[0]) == renderer.chat_shape.stop_id
        assert json.loads((folder / "lineage.json").read_text())["teachers"]
        assert "mock-teacher" in (folder / "README.md").read_text()
    lines = [line.strip() for line in out.splitlines()]
    merged = str(tmp_path / "merged")
    served = ["vllm", "serve", merged, "--served-model-name", "out", "--dtype", "float32"]
    assert shlex.join(served) in lines
    assert shlex.join(["ollama", "create", "out", "-f", f"{merged}/Modelfile"]) in lines
    assert shlex.join(["llama-server", "-m", f"{tmp_path}/out.gguf", "--jinja"]) in lines
    assert any(line.startswith(f"an answer ends at {shape.stop};") for line in lines)
    assert any("--max-lora-rank 8" in line for line in lines)
