"""Serve the Files and Batch API: answer an uploaded JSON Lines file; answers are billed as usual.

A batch is finished when it is created, so nobody waits; a line that can't be answered lies in its error
file, as at a real provider.
"""

from __future__ import annotations

import itertools
import time
from email.parser import BytesParser
from email.policy import HTTP
from typing import Any

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from harvester.mock_teacher import wire
from harvester.mock_teacher.completions import Identity, completion
from harvester.mock_teacher.ledger import LedgerCharge
from harvester.mock_teacher.server import MockTeacher


class BatchStore:
    """The files and batches of one mock teacher, and the routes for them."""

    def __init__(self, teacher: MockTeacher) -> None:
        self._teacher = teacher
        self._files: dict[str, bytes] = {}
        self._batches: dict[str, dict[str, Any]] = {}
        self._numbers = itertools.count(1)

    def routes(self) -> list[Route]:
        """Return the routes for `routes.application`."""
        return [
            Route("/v1/files", self._upload, methods=["POST"]),
            Route("/v1/files/{file_id}/content", self._content, methods=["GET"]),
            Route("/v1/batches", self._create, methods=["POST"]),
            Route("/v1/batches", self._list, methods=["GET"]),
            Route("/v1/batches/{batch_id}", self._retrieve, methods=["GET"]),
        ]

    async def _upload(self, request: Request) -> Response:
        """Store a multipart upload (RFC 7578); the standard library's MIME parser reads it."""
        head = f"Content-Type: {request.headers.get('content-type', '')}\r\n\r\n".encode()
        parts = BytesParser(policy=HTTP).parsebytes(head + await request.body())
        for part in parts.iter_parts() if parts.is_multipart() else ():
            if part.get_filename():
                content = part.get_payload(decode=True)
                assert isinstance(content, bytes)
                return _json(self._file(content, part.get_filename() or ""))
        return _refused(400, "the upload holds no file")

    def _file(self, content: bytes, name: str) -> dict[str, Any]:
        file_id = f"file-mock{next(self._numbers):08d}"
        self._files[file_id] = content
        return {
            "id": file_id,
            "object": "file",
            "bytes": len(content),
            "created_at": int(time.time()),
            "filename": name,
            "purpose": "batch",
            "status": "processed",
        }

    async def _content(self, request: Request) -> Response:
        content = self._files.get(request.path_params["file_id"])
        return _refused(404, "no such file") if content is None else Response(content)

    async def _create(self, request: Request) -> Response:
        order = orjson.loads(await request.body())
        source = self._files.get(order.get("input_file_id", ""))
        if source is None:
            return _refused(400, "input_file_id names no file")
        good: list[bytes] = []
        bad: list[bytes] = []
        for line in source.splitlines():
            line_request = orjson.loads(line)
            status, body = await self._answer(orjson.dumps(line_request["body"]))
            row = {"custom_id": line_request["custom_id"], "response": {"status_code": status, "body": body}}
            (good if status == 200 else bad).append(orjson.dumps({"id": "batch_req", "error": None, **row}))
        batch_id = f"batch_mock{next(self._numbers):08d}"
        now = int(time.time())
        self._batches[batch_id] = {
            "id": batch_id,
            "object": "batch",
            "endpoint": order.get("endpoint"),
            "status": "completed",
            "input_file_id": order["input_file_id"],
            "completion_window": "24h",
            "created_at": now,
            "metadata": order.get("metadata"),
            "output_file_id": self._file(b"\n".join(good), "output.jsonl")["id"] if good else None,
            "error_file_id": self._file(b"\n".join(bad), "errors.jsonl")["id"] if bad else None,
            "request_counts": {"total": len(good) + len(bad), "completed": len(good), "failed": len(bad)},
        }
        return _json(self._batches[batch_id])

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

    async def _retrieve(self, request: Request) -> Response:
        batch = self._batches.get(request.path_params["batch_id"])
        return _refused(404, "no such batch") if batch is None else _json(batch)

    async def _list(self, _: Request) -> Response:
        rows = list(self._batches.values())
        return _json({"object": "list", "data": rows, "has_more": False})


def _json(value: Any) -> Response:
    return Response(orjson.dumps(value), media_type="application/json")


def _refused(status: int, message: str) -> Response:
    body = wire.error_body(message, "invalid_request_error", None)
    return Response(body, status, media_type="application/json")
