"""Turn chat requests into rows for the model, and finished rows into choices with true log-probabilities."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable
from dataclasses import replace
from functools import lru_cache
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, TypeVar

from harvester.mock_teacher.answers import MockAnswer
from harvester.mock_teacher.completions import Generated, PromptToken, Solution
from harvester.mock_teacher.neural.batch import GeneratedRow
from harvester.mock_teacher.neural.pieces import StopSearch, text_pieces
from harvester.mock_teacher.neural.scoring import ScoredRow, TokenScore
from harvester.mock_teacher.neural.worker import ModelThread, load
from harvester.mock_teacher.occurrences import Occurrences
from harvester.mock_teacher.tasks.rules import solve
from harvester.mock_teacher.wire import ChatRequest, context_exceeded
from harvester.system.token_bytes import token_bytes

# Answers end here if a request names no max_tokens.
DEFAULT_MAX_TOKENS = 256
PROMPTS_KEPT = 4096

Result = TypeVar("Result")


class ModelAnswerer:
    """Answer with the model of a folder. Equal seeds and requests give equal answers in any batch.

    Above temperature 0 a request without `seed` gets another sample each time.
    """

    def __init__(self, folder: Path, seed: int) -> None:
        model, self._tokenizer = load(folder)
        self._bytes = token_bytes(self._tokenizer)
        self._seed = seed
        self._occurrences = Occurrences()
        self._context = int(getattr(model.config, "max_position_embeddings", 2**31))
        ends = model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        self._ends = {end for end in (*ends, self._tokenizer.eos_token_id) if end is not None}
        # A request's prompt is needed twice, and many requests of a harvest ask one prompt.
        self._prompt = lru_cache(PROMPTS_KEPT)(self._read_prompt)
        self._worker = ModelThread(model)

    def measure(self, ask: ChatRequest) -> ChatRequest:
        """Return the request with the model's own count of prompt tokens, and with its limit on tokens.

        Raises:
            Refusal: 400, the prompt and max_tokens exceed the model's context.
        """
        prompt = self._prompt_of(ask)
        wanted = len(prompt) + (ask.max_tokens or 1)
        if wanted > self._context:
            raise context_exceeded(self._context, wanted)
        return replace(ask, prompt_tokens=len(prompt))

    def at_once(self, ask: ChatRequest) -> Solution | None:
        """Return None: a model takes its time."""
        return None

    def note_answered(self, ask: ChatRequest) -> None:
        """Count an answer, so that the next equal request above temperature 0 gets another sample."""
        self._occurrences.note(ask)

    def close(self) -> None:
        """End the model's thread."""
        self._worker.close()

    def start(self, ask: ChatRequest) -> Awaitable[Solution]:
        """Queue the `n` rows of a request now; return what becomes its answers."""
        loop = asyncio.get_running_loop()
        prompt = self._prompt_of(ask)
        limit = min(ask.max_tokens or DEFAULT_MAX_TOKENS, self._context - len(prompt))
        futures = []
        for choice in range(ask.n):
            future: asyncio.Future[Generated] = loop.create_future()
            futures.append(future)
            self._worker.put(self._row(ask, prompt, limit, choice, future))
        scores: asyncio.Future[list[TokenScore]] | None = None
        if ask.scoring.wants_scores:
            scores = loop.create_future()
            self._worker.put(self._scored_row(ask, prompt, scores))
        return self._collect(ask, prompt, futures, scores)

    async def _collect(
        self,
        ask: ChatRequest,
        prompt: list[int],
        futures: list[asyncio.Future[Generated]],
        scores: asyncio.Future[list[TokenScore]] | None,
    ) -> Solution:
        generated = list(await asyncio.gather(*futures))
        if scores is not None:
            tokens = self._prompt_tokens(prompt, await scores)
            generated = [replace(choice, prompt=tokens) for choice in generated]
        solved = solve(ask.text)
        answers = []
        for choice in generated:
            text = "".join(choice.pieces)
            right = None if solved is None else text.strip() == solved.answer
            answers.append(MockAnswer(text, solved.task if solved else None, right, choice.digest))
        return answers, generated

    def _scored_row(
        self, ask: ChatRequest, prompt: list[int], future: asyncio.Future[list[TokenScore]]
    ) -> ScoredRow:
        loop = future.get_loop()

        def done(scores: list[TokenScore]) -> None:
            loop.call_soon_threadsafe(_settle, future, scores)

        def failed(error: Exception) -> None:
            loop.call_soon_threadsafe(_fail, future, error)

        scoring = ask.scoring
        top = max(scoring.prompt_logprobs or 0, scoring.legacy_logprobs or 0, scoring.input_top)
        return ScoredRow(prompt, top, done, failed)

    def _prompt_tokens(self, prompt: list[int], scores: list[TokenScore]) -> tuple[PromptToken, ...]:
        return (
            PromptToken(prompt[0], self._text(prompt[0])),
            *(
                PromptToken(
                    token,
                    self._text(token),
                    score.logprob,
                    score.rank,
                    tuple(
                        (other, self._text(other), value)
                        for other, value in zip(score.top_ids, score.top_logprobs, strict=True)
                    ),
                )
                for token, score in zip(prompt[1:], scores, strict=True)
            ),
        )

    def _text(self, token: int) -> str:
        """Return the text of one token as servers send it: lossy where it is part of a character."""
        return self._bytes[token].decode(errors="replace")

    def _prompt_of(self, ask: ChatRequest) -> list[int]:
        """Return the token ids that a request is answered after."""
        scoring = ask.scoring
        if scoring.text is not None:
            backend = self._tokenizer.backend_tokenizer
            raw: list[int] = backend.encode(scoring.text, add_special_tokens=scoring.special).ids
            return raw
        if scoring.opens_answer and not scoring.continues:
            return self._prompt(ask.messages)
        return self._read_prompt(ask.messages, opens_answer=False, continues=scoring.continues)

    def _read_prompt(
        self, messages: tuple[tuple[str, str], ...], *, opens_answer: bool = True, continues: bool = False
    ) -> list[int]:
        """Return the token ids of a chat by the model's own template."""
        turns = [{"role": role, "content": text} for role, text in messages]
        text = self._tokenizer.apply_chat_template(
            turns, add_generation_prompt=opens_answer, continue_final_message=continues, tokenize=False
        )
        # By the backend directly: a call of the tokenizer hands even one text to a pool of threads.
        ids: list[int] = self._tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _row(
        self,
        ask: ChatRequest,
        prompt: list[int],
        limit: int,
        choice: int,
        future: asyncio.Future[Generated],
    ) -> GeneratedRow:
        occurrence = self._occurrences.of(ask)
        digest = hashlib.sha256(f"{self._seed}\0{occurrence}\0{choice}\0".encode() + ask.body_sha256).digest()
        loop = future.get_loop()
        stop = StopSearch(ask.stop)

        def is_done(row: GeneratedRow) -> bool:
            for token in row.tokens[stop.pieces :]:  # none, where only other rows got a token
                stop.add(self._bytes[token])
            return row.tokens[-1] in self._ends or len(row.tokens) >= limit or stop.at is not None

        def done(row: GeneratedRow) -> None:
            generated = self._generated(ask, row, stop.at, digest)
            loop.call_soon_threadsafe(_settle, future, generated)

        def failed(error: Exception) -> None:
            loop.call_soon_threadsafe(_fail, future, error)

        return GeneratedRow(prompt, ask.temperature, ask.top_p, digest, ask.logprobs, is_done, done, failed)

    def _generated(self, ask: ChatRequest, row: GeneratedRow, stop: int | None, digest: bytes) -> Generated:
        """Cut at the end token or the stop sequence; a token with both sides of the cut is left out whole."""
        has_ended = row.tokens[-1] in self._ends
        reason = "stop" if has_ended or stop is not None else "length"
        tokens = row.tokens[:-1] if has_ended else row.tokens
        raw = [self._bytes[token] for token in tokens]
        if stop is not None:
            raw = raw[: sum(end <= stop for end in accumulate(map(len, raw)))]
        entries = None
        if ask.logprobs:
            entries = [
                {
                    **self._entry(token, value),
                    "top_logprobs": [
                        self._entry(other, each)
                        for other, each in zip(
                            top[0][: ask.top_logprobs], top[1][: ask.top_logprobs], strict=True
                        )
                    ],
                }
                for token, value, top in islice(zip(row.tokens, row.logprobs, row.top, strict=True), len(raw))
            ]
        return Generated(text_pieces(raw), reason, digest, entries)

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        raw = self._bytes[token]
        return {"token": raw.decode(errors="replace"), "logprob": value, "bytes": list(raw)}


def _settle(future: asyncio.Future[Result], result: Result) -> None:
    if not future.done():  # the caller may have left
        future.set_result(result)


def _fail(future: asyncio.Future[Result], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
