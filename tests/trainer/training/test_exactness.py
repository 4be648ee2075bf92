"""Test that packed equals unpacked, documents don't see each other, and folding changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.trainer import tiny
from trainer import config as settings
from trainer.data.chat_template import Example
from trainer.data.collator import collate
from trainer.model import model
from trainer.model.forward import lora_forward
from trainer.model.forward.losses import cross_entropy_sum
from trainer.training.forward import supervised_logits


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    folder = tmp_path_factory.mktemp("student")
    config = settings.load(tiny.train_toml(folder, tiny.skill(4)))
    made = model.load_new_student(config, torch.device("cpu"))
    with torch.no_grad():  # B starts at zero; an adapter that does nothing would prove nothing
        for name, p in made.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    return made


def examples(count: int = 9) -> list[Example]:
    draw = np.random.default_rng(3)
    made = []
    for i in range(count):
        length = int(draw.integers(4, 60))
        made.append(Example(draw.integers(3, 250, size=length).astype(np.int32), 1 + i % 3))
    return made


def gradients(student) -> dict[str, torch.Tensor]:
    result = {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}
    student.zero_grad()
    return result


def loss_of(student, pack) -> torch.Tensor:
    batch = collate(pack)
    return cross_entropy_sum(supervised_logits(student, batch), batch.targets)[0]


def test_a_pack_has_the_loss_and_gradients_of_its_documents_alone(student):
    pack = examples()
    together = loss_of(student, pack)
    together.backward()
    packed = gradients(student)
    alone = sum(loss_of(student, [e]) for e in pack)
    alone.backward()
    unpacked = gradients(student)
    assert torch.allclose(together, alone, rtol=1e-5)
    assert packed.keys() == unpacked.keys()
    worst = max(float((packed[n] - unpacked[n]).abs().max()) for n in packed)
    assert worst <= 1e-5 * max(1.0, max(float(g.abs().max()) for g in unpacked.values()))


def test_the_loss_is_that_of_transformers_own_forward(student):
    [example] = examples(1)
    ids = torch.from_numpy(example.ids.astype(np.int64))[None]
    labels = ids.clone()
    labels[:, : example.prompt_length] = -100
    student.base_model.model.set_attn_implementation("eager")
    try:
        theirs = student(input_ids=ids, labels=labels).loss * example.supervised
    finally:
        student.base_model.model.set_attn_implementation("distil_segments")
    assert torch.allclose(loss_of(student, [example]), theirs, rtol=1e-5)


def test_no_document_sees_another(student):
    pack = examples()
    before = collate(pack)
    changed = [Example(np.roll(e.ids, 1), e.prompt_length) if i == 4 else e for i, e in enumerate(pack)]
    with torch.no_grad():
        first, second = supervised_logits(student, before), supervised_logits(student, collate(changed))
    order = sorted(range(len(pack)), key=lambda i: -len(pack[i].ids))
    rows = torch.cat([torch.full((pack[i].supervised,), i) for i in order])
    assert torch.equal(first[rows != 4], second[rows != 4])
    assert not torch.equal(first[rows == 4], second[rows == 4])


def test_how_a_step_is_cut_into_packs_changes_no_gradient(student):
    pack = examples(8)
    total = sum(e.supervised for e in pack)
    (loss_of(student, pack) / total).backward()
    complete = gradients(student)
    for e in pack:
        (loss_of(student, [e]) / total).backward()
    cut = gradients(student)
    assert all(torch.allclose(complete[n], cut[n], atol=1e-6) for n in complete)


def test_folding_changes_neither_loss_nor_gradient(student, tmp_path):
    pack = examples()
    plain = loss_of(student, pack)
    plain.backward()
    before = gradients(student)
    kept = {m: m.forward for m in student.modules() if hasattr(m, "lora_A")}
    try:
        assert lora_forward.replace_lora_forward(student) > 0
        folded = loss_of(student, pack)
        folded.backward()
    finally:
        for m in kept:
            m.__dict__.pop("forward", None)
    after = gradients(student)
    assert torch.allclose(plain, folded, rtol=1e-5)
    worst = max(float((before[n] - after[n]).abs().max()) for n in before)
    assert worst <= 1e-5 * max(1.0, max(float(g.abs().max()) for g in before.values()))


def test_every_target_is_predicted_from_the_token_before_it():
    pack = examples()
    batch = collate(pack)
    order = sorted(pack, key=lambda e: -len(e.ids))
    complete = torch.cat([torch.from_numpy(e.ids[:-1].astype(np.int64)) for e in order])
    assert torch.equal(batch.input_ids[0], complete)
    assert batch.supervised == sum(e.supervised for e in pack)
    starts = np.cumsum([0] + [len(e.ids) - 1 for e in order])
    at = 0
    for e, start in zip(order, starts, strict=False):
        for k in range(e.prompt_length, len(e.ids)):
            assert batch.predict_at[at] == start + k - 1
            assert batch.targets[at] == e.ids[k]
            at += 1
