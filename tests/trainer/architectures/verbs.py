"""Take a base through every command of the trainer, in this process, and load its adapter with plain PEFT."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import peft
import torch
import transformers

from trainer import config as settings
from trainer.cli import main as cli
from trainer.model import generate, model

VERBS = ("plan", "doctor", "train", "evaluate", "export")


def run_verb(verb: str, path: Path) -> tuple[int, str]:
    """Run one command on a train.toml; return its exit code and what it printed on stderr.

    An exception that is no HarvesterError gives the code 70 and its traceback, as in a process of its own.
    """
    options = {"plan": ["--probe", "0"], "export": [str(path.parent / "merged"), "--json"]}
    words = ["trainer", verb, str(path), *options.get(verb, [])]
    err = io.StringIO()
    handler = signal.getsignal(signal.SIGTERM)
    with (
        mock.patch.object(sys, "argv", words),
        contextlib.redirect_stderr(err),
        contextlib.redirect_stdout(io.StringIO()),
    ):
        try:
            cli.main()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        except Exception:
            traceback.print_exc()
            code = 70
        finally:
            signal.signal(signal.SIGTERM, handler)  # the command sets its own
    return code, err.getvalue()


def plain_peft_difference(path: Path) -> float:
    """Return the largest difference between our student's logits and those of plain transformers and PEFT."""
    config = settings.load(path)
    adapter = config.out_path / "adapter"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = transformers.AutoModelForCausalLM.from_pretrained(config.base, dtype=torch.float32)
        plain = peft.PeftModel.from_pretrained(plain, adapter).eval()
    ours = model.load_trained_student(config, adapter, torch.device("cpu"))
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        logits = [each(input_ids=ids, use_cache=False).logits for each in (ours, plain)]
    return float((logits[0] - logits[1]).abs().max())


def generates_by_its_own_forward(path: Path) -> bool:
    """Return whether answers in one batch are those that the student's own forward gives to each alone."""
    config = settings.load(path)
    student = model.load_trained_student(config, config.out_path / "adapter", torch.device("cpu"))
    prompts = [list(range(3, 3 + length)) for length in (5, 14, 9)]
    answers = generate.generate(student, prompts, generate.Limits(stop_id=2, max_new_tokens=3, batch=3))
    return [answer.ids for answer in answers] == [greedy_alone(student, prompt, 3, 2) for prompt in prompts]


def greedy_alone(student: Any, prompt: Sequence[int], tokens: int, stop_id: int) -> tuple[int, ...]:
    """Return the tokens of plain greedy decoding without padding and cache, without the stop token."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            logits = student(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
            if int(logits.argmax()) == stop_id:
                break
            ids.append(int(logits.argmax()))
    return tuple(ids[len(prompt) :])
