"""Test training from end to end: it learns, resumes with the same bits, and writes a loadable adapter."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from datetime import datetime, timedelta

import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import chat_template_utils

from tests.trainer import chat_templates, tiny
from trainer import config as settings
from trainer.data import data_checks, dataset
from trainer.data.chat_template import Renderer
from trainer.data.order import Order
from trainer.errors import DataError, Interrupted, ResumeRefused, StudentError, TrainingDiverged
from trainer.evaluation.evaluate import evaluate
from trainer.model import model
from trainer.provenance import model_card
from trainer.training import checkpoint, step
from trainer.training.reporter import Callbacks
from trainer.training.train import train


def adapter_of(config) -> dict[str, torch.Tensor]:
    return load_file(config.out_path / "adapter" / "adapter_model.safetensors")


def same(first, second) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_the_loss_falls_and_is_logged(learned):
    config, done = learned
    log = [json.loads(line) for line in (config.out_path / "train.jsonl").read_text().splitlines()]
    assert len(log) == done.steps == done.steps_now
    assert log[-1]["loss"] < log[0]["loss"] - 0.3
    assert {"tokens_per_s", "supervised_per_s", "lr", "grad_norm"} <= set(log[0])


def test_33_peft_loads_the_adapter_in_a_fresh_process_with_equal_logits(learned, fork_server, tmp_path):
    config, _ = learned
    adapter = config.out_path / "adapter"
    ended = fork_server("logits", base=config.base, adapter=adapter, out=tmp_path / "logits")
    assert ended["code"] == 0, ended["err"]
    theirs = load_file(tmp_path / "logits")["logits"]
    ids, cpu = torch.arange(3, 40)[None], torch.device("cpu")
    mine = model.load_trained_student(config, adapter, cpu)(input_ids=ids).logits
    assert torch.allclose(theirs, mine, atol=1e-5)
    assert not torch.allclose(theirs, model.load_base(config.base, cpu)(input_ids=ids).logits)


def test_a_training_whose_template_writes_the_date_resumes_a_day_later(tmp_path, monkeypatch):
    path = tiny.train_toml(tmp_path, tiny.skill(24), train={"log_every": 1, "pack_tokens": 128})
    tokenizer = tiny.tokenizer(chat_templates.DATED)
    tokenizer.save_pretrained(tmp_path / "base")
    config = settings.load(path)
    talk = [{"role": "user", "content": "hi"}]
    today = tokenizer.apply_chat_template(talk, tokenize=False)
    with pytest.raises(Interrupted):
        train(config, Callbacks(on_step=lambda _: os.kill(os.getpid(), signal.SIGTERM)))

    class Tomorrow(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=1)

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert tokenizer.apply_chat_template(talk, tokenize=False) != today
    done = train(config)
    assert any("resumed at step 1" in note for note in done.notes)


def test_a_document_that_can_not_be_written_at_the_end_is_refused_at_the_start(tmp_path, monkeypatch):
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(8)))

    def refuse(*_args, **_more):
        raise KeyError("a lineage that the card can't show")

    monkeypatch.setattr(model_card, "write", refuse)
    with pytest.raises(StudentError, match="after the training: KeyError"):
        train(config)
    assert not (config.out_path / "train.jsonl").exists()


def test_processes_divide_the_cores_among_them(monkeypatch):
    monkeypatch.setattr(model.os, "sched_getaffinity", lambda _pid: set(range(8)))
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    for threads, processes in ((0, 1), (0, 3), (0, 16), (5, 2)):
        model.set_threads(settings.TrainSection(threads=threads), processes)
    assert given == [8, 2, 1, 5]


def test_the_card_names_teacher_and_terms(learned):
    config, _ = learned
    card = (config.out_path / "adapter" / "README.md").read_text()
    assert "| mock-teacher | 127.0.0.1 |" in card
    assert "of no use outside tests" in card
    lineage = json.loads((config.out_path / "adapter" / "lineage.json").read_text())
    assert lineage["teachers"][0]["rows"] == 40


def test_training_again_does_nothing_more(learned):
    config, done = learned
    before = adapter_of(config)
    again = train(config)
    assert again.steps_now == 0
    assert again.steps == done.steps
    assert same(before, adapter_of(config))


def test_evaluate_writes_the_scorecard(learned):
    config, _ = learned
    card = evaluate(config)
    assert json.loads((config.out_path / "scorecard.json").read_text()) == card
    assert card["macro"]["teacher"]["accuracy"] == 1
    assert set(card["tasks"]) == {"reverse"}
    assert card["tasks"]["reverse"]["prompts"] == 10
    answers = [json.loads(line) for line in (config.out_path / "answers.jsonl").read_text().splitlines()]
    assert len(answers) == 10
    assert all(a["split"] == "held_out" for a in answers)


def stop_after(step: int):
    """A callback that asks this very process to stop, as a preempted machine would."""

    def on_step(log) -> None:
        if log.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return on_step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_rows_are_packed_ends_the_training_at_once(tmp_path, monkeypatch, number):
    """It comes inside code that takes every `Exception` for an error of a file."""
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(24), train={"log_every": 1}))
    render, handler = data_checks.render_rows, signal.getsignal(number)

    def render_meanwhile(*arguments):
        try:
            os.kill(os.getpid(), number)
        except Exception:
            pytest.fail("taken for an error")
        return render(*arguments)

    monkeypatch.setattr(data_checks, "render_rows", render_meanwhile)
    with pytest.raises(Interrupted, match="stopped before the first step") as caught:
        train(config)
    assert caught.value.exit_code == 128 + number
    assert signal.getsignal(number) is handler
    assert not (config.out_path / "adapter").exists()


def test_a_torn_checkpoint_is_skipped_and_named(tmp_path):
    config = settings.load(
        tiny.train_toml(tmp_path, tiny.skill(40), train={"epochs": 2, "save_every": 1, "log_every": 1})
    )
    with pytest.raises(Interrupted):
        train(config, Callbacks(on_step=stop_after(3)))
    newest = sorted((config.out_path / "checkpoints").glob("step-*"))[-1]
    file = newest / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    stored, skipped = checkpoint.newest_valid(config.out_path / "checkpoints")
    assert stored is not None
    assert stored.step == 2
    assert newest.name in skipped[0]
    done = train(config)
    assert any(newest.name in note for note in done.notes)


def test_another_configuration_or_corpus_is_refused_by_name(tmp_path):
    path = tiny.train_toml(tmp_path, tiny.skill(40), train={"log_every": 1})
    with pytest.raises(Interrupted):
        train(settings.load(path), Callbacks(on_step=stop_after(1)))
    path.write_text(path.read_text().replace("rank = 4", "rank = 8"))
    with pytest.raises(ResumeRefused, match=r"lora.rank 4 -> 8"):
        train(settings.load(path))
    path.write_text(path.read_text().replace("rank = 8", "rank = 4"))
    tiny.corpus(tmp_path / "store", tiny.skill(41))
    with pytest.raises(ResumeRefused, match="corpus"):
        train(settings.load(path))


def test_a_loss_that_is_not_finite_is_skipped_then_stops(tmp_path, monkeypatch):
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(40), train={"epochs": 3, "log_every": 1}))
    calls = []

    def poisoned(*args):
        calls.append(1)
        for loss, correct in original(*args):
            yield (loss * float("nan") if len(calls) in {2, 4, 5, 6} else loss), correct

    original = step.pack_losses
    monkeypatch.setattr(step, "pack_losses", poisoned)
    logs = []
    with pytest.raises(TrainingDiverged):
        train(config, Callbacks(on_step=logs.append))
    assert [log.skipped for log in logs] == [0, 1, 1, 2, 3, 4]
    assert all(log.loss == log.loss for log in logs)  # never averaged with a NaN


def test_rows_are_left_out_by_reason_and_held_out_prompts_never_learned(tmp_path):
    named = {"metadata_json": '{"split": "train"}'}
    leak = tiny.skill(4, held_out=2)[4].messages[0]["content"]
    rows = [
        *tiny.skill(4, held_out=2),
        tiny.sample(20, "a", None, outcome="empty"),
        tiny.sample(21, "b", "  \n"),
        tiny.sample(22, "c", "cut", outcome="truncated"),
        tiny.sample(23, "d", "no", outcome="refused"),
        tiny.sample(24, "e", "x" * 400, **named),
        tiny.sample(25, leak, "leaked", **named),
    ]
    path = tiny.train_toml(tmp_path, rows, data={"eval_share": 0.0})
    config = settings.load(path)
    result = dataset.read(config)
    data = dataset.render(result, Renderer(model.load_tokenizer(config.base)), config)
    assert data.excluded == {"empty": 2, "truncated": 1, "refused": 1, "leaked": 1, "too long": 1}
    assert len(data.examples) == 4
    assert {h.prompt_id for h in result.held_out} == {"p4", "p5"}
    kept = settings.load(
        tiny.train_toml(tmp_path, rows, data={"eval_share": 0.0, "truncated": "unterminated"})
    )
    data = dataset.render(dataset.read(kept), Renderer(model.load_tokenizer(kept.base)), kept)
    ends = [e.terminated for e in data.examples]
    assert ends.count(False) == 1


def test_prompts_without_a_split_are_split_by_content(tmp_path):
    rows = [replace(s, metadata_json="{}") for s in tiny.skill(200)]
    config = settings.load(tiny.train_toml(tmp_path, rows, data={"eval_share": 0.25}))
    first = dataset.read(config)
    assert 25 < len(first.held_out) < 75
    renamed = [replace(s, prompt_id=f"other{i}") for i, s in enumerate(reversed(rows))]
    tiny.corpus(tmp_path / "store", renamed)
    second = dataset.read(config)
    assert {h.conversation.messages[0]["content"] for h in first.held_out} == {
        h.conversation.messages[0]["content"] for h in second.held_out
    }


def test_a_corpus_without_completions_says_so(tmp_path):
    rows = [tiny.sample(i, f"q{i}", None, outcome="empty") for i in range(3)]
    config = settings.load(tiny.train_toml(tmp_path, rows, data={"eval_share": 0.0}))
    with pytest.raises(DataError, match="3 empty"):
        dataset.read(config)


def test_the_order_is_a_function_of_seed_and_step():
    shape = settings.TrainSection(epochs=3, batch_tokens=64, max_length=32)
    lengths = [8 + i % 9 for i in range(100)]
    first, second = Order(lengths, shape), Order(lengths, shape)
    assert [first.packs(s) for s in range(first.steps)] == [
        second.packs(s) for s in reversed(range(first.steps))
    ][::-1]
    for epoch in range(3):
        seen = [
            i for s in range(first.steps) if first.epoch_of(s) == epoch for p in first.packs(s) for i in p
        ]
        assert sorted(seen) == list(range(100))
    other = Order(lengths, shape.model_copy(update={"seed": 1}))
    assert first.packs(0) != other.packs(0)


def test_steps_go_on_over_as_many_epochs_as_they_take():
    shape = settings.TrainSection(epochs=3, batch_tokens=64, max_length=32)
    lengths = [8 + i % 9 for i in range(100)]
    whole = Order(lengths, shape)
    # Epochs that are never reached cost nothing.
    limited = Order(lengths, shape.model_copy(update={"epochs": 10**9, "max_steps": whole.steps - 2}))
    assert limited.steps == whole.steps - 2
    assert limited.epoch_of(limited.steps - 1) == 2
    assert all(limited.packs(s) == whole.packs(s) for s in range(limited.steps))
