"""Control tokens whose embedding was never trained are found, refused, and can be trained."""

from __future__ import annotations

import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from tests.trainer import tiny
from tests.trainer.command_line import run_trainer, toml  # noqa: F401 - fixtures
from trainer.model import token_rows

START, END = 1, 2  # <|im_start|>, <|im_end|>
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
TRAINABLE = '[lora]\ntrainable_tokens = ["<|im_start|>", "<|im_end|>"]\n'


def change_rows(base, matrix: str, change) -> None:
    """Change a matrix in the base's file, in place."""
    file = base / "model.safetensors"
    tensors = load_file(file)
    change(tensors[matrix])
    save_file(tensors, file, metadata={"format": "pt"})


def zero(rows: torch.Tensor) -> None:
    rows[[START, END]] = 0.0


def copied(rows: torch.Tensor) -> None:
    rows[[START, END]] = rows[40].clone()


def shrunk(rows: torch.Tensor) -> None:
    rows[[START, END]] *= 1e-3


@pytest.mark.parametrize("change", [zero, copied, shrunk])
@pytest.mark.parametrize(("matrix", "tied"), [(EMBEDDING, True), (EMBEDDING, False), (OUTPUT, False)])
def test_rows_that_are_zero_short_or_copies_are_found(tmp_path, change, matrix, tied):
    base = tiny.base(tmp_path, tie_word_embeddings=tied)
    assert token_rows.untrained_tokens(base, {START, END, 30}, {END}) == []
    change_rows(base, matrix, change)
    result = token_rows.untrained_tokens(base, {START, END, 30}, {END})
    assert result == ([END] if matrix == OUTPUT else [START, END])


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize(
    "tied", [pytest.param(True, marks=pytest.mark.slow), pytest.param(False, marks=pytest.mark.slow)]
)
def test_untrained_control_tokens_are_refused_unless_their_rows_are_trained(run_trainer, toml, tied):  # noqa: F811
    base = toml.parent / "base"
    shutil.rmtree(base)
    tiny.base(base, tie_word_embeddings=tied)
    change_rows(base, EMBEDDING, zero)
    for verb in ("doctor", "train"):
        code, _, err = run_trainer(verb, toml)
        assert code == 1
        assert "<|im_start|>, <|im_end|>" in err
    code, out, _ = run_trainer("plan", toml, "--probe", "0")
    assert (code, "<|im_start|>, <|im_end|>" in out) == (0, True)

    toml.write_text(toml.read_text().replace("[lora]\n", TRAINABLE))
    assert run_trainer("doctor", toml)[0] == 0
    assert run_trainer("plan", toml, "--probe", "1")[0] == 0
    assert run_trainer("train", toml)[0] == 0
    assert run_trainer("evaluate", toml)[0] == 0
    merged = toml.parent / "merged"
    code, out, _ = run_trainer("export", toml, merged)
    assert (code, "rows of tokens" in out) == (0, True)

    ids = torch.tensor([[START, 30, 31, END, 40]])
    student = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), toml.parent / "out" / "adapter"
    )
    complete = AutoModelForCausalLM.from_pretrained(merged)
    assert torch.allclose(student(input_ids=ids).logits, complete(input_ids=ids).logits, atol=1e-5)
    before = load_file(base / "model.safetensors")[EMBEDDING]
    rows = complete.get_input_embeddings().weight
    assert bool((rows[[START, END]] != 0).any(dim=1).all())
    others = [i for i in range(len(rows)) if i not in (START, END)]
    assert torch.equal(rows[others], before[others])


def test_a_trainable_token_that_the_tokenizer_lacks_is_refused(run_trainer, toml):  # noqa: F811
    toml.write_text(toml.read_text().replace("[lora]\n", '[lora]\ntrainable_tokens = ["<|nobody|>"]\n'))
    code, _, err = run_trainer("train", toml)
    assert (code, "'<|nobody|>'" in err) == (2, True)
