"""Serve chat requests: admit, generate, charge, reply, or produce a fault.

The checks come first: key, body, model, concurrency, limits; each may refuse the request without a charge.
Then the request gets its ordinal, a fault rule may match, latency is waited for, and it is charged and
answered. The chat route is plain ASGI because it must be fast; the other routes are Starlette's.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.types import Receive, Scope, Send

from harvester.errors import ConfigError
from harvester.mock_teacher import spoil, wire
from harvester.mock_teacher.answerers import make_answerer
from harvester.mock_teacher.answers import MockAnswer
from harvester.mock_teacher.completions import (
    Completion,
    Generated,
    Identity,
    completion,
    stream_events,
    to_json,
)
from harvester.mock_teacher.cut import CallerConnection
from harvester.mock_teacher.faults.actions import LOST, Stage
from harvester.mock_teacher.faults.script import Rule, Script
from harvester.mock_teacher.ledger import Ledger, LedgerCharge
from harvester.mock_teacher.limits import LimitValues, MockLimits
from harvester.mock_teacher.reply import ReplySender, read_body
from harvester.mock_teacher.scoring import honoured, text_completion
from harvester.mock_teacher.settings import MockSettings
from harvester.mock_teacher.spoil import SpoiledReply


@dataclass(frozen=True, slots=True)
class Turn:
    """One admitted request: the request, what was generated, and the fault that applies."""

    ordinal: int
    ask: wire.ChatRequest
    answers: Sequence[MockAnswer]
    generated: Sequence[Generated]
    rule: Rule | None
    fault: str | None

    def output_tokens(self) -> int:
        """Return the tokens of all choices."""
        return sum(len(answer.pieces) for answer in self.generated)


class MockTeacher:
    """The state of one mock teacher, and its chat route.

    Raises:
        ConfigError: the variable named by `require_key_env` is not set, or the ledger can't be written.
    """

    def __init__(self, settings: MockSettings) -> None:
        self.settings = settings
        self.key = _read_key(settings.require_key_env)
        self.ledger = Ledger(settings.ledger_file)
        self.answerer = make_answerer(settings)
        values = LimitValues(
            settings.rpm,
            settings.tpm,
            settings.burst_s,
            settings.window_s,
            settings.hide_limits,
            settings.max_concurrency,
            settings.concurrency_status,
        )
        self.limits = MockLimits(values, settings.model, time.monotonic())
        self.slots = None if settings.slots is None else asyncio.Semaphore(settings.slots)
        self.script = Script(settings.faults)
        self.fingerprint = f"mock-{settings.seed & 0xFFFFFFFF:08x}"
        self.started_at = time.time()
        self.admitted = 0
        self.received = 0
        self.in_flight = 0
        self.most_in_flight = 0
        self.statuses: Counter[int] = Counter()
        self.errors: list[str] = []
        self.held: set[asyncio.Transport] = set()
        self.tasks: dict[str, dict[str, int]] = {}
        self._life = f"{int(self.started_at * 1000) & 0xFFFFFFFF:08x}"
        self._jitter = settings.latency_jitter

    def serves(self, route: str) -> bool:
        """Whether a route that continues a text is there: with a model, and unless settings leave it out."""
        has_route = route == "completions" or "generate" in self.settings.scores
        return self.settings.model_folder is not None and has_route

    async def chat(self, scope: Scope, receive: Receive, send: Send, route: str = "chat") -> None:
        """Serve one request for answers: a chat, or a text to continue (`ScoreAsk.route`)."""
        self.received += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        sender = self.sender(scope, receive, send)
        try:
            turn = await self._admit(scope, receive, route)
            if turn is not None:
                await self._serve(turn, sender)
        except wire.Refusal as refusal:
            await sender.send(SpoiledReply(refusal.status, [spoil.JSON_TYPE, *refusal.headers], refusal.body))
        except Exception as error:
            self.errors.append(repr(error))
            raise
        finally:
            self.in_flight -= 1

    def sender(self, scope: Scope, receive: Receive, send: Send) -> ReplySender:
        """Return the sender of replies to the caller of `scope`."""
        return ReplySender(
            CallerConnection(scope["state"]["transport"], receive), send, self.statuses, self.held
        )

    async def _admit(self, scope: Scope, receive: Receive, route: str) -> Turn | None:
        raw = await read_body(receive)
        if raw is None:
            return None
        self.check_key(scope)
        settings = self.settings
        if route == "chat":
            ask = wire.read_ask(raw, model=settings.model, context_tokens=settings.context_tokens)
        else:
            ask = wire.read_text_ask(raw, route, model=settings.model, context_tokens=settings.context_tokens)
        if ask.scoring is not wire.PLAIN_CHAT:
            ask = replace(ask, scoring=honoured(ask.scoring, settings.scores))
        ask = self.answerer.measure(wire.limit_choices(ask, settings.max_n, settings.n_above))
        self.limits.check_concurrency(self.in_flight)
        solution = self.answerer.at_once(ask)
        if ask.max_tokens is not None and (solution is None or settings.tpm_counts == "max"):
            output = ask.max_tokens * ask.n
        else:
            output = sum(len(answer.pieces) for answer in solution[1]) if solution else 0
        self.limits.admit(ask.prompt_tokens + output, time.monotonic())
        self.admitted += 1
        match = self.script.match(
            self.admitted, text=ask.text, body=ask.body_sha256, stream=ask.stream, choices=ask.n
        )
        rule, name = match if match else (None, None)
        ordinal = self.admitted
        is_refused = rule is not None and rule.kind.stage is Stage.REFUSE and not rule.is_billed
        if solution is None and is_refused:
            solution = ([], [])
        pending = self.answerer.start(ask) if solution is None else None
        if rule is None or rule.is_billed:
            # Before anything is awaited, so that two equal requests in flight get two samples.
            self.answerer.note_answered(ask)
        answers, generated = await pending if pending is not None else solution or ([], [])
        if rule is not None and rule.action == "fewer_choices":
            count = rule.options.get("count", 1)
            answers, generated = answers[:count], generated[:count]
        return Turn(ordinal, ask, answers, generated, rule, name)

    def check_key(self, scope: Scope) -> None:
        """Raise a 401 `Refusal` if a key is required and the request does not have it."""
        if self.key is None:
            return
        header = dict(scope["headers"]).get(b"authorization", b"")
        if header != b"Bearer " + self.key:
            text = "Incorrect API key provided."
            raise wire.Refusal(401, wire.error_body(text, "invalid_request_error", "invalid_api_key"))

    async def _serve(self, turn: Turn, sender: ReplySender) -> None:
        rule = turn.rule
        if self.slots is not None:
            async with self.slots:
                if sender.is_gone():  # it left while it queued: nothing was generated
                    return
                await asyncio.sleep(self.settings.slot_s)
        wait_s = self._latency_s(turn.ordinal, 0 if turn.ask.stream else turn.output_tokens())
        wait_s += rule.delay_s if rule else 0.0
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        response_id = f"chatcmpl-{self._life}{turn.ordinal:08x}"
        if rule is None or rule.is_billed:
            self._charge(turn, response_id, sender.is_gone())
        if rule is not None and rule.kind.stage is Stage.REFUSE:
            await sender.send(spoil.refuse(rule.action, rule.options))
            return
        reply = self._reply(turn, response_id)
        if rule is not None and rule.kind.stage is Stage.WIRE:
            await sender.cut(rule.action, rule.options, reply)
        else:
            await sender.send(reply, self.settings.per_token_latency_s)

    def _latency_s(self, ordinal: int, output_tokens: int) -> float:
        mean = self.settings.latency_s
        if mean and self._jitter:
            # A low-discrepancy sequence: even spread, no state, the same in every run.
            mean *= 1 + self._jitter * (2 * (ordinal * 0.6180339887498949 % 1.0) - 1)
        return mean + output_tokens * self.settings.per_token_latency_s

    def _charge(self, turn: Turn, response_id: str, caller_gone: bool) -> None:
        ask = turn.ask
        task = turn.answers[0].task
        right = None if task is None else sum(bool(answer.right) for answer in turn.answers)
        if task is not None:
            tally = self.tasks.setdefault(task, {"answers": 0, "right": 0})
            tally["answers"] += len(turn.answers)
            tally["right"] += right or 0
        self.ledger.charge(
            LedgerCharge(
                ordinal=turn.ordinal,
                response_id=response_id,
                body_sha256=ask.body_sha256,
                prompt_sha256=ask.prompt_sha256,
                choices=len(turn.generated),
                prompt_tokens=ask.prompt_tokens,
                completion_tokens=turn.output_tokens(),
                at=time.time(),
                task=task,
                right=right,
                cut=caller_gone or (turn.rule is not None and turn.rule.action in LOST),
                fault=turn.fault,
            )
        )

    def _reply(self, turn: Turn, response_id: str) -> SpoiledReply:
        rule, ask = turn.rule, turn.ask
        identity = Identity(response_id, int(time.time()), ask.model, self.fingerprint)
        make = completion if ask.scoring.route == "chat" else text_completion
        document: Completion = make(ask, turn.generated, identity)
        if rule is not None and rule.kind.stage is Stage.ANSWER:
            document = spoil.spoil_answer(rule.action, rule.options, document)
        limit_headers = self.limits.headers(time.monotonic())
        headers = [(b"x-request-id", b"req_" + response_id[9:].encode()), *limit_headers]
        if ask.stream:
            events = tuple(stream_events(document, ask.include_usage))
            reply = SpoiledReply(200, [spoil.STREAM_TYPE, *headers], events=events)
        else:
            reply = SpoiledReply(200, [spoil.JSON_TYPE, *headers], to_json(document))
        if rule is not None and rule.kind.stage is Stage.BODY:
            return spoil.spoil_body(rule.action, rule.options, reply)
        if rule is not None and rule.kind.stage is Stage.STREAM:
            return spoil.spoil_stream(rule.action, rule.options, reply)
        return reply

    def state(self) -> dict[str, Any]:
        """Return counters and settings for tests, as JSON values."""
        values = self.limits.values
        return {
            "model": self.settings.model,
            "pid": os.getpid(),
            "cpu_s": time.process_time(),
            "received": self.received,
            "admitted": self.admitted,
            "in_flight": self.in_flight,
            "most_in_flight": self.most_in_flight,
            "statuses": {str(status): times for status, times in self.statuses.items()},
            "errors": self.errors,
            "tasks": self.tasks,
            "limits": {name: getattr(values, name) for name in LimitValues.__slots__},
            "faults": {
                name: {"fired": times, "ordinals": self.script.ordinals[name]}
                for name, times in self.script.fired.items()
            },
        }


def _read_key(name: str | None) -> bytes | None:
    if name is None:
        return None
    value = os.environ.get(name, "")
    if not value:
        raise ConfigError(
            f"the variable {name} is not set",
            place="--require-key-env",
            remedy=f"set it first: export {name}=...",
        )
    return value.encode()
