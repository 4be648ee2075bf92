"""Define what answers a chat request: the rules of the eight tasks, or a local model."""

from __future__ import annotations

import importlib
from collections.abc import Awaitable
from typing import Protocol

from harvester.errors import ConfigError
from harvester.mock_teacher.answers import Answerer
from harvester.mock_teacher.completions import Solution, generate
from harvester.mock_teacher.settings import MockSettings
from harvester.mock_teacher.wire import ChatRequest


class ChatAnswerer(Protocol):
    """Answer chat requests."""

    def measure(self, ask: ChatRequest) -> ChatRequest:
        """Return the request with its prompt tokens counted; raise `Refusal` if it exceeds the context."""

    def at_once(self, ask: ChatRequest) -> Solution | None:
        """Return the answers if they cost no time, so that limits can count their tokens beforehand."""

    def note_answered(self, ask: ChatRequest) -> None:
        """Count an answer, so that the next equal request above temperature 0 gets another sample."""

    def start(self, ask: ChatRequest) -> Awaitable[Solution]:
        """Start answering now; await the result for the answers."""

    def close(self) -> None:
        """Stop answering."""


class RuleAnswerer:
    """Answer the rule tasks by computation."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer

    def measure(self, ask: ChatRequest) -> ChatRequest:
        """Return the request as it is: `wire.read_ask` has counted and checked its tokens."""
        return ask

    def at_once(self, ask: ChatRequest) -> Solution:
        """Return the answers."""
        answers = self._answerer.answers(ask)
        return answers, generate(ask, answers)

    def note_answered(self, ask: ChatRequest) -> None:
        """Count an answer."""
        self._answerer.note_answered(ask)

    async def start(self, ask: ChatRequest) -> Solution:
        """Return the answers."""
        return self.at_once(ask)

    def close(self) -> None:
        """Do nothing: there is nothing to end."""


def make_answerer(settings: MockSettings) -> ChatAnswerer:
    """Return what answers with these settings.

    Raises:
        ConfigError: a model is asked for and can't be loaded, or the `train` extra is not installed.
    """
    if settings.model_folder is None:
        return RuleAnswerer(Answerer(settings.seed, settings.accuracy, settings.judge_prefers))
    try:
        # Imported only when asked for: torch takes seconds, and an installation without the extra lacks it.
        module = importlib.import_module("harvester.mock_teacher.neural.answerer")
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"a model needs the package {error.name}, which is not installed",
            place="--model",
            remedy="install the extra: pip install 'blackbox-distillation[train]'",
        ) from error
    answerer: ChatAnswerer = module.ModelAnswerer(settings.model_folder, settings.seed)
    return answerer
