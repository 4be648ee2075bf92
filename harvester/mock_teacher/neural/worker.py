"""Run a local model in a thread of its own: rows queue, and join the running batch between two tokens."""

from __future__ import annotations

import queue
import threading
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harvester.errors import ConfigError
from harvester.mock_teacher.neural.batch import Batch, GeneratedRow

# Most rows that are generated for at once.
MAX_ROWS = 64


def load(folder: Path) -> tuple[Any, Any]:
    """Return model (float32) and tokenizer of a local folder.

    Raises:
        ConfigError: the folder holds no model that transformers can load without foreign code, or no chat
            template.
    """
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
    return model.eval(), tokenizer


class ModelThread:
    """Generate for queued rows until the process ends; the thread is a daemon."""

    def __init__(self, model: Any) -> None:
        self._batch = Batch(model)
        self._queue: queue.SimpleQueue[GeneratedRow] = queue.SimpleQueue()
        self._failed: list[GeneratedRow] = []
        threading.Thread(target=self._work, name="mock-teacher-model", daemon=True).start()

    def put(self, row: GeneratedRow) -> None:
        """Queue a row; its `done` is called in the worker's thread."""
        self._queue.put(row)

    def _work(self) -> None:
        while True:
            rows = [] if len(self._batch) else [self._queue.get()]
            while len(self._batch) + len(rows) < MAX_ROWS and not self._queue.empty():
                rows.append(self._queue.get())
            if rows:
                self._batch.join(rows)
            else:
                self._batch.step()
