"""Test a training with soft targets from end to end: it learns them, resumes, and says how many there are."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from harvester.store.reader import Corpus
from harvester.store.shards.seal import seal
from tests.harvester.store_rows import answer, key_of, open_store, raw_of
from tests.trainer import teacher_logprobs, tiny
from tests.trainer.command_line import run_trainer  # noqa: F401 - fixture
from tests.trainer.data.test_token_paths import Chain, exact_first_tokens
from tests.trainer.training.test_faults_checkpoints import half_done
from trainer import config as settings
from trainer.data import dataset
from trainer.data.chat_template import Renderer
from trainer.data.teacher_tokens import read_signal
from trainer.evaluation.distributions import MOST_POSITIONS
from trainer.model import model, self_test
from trainer.model.forward.rows import RowLayout
from trainer.training.forward import pack_losses
from trainer.training.inputs import read_inputs
from trainer.training.train import train

BASE = Path(__file__).resolve().parents[3] / "data" / "base"
SHAPE = {"epochs": 2, "log_every": 1, "pack_tokens": 128, "batch_tokens": 128}
SOFT = {**SHAPE, "soft_targets": "auto"}


def rows(count=24, held_out=0):
    """Every third row has no log-probabilities."""
    made = teacher_logprobs.skill(count, held_out=held_out, end="<|im_end|>")
    return [replace(r, logprobs=None) if i % 3 == 2 else r for i, r in enumerate(made)]


def adapter_of(toml):
    return load_file(toml.parent / "out" / "adapter" / "adapter_model.safetensors")


def test_soft_targets_change_what_is_learned_and_resume_to_the_same_bits(tmp_path):
    data = {"eval_share": 0.0}
    whole = tiny.train_toml(tmp_path / "whole", rows(), data=data, train=SOFT)
    done = train(settings.load(whole))
    parts = tiny.train_toml(tmp_path / "parts", rows(), data=data, train=SOFT)
    half_done(parts, 2)
    assert train(settings.load(parts)).steps_now == done.steps - 2
    wanted, mine = adapter_of(whole), adapter_of(parts)
    assert all(torch.equal(wanted[name], mine[name]) for name in wanted)
    plain = tiny.train_toml(tmp_path / "plain", rows(), data=data, train=SHAPE)
    train(settings.load(plain))
    other = adapter_of(plain)
    assert not all(torch.equal(wanted[name], other[name]) for name in wanted)

    assert any("soft targets: 100.0% of" in note and "mapped by ids" in note for note in done.notes)
    card = (whole.parent / "out" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "| soft targets | 100.0% of" in card
    lineage = json.loads((whole.parent / "out" / "adapter" / "lineage.json").read_text(encoding="utf-8"))
    assert "8 rows have none" in lineage["soft_targets"]


@pytest.mark.parametrize("stored", [False, True])
def test_log_probabilities_that_another_program_wrote_are_the_same_numbers(tmp_path, monkeypatch, stored):
    if stored:
        monkeypatch.setattr(dataset, "STORED_ROWS", 1)
    number, data = pa.float64(), pa.large_binary()
    listed = pa.struct(
        [("logprob", number), ("bytes", data), ("id", pa.int64()), ("token", pa.large_string())]
    )
    token = pa.struct([("top", pa.large_list(listed)), *((f.name, f.type) for f in listed)])
    mine = tiny.train_toml(tmp_path / "mine", rows(), train=SOFT)
    other = tiny.train_toml(tmp_path / "other", rows(), train=SOFT)
    (shard,) = (other.parent / "store" / "shards").glob("*.parquet")
    table = pq.read_table(shard)
    place = table.column_names.index("logprobs")
    kind = pa.large_list(token)
    changed = table.set_column(place, "logprobs", pa.array(table.column(place).to_pylist(), kind))
    pq.write_table(changed.replace_schema_metadata(table.schema.metadata), shard)
    assert pq.read_schema(shard).field("logprobs").type != table.schema.field("logprobs").type
    for toml in (mine, other):
        assert any("100.0% of" in note for note in train(settings.load(toml)).notes)
    wanted, read = adapter_of(mine), adapter_of(other)
    assert all(torch.equal(wanted[name], read[name]) for name in wanted)


@pytest.mark.parametrize("before", ["auto", "off"])
def test_changed_soft_targets_are_refused_on_resume(tmp_path, run_trainer, before):  # noqa: F811
    shape = {**SHAPE, "soft_targets": before}
    toml = tiny.train_toml(tmp_path, rows(), data={"eval_share": 0.0}, train=shape)
    half_done(toml, 2)
    text = toml.read_text(encoding="utf-8")
    changes = {
        "auto": ["soft_weight = 0.25", 'soft_tail = "renormalise"', "soft_temperature = 2.0"],
        "off": [],
    }[before]
    changed = [text.replace("[train]", f"[train]\n{change}") for change in changes]
    changed.append(text.replace(f'"{before}"', '"off"' if before == "auto" else '"auto"'))
    for other in changed:
        toml.write_text(other, encoding="utf-8")
        code, _, err = run_trainer("train", toml)
        assert code == 2
        assert "train.soft_" in err


def test_plan_and_doctor_report_coverage_and_train_refuses_too_little(tmp_path, run_trainer):  # noqa: F811
    named = [replace(r, prompt_id=f"<script>{n}") for n, r in enumerate(rows())]
    toml = tiny.train_toml(tmp_path, named, data={"eval_share": 0.0}, train=SOFT)
    for words in (("plan", toml, "--probe", 0), ("doctor", toml)):
        code, out, _ = run_trainer(*words)
        assert code == 0
        assert "soft targets: 100.0% of" in out
    _, out, _ = run_trainer("plan", toml, "--probe", 0, "--json")
    report = json.loads(out)["soft_targets"]
    assert (report["path"], report["rows"], report["rows_without"], report["coverage"]) == ("ids", 16, 8, 1)
    page = (tmp_path / "out" / "doctor.html").read_text(encoding="utf-8")
    assert "soft targets: 100.0% of" in page
    assert page.count("any other</td>") == MOST_POSITIONS
    assert "&lt;script&gt;" in page
    assert "<script" not in page

    tokenizer = tiny.tokenizer()
    foreign = [replace(r, logprobs=teacher_logprobs.of_text(tokenizer, "zzz")) for r in rows()]
    tiny.corpus(tmp_path / "store", foreign)
    code, out, _ = run_trainer("plan", toml, "--probe", 0)
    assert code == 0
    assert "fatal fault" in out
    for words in (("doctor", toml), ("train", toml)):
        code, _, err = run_trainer(*words)
        assert code == 1
        assert "soft targets reach 0.0% of the supervised tokens" in err
    assert not (tmp_path / "out" / "adapter").exists()
    code, _, _ = run_trainer("train", toml, "--force-faults")
    assert code == 0
    card = (tmp_path / "out" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "learned with --force-faults" in card


def test_packed_rows_have_the_loss_and_gradients_of_unpacked_ones(tmp_path):
    config = settings.load(tiny.train_toml(tmp_path, rows(), data={"eval_share": 0.0}, train=SOFT))
    inputs = read_inputs(config, rehearses=False)
    examples = inputs.dataset.examples
    assert {example.soft is None for example in examples} == {True, False}
    student = model.load_new_student(config, torch.device("cpu"))
    forward = self_test.check_student(student, config.base)
    assert forward.layout.packed
    with torch.no_grad():
        for name, p in student.named_parameters():
            if "lora_B" in name:
                p.normal_(0, 0.05, generator=torch.Generator().manual_seed(len(name)))
    results = []
    for way in (
        forward,
        replace(forward, layout=RowLayout(packed=False, attention="sdpa")),
        replace(forward, head=None),
    ):
        self_test.set_attention(student, way.layout)
        student.zero_grad()
        total = 0.0
        for loss, _ in pack_losses(student, examples, torch.device("cpu"), way):
            loss.backward()
            total += float(loss)
        gradients = {n: p.grad.clone() for n, p in student.named_parameters() if p.grad is not None}
        results.append((total, gradients))
    (first, wanted), *others = results
    for total, gradients in others:
        assert total == pytest.approx(first, rel=1e-5)
        worst = max(float((gradients[n] - wanted[n]).abs().max()) for n in wanted)
        assert worst <= 1e-4 * max(float(g.abs().max()) for g in wanted.values())


def test_unsealed_and_sealed_answers_give_the_same_arrays(tmp_path):
    values = [1e-7, 0.00099999, 0.0011, -9000.5, -8900.0, -1e-9, -0.123456789, 1e6, -1e6]
    top = [{"token": str(at), "bytes": [65 + at], "logprob": value} for at, value in enumerate(values)]
    first = {"token": "8", "bytes": [56], "logprob": -0.3, "top_logprobs": top}
    second = {"token": "\ufffd", "bytes": None, "logprob": -7.77, "top_logprobs": top[:3]}
    raw = json.loads(raw_of(7))
    raw["choices"][0]["logprobs"] = {"content": [first, second]}

    def signal():
        store = Corpus.open(tmp_path)
        return read_signal(store.batches(dataset.LOGPROB_COLUMNS), {key_of(n).hex() for n in (7, 8)})

    with open_store(tmp_path) as journal:
        journal.apply([answer(7, raw=json.dumps(raw).encode()), answer(8), answer(9)])
        before = signal()
        seal(journal, tmp_path, target_bytes=1 << 20, everything=True)
        after = signal()
    assert list(before.answers) == list(after.answers) == [key_of(7).hex()]
    one, two = (next(iter(each.answers.values())) for each in (before, after))
    assert np.array_equal(one.tokens, two.tokens)
    assert np.array_equal(one.log_probs, two.log_probs, equal_nan=True)
    assert one.sampling == two.sampling
    assert one.tokens.shape == (2, 10)
    assert (one.tokens[1, 4:] == -1).all()
    assert before.table.data[one.tokens[1, 0]] is None
    kinds = [0, 0, math.inf, -math.inf, -8900.0, 0, -0.123456789, math.inf, -math.inf]
    assert one.log_probs[0, 1:].tolist() == pytest.approx(kinds, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_soft_targets_bring_a_student_closer_to_its_teacher_and_renormalised_ones_do_not(tmp_path):
    """A teacher whose distribution is known lists 3 of its 5 tokens; the divergence is over all of them."""
    chain = Chain(2, 1.2)
    rows = []
    for number in range(120):
        text = chain.answer()
        entries = [{**e, "top": sorted(e["top"], key=_probability)[-3:]} for e in chain.logprobs(text)]
        rows.append(tiny.sample(number, f"go {number}", text, logprobs=entries))
    fresh = [chain.answer() for _ in range(20)]
    soft = {"soft_targets": "auto", "soft_weight": 0.9}
    variants = {"text": {}, "bucket": soft, "renormalise": {**soft, "soft_tail": "renormalise"}}
    divergence = {}
    for name, settings_of in variants.items():
        shape = {"epochs": 6, "batch_tokens": 512, "lr": 3e-3, **settings_of}
        toml = tiny.train_toml(
            tmp_path / name,
            rows,
            data={"eval_share": 0.0},
            train=shape,
            lora={"rank": 16, "alpha": 32},
            student={"base": str(BASE)},
        )
        config = settings.load(toml)
        train(config)
        divergence[name] = _divergence(chain, fresh, config)
    assert divergence["bucket"] < 0.85 * divergence["text"], divergence
    assert divergence["renormalise"] > 1.5 * divergence["text"], divergence


def _probability(item):
    return item["logprob"]


def _divergence(chain, texts, config):
    """Mean KL divergence of the student from the teacher over the whole vocabulary, in nats a token."""
    student = model.load_trained_student(config, config.out_path / "adapter", torch.device("cpu"))
    renderer = Renderer(model.load_tokenizer(config.base))
    exact, sums = {}, []
    for number, text in enumerate(texts):
        [example] = renderer.examples([[{"role": "user", "content": f"go {900 + number}"}]], [text], [True])
        with torch.no_grad():
            logits = student(input_ids=torch.from_numpy(example.ids[None, :-1].astype(np.int64))).logits[0]
        ids = example.ids[example.prompt_length :].tolist()
        for at in range(len(ids)):
            before = renderer.decode(ids[:at]) if at else ""
            if before[-1:] not in exact:
                exact[before[-1:]] = exact_first_tokens(chain, before, renderer)
            log_probs = torch.log_softmax(logits[example.prompt_length - 1 + at], dim=-1)
            teacher = exact[before[-1:]]
            sums.append(sum(p * (math.log(p) - float(log_probs[token])) for token, p in teacher.items() if p))
    return sum(sums) / len(sums)
