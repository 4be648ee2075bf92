"""Compute the course of a batch on a clock of its own: validating, in progress, then one of the endings.

The batch clock is the machine's, plus what `POST /mock/clock` and each retrieval added. Lines are answered,
and billed, when somebody looks at the batch after their time has come, evenly over `latency_s`.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

from harvester.mock_teacher.settings import BatchSettings

ENDED = frozenset({"completed", "failed", "expired", "cancelled"})
# Answers one line of a batch: its body -> status and the body of the reply. A 200 is billed.
AnswerLine = Callable[[bytes], Awaitable[tuple[int, dict[str, Any]]]]


class BatchClock:
    """Unix seconds of the batches; it never goes back."""

    def __init__(self) -> None:
        self.advanced_s = 0.0

    def now(self) -> float:
        """Return the time."""
        return time.time() + self.advanced_s

    def advance(self, seconds: float) -> None:
        """Let that many seconds pass at once."""
        self.advanced_s += seconds


@dataclass(slots=True)
class BatchJob:
    """One batch. `fields` are those of the batch object that never change."""

    fields: dict[str, Any]
    lines: list[bytes]
    created_at: float
    failure: str = ""
    answered: int = 0
    good: list[bytes] = field(default_factory=list)
    bad: list[bytes] = field(default_factory=list)
    cancelled_at: float | None = None
    ended_at: float | None = None
    status: str = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def look(self, now: float, settings: BatchSettings, answer: AnswerLine) -> bool:
        """Bring the batch up to `now`; return whether it has just ended."""
        async with self.lock:
            if self.ended_at is not None:
                return False
            await self._answer_lines(now, settings, answer)
            self.status = self._status(now, settings)
            if self.status not in ENDED:
                return False
            self.ended_at = now
            if self.status == "expired":
                self._expire_rest()
            return True

    def _started_at(self, settings: BatchSettings) -> float:
        return self.created_at + settings.validating_s

    def _last_moment(self, now: float, settings: BatchSettings) -> float:
        """Return until when lines are answered: not after a cancellation, nor after the window."""
        moments = [now, self.created_at + settings.window_s]
        return min(moments if self.cancelled_at is None else [*moments, self.cancelled_at])

    async def _answer_lines(self, now: float, settings: BatchSettings, answer: AnswerLine) -> None:
        worked_s = self._last_moment(now, settings) - self._started_at(settings)
        if self.failure or worked_s < 0:
            return
        share = 1.0 if settings.latency_s <= 0 else min(1.0, worked_s / settings.latency_s)
        due = int(share * len(self.lines) + 1e-9)
        while self.answered < due:
            line = orjson.loads(self.lines[self.answered])
            self.answered += 1
            await self._answer_line(line, settings, answer)

    async def _answer_line(self, line: dict[str, Any], settings: BatchSettings, answer: AnswerLine) -> None:
        number = self.answered
        body: dict[str, Any]
        if settings.error_every and number % settings.error_every == 0:
            error = {"message": "The mock teacher fails this line.", "type": "mock_error", "code": None}
            error["code"] = settings.error_code or None
            status, body = settings.error_status, {"error": error}
        else:
            status, body = await answer(orjson.dumps(line["body"]))
            if settings.model_every and number % settings.model_every == 0 and status == 200:
                body["model"] = "mock-teacher-2"
        if settings.missing_every and number % settings.missing_every == 0:
            return
        response = {"status_code": status, "request_id": f"req_{number}", "body": body}
        row = {
            "id": f"batch_req_{number}",
            "custom_id": line["custom_id"],
            "response": response,
            "error": None,
        }
        (self.good if status == 200 else self.bad).append(orjson.dumps(row))
        if settings.duplicate_every and number % settings.duplicate_every == 0 and status == 200:
            self.good.append(orjson.dumps(row))

    def _status(self, now: float, settings: BatchSettings) -> str:
        if now < self._started_at(settings):
            return "validating" if self.cancelled_at is None else "cancelling"
        if self.failure:
            return "failed"
        if self.answered == len(self.lines):
            return "completed"
        if self.cancelled_at is not None:
            return "cancelled" if now >= self.cancelled_at + settings.cancelling_s else "cancelling"
        return "expired" if now >= self.created_at + settings.window_s else "in_progress"

    def _expire_rest(self) -> None:
        message = "This request could not be executed before the completion window expired."
        for number, text in enumerate(self.lines[self.answered :], start=self.answered + 1):
            error = {"code": "batch_expired", "message": message}
            row = {"id": f"batch_req_{number}", "custom_id": orjson.loads(text)["custom_id"]}
            self.bad.append(orjson.dumps({**row, "response": None, "error": error}))

    def output(self, settings: BatchSettings) -> bytes:
        """Return the lines of the output file."""
        lines = list(self.good)
        if settings.shuffle:
            random.Random(len(lines)).shuffle(lines)
        return b"".join(line + b"\n" for line in lines)

    def errors(self) -> bytes:
        """Return the lines of the error file."""
        return b"".join(line + b"\n" for line in self.bad)

    def as_dict(self) -> dict[str, Any]:
        """Return the batch object, as OpenAI's API has it."""
        failed = [
            {"code": self.failure, "message": "The batch was not accepted.", "param": None, "line": None}
        ]
        counts = {"total": len(self.lines), "completed": len(self.good), "failed": len(self.bad)}
        return {
            **self.fields,
            "object": "batch",
            "status": self.status,
            "errors": {"object": "list", "data": failed} if self.status == "failed" else None,
            "output_file_id": self.output_file_id,
            "error_file_id": self.error_file_id,
            "request_counts": counts,
        }
