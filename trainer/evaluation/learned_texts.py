"""Give the texts of the learned rows, for the search for similar ones: from memory, or from the corpus."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from harvester.store.shards.schema import Sample
from trainer.config import TrainConfig
from trainer.data.conversation import Conversation, conversation_of
from trainer.data.tokens.corpus_rows import read_samples
from trainer.data.tokens.stored_rows import StoredRows


class LearnedText(NamedTuple):
    """What a row asks, its messages in one text, and what it teaches."""

    prompt_id: str
    prompt: str
    answer: str


class LearnedTexts(Protocol):
    """The texts of rows, read when they are asked for."""

    def __len__(self) -> int:
        """Return the number of rows."""

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, LearnedText]]:
        """Yield some rows in any order, each with its number."""


class TextsInMemory:
    """The texts of samples.

    Args:
        samples: that have text only.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self._samples = samples

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._samples)

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, LearnedText]]:
        """Yield some rows, each with its number."""
        for number in numbers:
            yield number, _text_of(self._samples[number])


class TextsOfCorpus:
    """The texts of the rows of a token store, which are read from its corpus anew each time."""

    def __init__(self, config: TrainConfig, rows: StoredRows) -> None:
        self._config = config
        self._rows = rows

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self._rows.chosen)

    def read(self, numbers: Sequence[int]) -> Iterator[tuple[int, LearnedText]]:
        """Yield some rows in the order of the corpus, each with its number.

        Raises:
            DataError: the corpus lacks one of them by now.
        """
        chosen = self._rows.chosen[list(numbers)]
        for place, sample in read_samples(self._config, self._rows.reader, chosen):
            yield numbers[place], _text_of(sample)


def _text_of(sample: Sample) -> LearnedText:
    return LearnedText(sample.prompt_id, prompt_text(conversation_of(sample)), sample.completion or "")


def prompt_text(conversation: Conversation) -> str:
    """Return the messages of a prompt; the role is named where it is not the user's."""
    texts = []
    for message in conversation.messages:
        role = "" if message.get("role") == "user" else f"[{message.get('role')}] "
        texts.append(f"{role}{message.get('content') or ''}")
    return "\n\n".join(texts)
