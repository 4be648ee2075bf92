"""Check faults that users of other tools report; `README.md` lists the threads and their tests."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer import config as settings
from trainer.data import dataset
from trainer.data.chat_template import Example, Renderer
from trainer.data.collator import collate
from trainer.data.held_out import held_out_examples
from trainer.data.order import Order
from trainer.errors import StudentError
from trainer.evaluation import evaluate
from trainer.model import model, self_test
from trainer.model.forward import losses, segment_attention
from trainer.model.forward.losses import cross_entropy_sum
from trainer.training.forward import supervised_logits


def documents() -> list[Example]:
    draw = np.random.default_rng(2)
    return [Example(draw.integers(3, 250, size=n).astype(np.int32), n // 2) for n in (40, 30, 24, 12)]


def test_a_naive_pack_has_another_loss_and_ours_has_the_true_one(learned):
    config, _ = learned
    student = model.load_trained_student(config, config.out_path / "adapter", torch.device("cpu"))
    student.set_attn_implementation(segment_attention.register())
    renderer = Renderer(model.load_tokenizer(config.base))
    pack = held_out_examples(dataset.read(config).held_out, renderer, config)

    def lost(examples) -> float:
        batch = collate(examples)
        return float(cross_entropy_sum(supervised_logits(student, batch), batch.targets)[0])

    def naive() -> float:  # one causal row, nobody tells where a document ends
        complete = collate([Example(np.concatenate([e.ids for e in pack]), 1)])
        kept, begin = [], 0
        for e in pack:
            kept += range(begin + e.prompt_length - 1, begin + len(e.ids) - 1)
            begin += len(e.ids)
        at = torch.tensor(kept)
        return float(cross_entropy_sum(supervised_logits(student, complete)[at], complete.targets[at])[0])

    with torch.no_grad():
        true = sum(lost([e]) for e in pack)
        assert lost(pack) == pytest.approx(true, rel=1e-6)
        assert abs(naive() - true) > 1e-4 * true  # the trap is there: without bounds the loss is another


def test_a_mask_is_refused_where_it_would_switch_isolation_off():
    q = torch.zeros(1, 2, 4, 8)
    [group] = collate([Example(np.zeros(5, np.int32), 1)]).segments
    ones = torch.ones(1, 4)
    with pytest.raises(StudentError, match="a mask"):
        segment_attention.attend(None, q, q, q, ones, segments=segment_attention.SegmentGroups((group,)))
    with pytest.raises(StudentError, match="without bounds"):
        segment_attention.attend(None, q, q, q, None, segments=segment_attention.SegmentGroups())


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


@pytest.mark.slow
def test_evaluation_never_holds_the_logits_of_a_pack(learned, monkeypatch):
    config, _ = learned
    monkeypatch.setattr(losses, "CHUNK_ROWS", 16)
    base = model.load_base(config.base, torch.device("cpu"))
    monkeypatch.setattr(self_test, "LENGTHS", (13, 9, 5, 2))  # the self-test lays its own logits out
    pack = documents() * 8
    supervised = sum(e.supervised for e in pack)
    with Largest(base.get_output_embeddings().weight) as seen:
        loss = evaluate.held_out_loss(base, pack, config)
    assert loss > 0
    assert 0 < seen.rows <= sum(self_test.LENGTHS) < supervised


def test_throughput_is_ours_and_never_zero(learned):
    import json

    config, done = learned
    log = [json.loads(line) for line in (config.out_path / "train.jsonl").read_text().splitlines()]
    assert all(0 < line["supervised_per_s"] < line["tokens_per_s"] for line in log)
    assert done.tokens_per_s > 0
