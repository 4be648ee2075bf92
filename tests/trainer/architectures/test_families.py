"""Run every family of students through the verbs, and compare its rows with transformers' own forward."""

from __future__ import annotations

import json

import pytest
import torch

from tests.trainer.architectures import bases, families, sweep, verbs
from trainer import config as settings
from trainer.model import self_test, structure
from trainer.training import forward, student
from trainer.training.distributed import World
from trainer.training.inputs import read_inputs

# Families of the default suite: one of each kind of layout and head, and a multimodal folder.
QUICK = ("lfm2", "gpt2", "gemma3_folder")

# The family that the default suite takes through every verb; the slow tests take a multimodal folder, too.
QUICK_VERBS = ("gpt2",)
SLOW_VERBS = ("gemma3_folder",)

# Families whose rows can't be packed, and the kind of reason.
UNPACKED = {
    "llama4_text": "a mask is lost",
    "qwen2_moe": "a mask is lost",
    "phimoe": "a mask is lost",
    "gemma2": "softcap",
    "gpt_oss": "s_aux",
    "bloom": "exchanged",
    "falcon": "exchanged",
    "xglm": "exchanged",
    "gpt_neo": "exchanged",
    "gptj": "exchanged",
    "stablelm": "without bounds",
    "nemotron": "without bounds",
    "qwen3_next": "see each other",
    "qwen3_5_text": "see each other",
    "qwen3_5_moe_text": "see each other",
    "qwen3_5_folder": "see each other",
    "olmo_hybrid": "see each other",
    "granitemoehybrid": "see each other",
    "lfm2": "see each other",
    "lfm2_moe": "see each other",
    "bamba": "see each other",
    "jamba": "see each other",
    "recurrent_gemma": "see each other",
    "falcon_h1": "see each other",
    "mamba": "see each other",
    "mamba2": "see each other",
}


def marked(quick, slow=()):
    """Return all families; those in neither `quick` nor `slow` run with `make test-families` only."""
    marks = {**dict.fromkeys(slow, pytest.mark.slow), **dict.fromkeys(quick, ())}
    return [
        pytest.param(family, marks=marks.get(family, pytest.mark.families)) for family in families.FAMILIES
    ]


def loaded(folder, family):
    """Return configuration, inputs and a student with a perturbed adapter, in evaluation mode."""
    path = bases.train_toml(folder, family, train={"pack_tokens": 2048, "batch_tokens": 4096})
    config = settings.load(path)
    inputs = read_inputs(config)
    made = student.load_student(config, inputs.largest_pack, World())
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in made.parameters.values():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    made.model.eval()  # some families have dropout of their own
    return config, inputs, made


def loss_and_gradient(made, packs):
    """Return the summed loss over packs, and the adapter's gradient as one vector."""
    made.model.zero_grad()
    total = 0.0
    for pack in packs:
        for loss, _ in forward.pack_losses(made.model, pack, made.device, made.forward, made.row_loss):
            loss.backward()
            total += float(loss.detach())
    return total, gradient(made)


def gradient(made):
    return torch.cat([(p.grad if p.grad is not None else p * 0).flatten() for p in made.parameters.values()])


def own_loss_and_gradient(made, examples):
    """Return the same, one document at a time through transformers' own forward and logits."""
    base = structure.base_model_of(made.model)
    made.model.zero_grad()
    base.set_attn_implementation(self_test.own_attention(base))
    total = 0.0
    for example in examples:
        ids = torch.tensor(example.ids[:-1].astype("int64"))[None]
        targets = torch.tensor(example.ids[example.prompt_length :].astype("int64"))
        logits = made.model(input_ids=ids, use_cache=False).logits[0, example.prompt_length - 1 :]
        loss = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
        loss.backward()
        total += float(loss.detach())
    return total, gradient(made)


@pytest.mark.parametrize("family", marked(QUICK))
def test_packs_lose_what_documents_alone_lose_by_the_models_own_forward(tmp_path, family):
    _, inputs, made = loaded(tmp_path, family)
    examples = inputs.dataset.examples
    assert made.forward.layout.packed is (family not in UNPACKED)
    assert UNPACKED.get(family, "") in made.forward.note
    complete, together = loss_and_gradient(made, [examples])
    apart, alone = loss_and_gradient(made, [[example] for example in examples])
    own, theirs = own_loss_and_gradient(made, examples)
    assert complete == pytest.approx(own, rel=1e-5)
    assert apart == pytest.approx(own, rel=1e-5)
    assert float(((together - theirs).norm() / theirs.norm()).detach()) < 1e-3
    assert float(((alone - theirs).norm() / theirs.norm()).detach()) < 1e-3


@pytest.mark.parametrize("family", marked(QUICK_VERBS, SLOW_VERBS))
def test_every_verb_works_and_plain_peft_loads_the_adapter(tmp_path, family):
    path = bases.train_toml(tmp_path, family, train={"log_every": 1}, evaluate={"max_new_tokens": 4})
    for verb in verbs.VERBS:
        code, err = verbs.run_verb(verb, path)
        assert code == 0, err
    parity = json.loads((tmp_path / "merged" / "parity.json").read_text())
    assert parity["max_logit_difference"] < 1e-3
    assert verbs.plain_peft_difference(path) < 1e-5


@pytest.mark.parametrize(
    ("name", "reason"),
    [("bert", "looks ahead"), ("xmod", "own forward fails")],  # no tiny copy of xmod runs
)
def test_a_student_that_can_not_be_trained_is_refused_by_every_verb(tmp_path, name, reason):
    path = bases.toml_without_base(tmp_path)
    sweep.write_base(name, tmp_path / "base")
    for verb in verbs.VERBS:
        code, err = verbs.run_verb(verb, path)
        assert code in sweep.REFUSALS
        assert (reason in err) is (verb in ("plan", "doctor", "train"))  # the others have no adapter
