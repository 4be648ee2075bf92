"""What users of other tools complain about, a row each, and where it is tested: elsewhere, or below."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer import config as settings
from trainer.data import dataset
from trainer.data.chat_template import Example, Renderer
from trainer.data.collator import collate
from trainer.data.order import Order
from trainer.errors import StudentError
from trainer.evaluation import evaluate
from trainer.model import losses, model, segment_attention
from trainer.model.losses import cross_entropy_sum
from trainer.training.step import supervised_logits

TESTS = Path(__file__).resolve().parent.parent
# Thread -> file and start of a test's name, below tests/trainer. Threads about soft targets are left out:
# nothing here reads any yet.
ROWS = {
    "trl#1623 end of sequence never learned": "data/test_faults_corpus.py::test_23_pad_that_equals_eos",
    "trl#2059 rambles past its end": "publish/test_export.py::test_a_server_that_opens_the_folder",
    "alignment-handbook#127 two BOS tokens": "data/test_chat_template.py::test_supervised_is_the_answer",
    "transformers#34172 no generation marks": "data/test_chat_template.py::test_supervised_is_the_answer",
    "unsloth#2900 all labels masked": "evaluation/test_doctor.py::test_a_planted_fault_is_fatal",
    "unsloth#2771 show a coloured sample": "evaluation/test_doctor.py::test_the_page_shows_every_check",
    "trl#6105 apply_chat_template changed": "data/test_chat_template.py::test_supervised_is_the_answer",
    "trl#5213 the prompt is no prefix": "data/test_chat_template.py::test_a_merge_over_the_border",
    "trl#6361 reasoning stripped": "data/test_chat_template.py::test_reasoning_is_kept",
    "LLaMA-Factory#9092 empty think block learned": "data/test_chat_template.py::test_reasoning_is_kept",
    "trl#805 packing contaminates": "training/test_exactness.py::test_no_document_sees_another",
    "functionary#265 naive packs lose more": "test_traps.py::test_a_naive_pack",
    "transformers#46634 a mask switches isolation off": "test_traps.py::test_a_mask_is_refused",
    "LLaMA-Factory#5426 packing changes the batch": "test_traps.py::test_a_step_has_its_tokens",
    "unsloth: 8k tiny documents in a pack": "data/test_packing.py::test_every_example_sits_once",
    "transformers#37766 accumulation": "training/test_accumulation.py::test_one_by_eight",
    "axolotl#3271 evaluation has its own loss": "evaluation/test_evaluate.py::test_the_held_out_loss",
    "trl#2215 ids without an embedding": "data/test_faults_corpus.py::test_23_ids_without",
    "peft#1388 the merged model differs": "publish/test_export.py::test_merged_in_fp32",
    "transformers#45127 tied embeddings": "publish/test_export.py::test_an_adapter_on_a_tied",
    "vllm#9280 the adapter can't be served": "publish/test_serving.py::test_vllm_is_told",
    "ollama#8363 another template when served": "publish/test_serving.py::test_the_modelfile_renders",
    "accelerate#2016 resume repeats rows": "training/test_faults_checkpoints.py::test_09_10_11",
    "LLaMA-Factory#4026 logits fill memory": "test_traps.py::test_evaluation_never_holds",
    "peft#2421 a base silently in fp32": "training/test_faults_numbers.py::test_35",
    "Liger#827 a kernel that computes something else": "model/test_losses.py::test_the_chunked_head",
    "TRL#7076 gradient of a frozen head": "model/test_losses.py::test_the_chunked_head",
    "trl#4568 fails on the first real run": "../journey/",
    "DeepSpeed#5304 no estimate of memory": "training/test_memory.py::test_the_predicted_peak",
    "LLaMA-Factory#3646 throughput 0": "test_traps.py::test_throughput",
}


def names(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS)
def test_every_row_has_its_test(row):
    path, _, start = ROWS[row].partition("::")
    if path.endswith("/"):
        assert list((TESTS / "trainer" / path).glob("test_*.py"))
    else:
        assert any(name.startswith(start) for name in names(TESTS / "trainer" / path))


def test_every_fault_of_the_catalogue_has_its_test():
    found: set[int] = set()
    for path in (TESTS / "trainer").rglob("test_*.py"):
        for name in names(path):
            for word in name.removeprefix("test_").split("_"):
                if not word.isdigit():
                    break
                found.add(int(word))
    assert found == set(range(1, 37))


def documents() -> list[Example]:
    draw = np.random.default_rng(2)
    return [Example(draw.integers(3, 250, size=n).astype(np.int32), n // 2) for n in (40, 30, 24, 12)]


def test_a_naive_pack_has_another_loss_and_ours_has_the_true_one(learned):
    config, _ = learned
    student = model.load_trained_student(config, config.out_path / "adapter", torch.device("cpu"))
    student.set_attn_implementation(segment_attention.register())
    renderer = Renderer(model.load_tokenizer(config.base))
    pack = evaluate.held_out_examples(dataset.read(config).held_out, renderer, config)

    def lost(examples) -> float:
        batch = collate(examples)
        return float(cross_entropy_sum(supervised_logits(student, batch), batch.targets)[0])

    def naive() -> float:  # one causal row, nobody tells where a document ends
        whole = collate([Example(np.concatenate([e.ids for e in pack]), 1)])
        kept, begin = [], 0
        for e in pack:
            kept += range(begin + e.prompt_length - 1, begin + len(e.ids) - 1)
            begin += len(e.ids)
        at = torch.tensor(kept)
        return float(cross_entropy_sum(supervised_logits(student, whole)[at], whole.targets[at])[0])

    with torch.no_grad():
        true = sum(lost([e]) for e in pack)
        assert lost(pack) == pytest.approx(true, rel=1e-6)
        assert abs(naive() - true) > 1e-4 * true  # the trap is there: without bounds the loss is another


def test_a_mask_is_refused_where_it_would_switch_isolation_off():
    q = torch.zeros(1, 2, 4, 8)
    [group] = collate([Example(np.zeros(5, np.int32), 1)]).segments
    ones = torch.ones(1, 4)
    with pytest.raises(StudentError, match="a mask"):
        segment_attention.attend(None, q, q, q, ones, segments=(group,))
    with pytest.raises(StudentError, match="a mask"):
        segment_attention.attend(None, q, q, q, None, segments=())


@pytest.mark.parametrize("pack_tokens", [128, 256, 1024])
def test_a_step_has_its_tokens_however_it_is_packed(pack_tokens):
    lengths = [8 + i * 7 % 90 for i in range(400)]
    order = Order(
        lengths, settings.TrainSection(epochs=1, batch_tokens=1024, max_length=100, pack_tokens=pack_tokens)
    )
    tokens = [sum(lengths[i] for p in order.packs(s) for i in p) for s in range(order.steps - 1)]
    assert sorted(tokens)[1] > 0.95 * 1024  # all but the one that holds what was left over
    assert order.steps == -(-sum(lengths) // 1024)  # so the steps of an epoch don't depend on packing
    assert max(tokens) <= 1024


class Largest(TorchDispatchMode):
    """The most rows of logits that were ever alive in one tensor."""

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.vocabulary, self.rows = weight.shape[0], 0
        self.weight = weight.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, torch.Tensor) or tensor.untyped_storage().data_ptr() == self.weight:
                continue
            if tensor.ndim >= 2 and tensor.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, tensor.numel() // self.vocabulary)
        return out


def test_evaluation_never_holds_the_logits_of_a_pack(learned, monkeypatch):
    config, _ = learned
    monkeypatch.setattr(losses, "CHUNK_ROWS", 16)
    base = model.load_base(config.base, torch.device("cpu"))
    pack = documents() * 8
    supervised = sum(e.supervised for e in pack)
    with Largest(base.get_output_embeddings().weight) as seen:
        loss = evaluate.held_out_loss(base, pack, config)
    assert loss > 0
    assert 0 < seen.rows <= 16 < supervised


def test_throughput_is_ours_and_never_zero(learned):
    import json

    config, done = learned
    log = [json.loads(line) for line in (config.out_path / "train.jsonl").read_text().splitlines()]
    assert all(0 < line["supervised_per_s"] < line["tokens_per_s"] for line in log)
    assert done.tokens_per_s > 0
