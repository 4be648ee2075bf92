"""What a training says of itself: one JSON line every few steps, TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class StepLog:
    """What a step did. Rates are since the last line; loss is nats per supervised token.

    Attributes:
        padding: share of attention's cells that hold no token (the linear layers see none).
        flop_per_s: arithmetic by `flops`; mfu: its share of the device's peak, None where that is unknown.
        memory_bytes: peak on CUDA; the process's peak resident set on CPU.
    """

    step: int
    steps: int
    epoch: int
    loss: float
    accuracy: float
    grad_norm: float
    lr: float
    tokens_per_s: float
    supervised_per_s: float
    skipped: int
    padding: float
    flop_per_s: float
    mfu: float | None
    memory_bytes: int


class Logbook:
    """Counts between lines, writes lines.

    Args:
        folder: receives train.jsonl, and tensorboard/ where that package is installed.
        peak: the device's arithmetic in FLOP/s where it is known.
    """

    def __init__(self, folder: Path, on_line: Callable[[StepLog], None], peak: float | None) -> None:
        self._path, self._on_line, self._peak = folder / "train.jsonl", on_line, peak
        self._board = _board(folder / "tensorboard")
        self.tokens = 0
        self.trouble = ""
        self.began = self._clock = time.monotonic()
        self._since = [0.0, 0.0, 0.0]

    def keep(self, steps: int) -> None:
        """Forget lines of steps after `steps`: they are learned again, and a step has one line."""
        try:
            lines = self._path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= steps]
            if len(kept) < len(lines):
                aside = self._path.with_name(f".{self._path.name}.tmp")
                aside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
                aside.rename(self._path)
        except FileNotFoundError:
            return
        except OSError as error:
            self.trouble = f"{self._path.name} not written: {error.strerror}"

    def count(self, tokens: int, supervised: int, flop: float) -> None:
        """A step was made."""
        self.tokens += tokens
        for at, value in enumerate((tokens, supervised, flop)):
            self._since[at] += value

    def line(self, facts: dict[str, Any]) -> StepLog:
        """Write a line from the step's own facts and the rates since the last one."""
        now = time.monotonic()
        tokens, supervised, flop = (value / max(now - self._clock, 1e-9) for value in self._since)
        self._clock, self._since = now, [0.0, 0.0, 0.0]
        mfu = flop / self._peak if self._peak else None
        log = StepLog(**facts, tokens_per_s=tokens, supervised_per_s=supervised, flop_per_s=flop, mfu=mfu)
        told = asdict(log)
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(told) + "\n")
        except OSError as error:  # a line that is lost is no reason to lose a training
            self.trouble = f"{self._path.name} not written: {error.strerror}"
        if self._board is not None:
            for name, value in told.items():
                if value is not None and name not in {"step", "steps"}:
                    self._board.add_scalar(name, value, log.step)
            self._board.flush()  # a killed training leaves its curve
        self._on_line(log)
        return log


def _step_of(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf  # torn by a kill


def _board(folder: Path) -> Any:
    if importlib.util.find_spec("tensorboard") is None:
        return None
    from torch.utils.tensorboard import SummaryWriter  # an optional extra

    return SummaryWriter(str(folder))
