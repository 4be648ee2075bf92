"""Test the training log: JSON lines always, TensorBoard where it is installed, rates from counts."""

from __future__ import annotations

import json
import math
import sys
import types

import pytest

from tests.trainer import tiny
from trainer import config as settings
from trainer.data.chat_template import Renderer
from trainer.data.collator import padding_share
from trainer.data.order import Order
from trainer.model import model
from trainer.training import flops, logbook, trackers
from trainer.training.reporter import Callbacks
from trainer.training.train import train

FACTS = {
    "step": 10,
    "steps": 20,
    "epoch": 0,
    "loss": 2.5,
    "accuracy": 0.4,
    "grad_norm": 1.0,
    "lr": 1e-3,
    "skipped": 0,
    "padding": 0.1,
    "memory_bytes": 1 << 20,
}


class Board:
    """Stands in for TensorBoard's writer, which is an extra."""

    def __init__(self, folder: str) -> None:
        self.folder, self.seen, self.flushed = folder, [], 0
        Board.last = self

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.seen.append((name, value, step))

    def flush(self) -> None:
        self.flushed = len(self.seen)


def test_rates_and_mfu_are_counts_over_the_time_since_the_last_line(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(logbook.time, "monotonic", lambda: now[0])
    seen = []
    book = logbook.Logbook(tmp_path, seen.append, peak=1000.0)
    book.add_step(30, 10, 500.0)
    book.add_step(10, 6, 300.0)
    now[0] += 4.0
    book.write_line(FACTS)
    book.add_step(8, 8, 80.0)
    now[0] += 2.0
    book.write_line({**FACTS, "step": 20})
    assert [(x.tokens_per_s, x.supervised_per_s, x.flop_per_s, x.mfu) for x in seen] == [
        (10.0, 4.0, 200.0, 0.2),
        (4.0, 4.0, 40.0, 0.04),
    ]
    lines = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [10, 20]
    assert logbook.Logbook(tmp_path / "none", seen.append, peak=None).write_line(FACTS).mfu is None


def test_tensorboard_gets_every_number_where_it_is_installed(tmp_path, monkeypatch):
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Board
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda _name: object())
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(2), out={"path": "."}))
    book = logbook.Logbook(tmp_path, lambda _: None, 1e12, trackers.Trackers(config))
    book.add_step(4, 2, 8.0)
    log = book.write_line(FACTS)
    board = Board.last
    assert board.folder == str(tmp_path / "tensorboard")
    assert {name for name, _, _ in board.seen} == set(json.loads((tmp_path / "train.jsonl").read_text())) - {
        "step",
        "steps",
    }
    assert ("loss", 2.5, 10) in board.seen
    assert ("mfu", log.mfu, 10) in board.seen
    assert board.flushed == len(board.seen)  # nothing waits for an end that may not come


def test_a_trainings_lines_add_up_to_its_corpus(tmp_path):
    config = settings.load(
        tiny.train_toml(tmp_path, tiny.skill(40), train={"log_every": 1, "pack_tokens": 128})
    )
    logs = []
    done = train(config, Callbacks(on_step=logs.append))
    from trainer.data import dataset

    data = dataset.render(dataset.read(config), Renderer(model.load_tokenizer(config.base)), config)
    order = Order(data.lengths, config.train)
    packs = [[data.examples[i] for i in numbers] for numbers in order.packs(0)]
    assert done.tokens == data.tokens
    assert logs[0].padding == pytest.approx(padding_share(packs))
    assert all(log.memory_bytes > 1 << 20 and math.isfinite(log.grad_norm) for log in logs)
    for log in logs:  # both rates are over the same time
        share = log.supervised_per_s / log.tokens_per_s
        assert 0 < share < 1
    first = logs[0]
    count = flops.flop_counter(model.load_new_student(config, model.select_device(config.train)))
    tokens = sum(len(e.ids) - 1 for pack in packs for e in pack)
    assert first.flop_per_s / first.tokens_per_s == pytest.approx(sum(map(count, packs)) / tokens)
