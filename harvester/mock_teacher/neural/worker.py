"""Run a local model in a thread of its own: rows queue, and join the running batch between two tokens."""

from __future__ import annotations

import queue
import threading
from collections import deque
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer

from harvester.errors import ConfigError
from harvester.mock_teacher.neural.batch import Batch, GeneratedRow
from harvester.mock_teacher.neural.probe import check_batches
from harvester.mock_teacher.neural.scoring import ScoredRow, score_rows

# Most rows that are generated for at once.
MAX_ROWS = 128
# Waiting rows join together, since reading one prompt takes nearly as long as reading a few: when they are as
# many as the rows in work divided by `JOIN_SHARE`, or after `JOIN_STEPS` steps.
JOIN_SHARE = 4
JOIN_STEPS = 4
# A model with fewer parameters computes in one thread: its operations are too short to be shared out.
ONE_THREAD_PARAMETERS = 20_000_000


def load(folder: Path) -> tuple[Any, Any]:
    """Return model (float32) and tokenizer of a local folder.

    Raises:
        ConfigError: the folder holds no model that transformers can load without foreign code, or no chat
            template, or padding changes the model's answers.
    """
    transformers.utils.logging.disable_progress_bar()
    options = {"local_files_only": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=False, dtype=torch.float32, **options
        )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        raise ConfigError(
            f"can't load the model: {error}", place=str(folder), remedy="name a folder with config.json"
        ) from error
    if tokenizer.chat_template is None:
        raise ConfigError(
            "the tokenizer has no chat template", place=str(folder), remedy="add chat_template.jinja"
        )
    if model.num_parameters() < ONE_THREAD_PARAMETERS:
        torch.set_num_threads(1)
    check_batches(model.eval(), folder)
    return model, tokenizer


class ModelThread:
    """Generate for queued rows, and score queued texts, until `close`."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._queue: queue.SimpleQueue[GeneratedRow | ScoredRow | None] = queue.SimpleQueue()
        # A daemon, so that a server that is not closed can end; `close` ends it before the interpreter does,
        # since a thread inside torch would otherwise abort the process.
        self._thread = threading.Thread(target=self._work, name="mock-teacher-model", daemon=True)
        self._thread.start()

    def put(self, row: GeneratedRow | ScoredRow) -> None:
        """Queue a row; its `done` or `failed` is called in the model's thread."""
        self._queue.put(row)

    def close(self) -> None:
        """End the thread after the token that it works on; unfinished rows are dropped."""
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        batch = Batch(self._model)
        waiting: deque[GeneratedRow] = deque()
        steps_waited = 0
        while True:
            to_score: list[ScoredRow] = []
            while not self._queue.empty() or not (len(batch) or waiting or to_score):
                row = self._queue.get()
                if row is None:
                    return
                if isinstance(row, ScoredRow):
                    to_score.append(row)
                else:
                    waiting.append(row)
            score_rows(self._model, to_score)
            if not (len(batch) or waiting):
                continue
            joining = min(len(waiting), MAX_ROWS - len(batch))
            if joining * JOIN_SHARE < len(batch) and steps_waited < JOIN_STEPS:
                joining = 0
            rows = [waiting.popleft() for _ in range(joining)]
            steps_waited = 0 if rows or not waiting else steps_waited + 1
            try:
                if rows:
                    batch.join(rows)
                else:
                    batch.step()
            except Exception as error:  # noqa: BLE001 - whatever a model raises fails its rows, not the server
                for row in {id(row): row for row in (*batch.rows, *rows)}.values():
                    row.failed(error)
                batch = Batch(self._model)
