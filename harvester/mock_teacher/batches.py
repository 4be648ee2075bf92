"""Serve the Files and Batch API: upload, create, list, retrieve, cancel, read results.

Answers are billed as usual. `POST /mock/clock {"advance_s": 3600}` lets an hour pass for all batches, and
`POST /mock/batches` changes their settings (`settings.BatchSettings`). A fault rule may name one of the
routes in `on`: "upload", "create", "list", "retrieve", "cancel", "content".
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from harvester.errors import ConfigError
from harvester.mock_teacher import spoil, wire
from harvester.mock_teacher.batch_jobs import ENDED, BatchClock, BatchJob
from harvester.mock_teacher.completions import Identity, completion
from harvester.mock_teacher.faults.actions import Stage
from harvester.mock_teacher.ledger import LedgerCharge
from harvester.mock_teacher.reply import read_body
from harvester.mock_teacher.server import MockTeacher
from harvester.mock_teacher.spoil import SpoiledReply

# Batches of one page of the list, where the caller names no number.
PAGE = 20


class BatchStore:
    """The files and batches of one mock teacher, and the routes for them."""

    def __init__(self, teacher: MockTeacher) -> None:
        self._teacher = teacher
        self._settings = teacher.settings.batches
        self._clock = BatchClock()
        self._files: dict[str, bytes] = {}
        self._jobs: dict[str, BatchJob] = {}
        self._numbers = itertools.count(1)
        self._served: Counter[str] = Counter()

    def routes(self) -> list[Route]:
        """Return the routes for `routes.application`."""
        return [
            self._route("upload", "/v1/files", "POST", self._upload),
            self._route("content", "/v1/files/{file_id}/content", "GET", self._content),
            self._route("create", "/v1/batches", "POST", self._create),
            self._route("list", "/v1/batches", "GET", self._list),
            self._route("retrieve", "/v1/batches/{batch_id}", "GET", self._retrieve),
            self._route("cancel", "/v1/batches/{batch_id}/cancel", "POST", self._cancel),
            Route("/mock/clock", self._advance, methods=["POST"]),
            Route("/mock/batches", self._change, methods=["POST"]),
            Route("/mock/batches", self._state, methods=["GET"]),
        ]

    def _route(self, name: str, path: str, method: str, serve: _Serve) -> Route:
        async def app(scope: Scope, receive: Receive, send: Send) -> None:
            await self._reply(name, serve, scope, receive, send)

        # Starlette takes an object that is no function for an ASGI app.
        return Route(path, _App(app), methods=[method])

    async def _reply(self, name: str, serve: _Serve, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one call; a fault rule may refuse it first, or spoil its reply afterwards."""
        teacher, sender = self._teacher, self._teacher.sender(scope, receive, send)
        body = await read_body(receive)
        if body is None:
            return
        try:
            teacher.check_key(scope)
            self._served[name] += 1
            match = teacher.script.match(self._served[name], on=name)
            rule = match[0] if match else None
            if rule is not None and rule.kind.stage is Stage.REFUSE:
                await sender.send(spoil.refuse(rule.action, rule.options))
                return
            content = await serve(Request(scope), body)
        except wire.Refusal as refusal:
            await sender.send(SpoiledReply(refusal.status, [spoil.JSON_TYPE, *refusal.headers], refusal.body))
            return
        except Exception as error:
            teacher.errors.append(repr(error))
            raise
        reply = SpoiledReply(200, [spoil.JSON_TYPE], content)
        if rule is not None and rule.kind.stage is Stage.WIRE:
            await sender.cut(rule.action, rule.options, reply)
        elif rule is not None:
            await sender.send(spoil.spoil_body(rule.action, rule.options, reply))
        else:
            await sender.send(reply)

    async def _upload(self, request: Request, body: bytes) -> bytes:
        """Store a multipart upload (RFC 7578); the standard library's MIME parser reads it."""
        head = f"Content-Type: {request.headers.get('content-type', '')}\r\n\r\n".encode()
        parts = BytesParser(policy=HTTP).parsebytes(head + body)
        for part in parts.iter_parts() if parts.is_multipart() else ():
            if part.get_filename():
                content = part.get_payload(decode=True)
                assert isinstance(content, bytes)
                if len(content) > self._settings.max_bytes:
                    raise _refusal(400, f"the file has {len(content)} bytes", "file_too_large")
                return orjson.dumps(self._file(content, part.get_filename() or ""))
        raise _refusal(400, "the upload holds no file")

    def _file(self, content: bytes, name: str) -> dict[str, Any]:
        file_id = f"file-mock{next(self._numbers):08d}"
        self._files[file_id] = content
        return {
            "id": file_id,
            "object": "file",
            "bytes": len(content),
            "created_at": int(self._clock.now()),
            "filename": name,
            "purpose": "batch",
            "status": "processed",
        }

    async def _content(self, request: Request, _: bytes) -> bytes:
        file_id = request.path_params["file_id"]
        self._delete_old_results()
        if file_id not in self._files:
            raise _refusal(404, f"No such File object: {file_id}")
        return self._files[file_id]

    def _delete_old_results(self) -> None:
        kept_s = self._settings.results_kept_s
        for job in self._jobs.values():
            if kept_s is not None and job.ended_at is not None and self._clock.now() >= job.ended_at + kept_s:
                for file_id in (job.output_file_id, job.error_file_id):
                    self._files.pop(file_id or "", None)

    async def _create(self, _: Request, body: bytes) -> bytes:
        order, settings = orjson.loads(body), self._settings
        source = self._files.get(order.get("input_file_id", ""))
        if source is None:
            raise _refusal(400, "input_file_id names no file")
        lines = [line for line in source.splitlines() if line.strip()]
        if len(lines) > settings.max_requests:
            raise _refusal(400, f"the file has {len(lines)} requests", "too_many_requests_in_file")
        job = BatchJob(
            fields={
                "id": f"batch_mock{next(self._numbers):08d}",
                "endpoint": order.get("endpoint"),
                "input_file_id": order["input_file_id"],
                "completion_window": order.get("completion_window"),
                "created_at": int(self._clock.now()),
                "metadata": order.get("metadata"),
            },
            lines=lines,
            created_at=self._clock.now(),
            failure=self._failure(lines),
        )
        self._jobs[job.fields["id"]] = job
        await self._look(job)
        return orjson.dumps(job.as_dict())

    def _failure(self, lines: list[bytes]) -> str:
        """Return why a new batch fails its validation; "" if it does not."""
        settings = self._settings
        if settings.fails_with:
            return settings.fails_with
        waiting = sum(len(job.lines) for job in self._jobs.values() if job.status not in ENDED)
        is_full = settings.max_enqueued is not None and waiting + len(lines) > settings.max_enqueued
        return "token_limit_exceeded" if is_full else ""

    async def _look(self, job: BatchJob) -> None:
        """Bring a batch up to date; store its result files when it has just ended."""
        if await job.look(self._clock.now(), self._settings, self._answer):
            if job.good:
                job.output_file_id = self._file(job.output(self._settings), "output.jsonl")["id"]
            if job.bad:
                job.error_file_id = self._file(job.errors(), "errors.jsonl")["id"]

    async def _answer(self, raw: bytes) -> tuple[int, dict[str, Any]]:
        teacher = self._teacher
        try:
            ask = wire.read_ask(
                raw, model=teacher.settings.model, context_tokens=teacher.settings.context_tokens
            )
            ask = teacher.answerer.measure(ask)
        except wire.Refusal as refusal:
            return refusal.status, orjson.loads(refusal.body)
        pending = teacher.answerer.start(ask)
        teacher.answerer.note_answered(ask)
        answers, generated = await pending
        teacher.admitted += 1
        identity = Identity(
            f"chatcmpl-batch{teacher.admitted:08x}", int(time.time()), ask.model, teacher.fingerprint
        )
        teacher.ledger.charge(
            LedgerCharge(
                ordinal=teacher.admitted,
                response_id=identity.response_id,
                body_sha256=ask.body_sha256,
                prompt_sha256=ask.prompt_sha256,
                choices=ask.n,
                prompt_tokens=ask.prompt_tokens,
                completion_tokens=sum(len(answer.pieces) for answer in generated),
                at=time.time(),
                task=answers[0].task,
                right=None,
                cut=False,
                fault=None,
            )
        )
        loaded: dict[str, Any] = orjson.loads(orjson.dumps(completion(ask, generated, identity)))
        return 200, loaded

    def _job(self, request: Request) -> BatchJob:
        job = self._jobs.get(request.path_params["batch_id"])
        if job is None:
            raise _refusal(404, "no such batch")
        return job

    async def _retrieve(self, request: Request, _: bytes) -> bytes:
        job = self._job(request)
        self._clock.advance(self._settings.tick_s)
        await self._look(job)
        return orjson.dumps(job.as_dict())

    async def _cancel(self, request: Request, _: bytes) -> bytes:
        job = self._job(request)
        await self._look(job)
        if job.ended_at is not None:
            raise _refusal(409, f"Cannot cancel a batch with status '{job.status}'.")
        if job.cancelled_at is None:
            job.cancelled_at = self._clock.now()
        await self._look(job)
        return orjson.dumps(job.as_dict())

    async def _list(self, request: Request, _: bytes) -> bytes:
        jobs = [] if self._settings.hides_list else list(reversed(self._jobs.values()))
        ids = [job.fields["id"] for job in jobs]
        after, limit = request.query_params.get("after", ""), int(request.query_params.get("limit", PAGE))
        start = ids.index(after) + 1 if after in ids else 0
        page = jobs[start : start + limit]
        for job in page:
            await self._look(job)
        return orjson.dumps(
            {
                "object": "list",
                "data": [job.as_dict() for job in page],
                "has_more": start + limit < len(jobs),
            }
        )

    async def _advance(self, request: Request) -> Response:
        """Let time pass for the batches."""
        order = orjson.loads(await request.body())
        self._clock.advance(float(order["advance_s"]))
        return _json({"now": self._clock.now()})

    async def _change(self, request: Request) -> Response:
        """Change the named settings and return all."""
        order = orjson.loads(await request.body())
        try:
            self._settings = replace(self._settings, **order)
        except TypeError as error:
            raise ConfigError(f"unknown setting of batches: {error}", place="/mock/batches") from error
        return _json(asdict(self._settings))

    async def _state(self, _: Request) -> Response:
        """Return every batch as it is, how often each route was called, and the lines not yet answered."""
        for job in self._jobs.values():
            await self._look(job)
        batches = [job.as_dict() for job in self._jobs.values()]
        return _json({"batches": batches, "served": dict(self._served), "now": self._clock.now()})


_Serve = Callable[[Request, bytes], Awaitable[bytes]]


class _App:
    """An ASGI app that is no function."""

    def __init__(self, app: Callable[[Scope, Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def _refusal(status: int, message: str, code: str | None = None) -> wire.Refusal:
    return wire.Refusal(status, wire.error_body(message, "invalid_request_error", code))
