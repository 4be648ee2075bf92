"""Define the routes: chat, list of models, and `/mock/` for tests."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from harvester.errors import ConfigError
from harvester.mock_teacher import spoil, wire
from harvester.mock_teacher.batches import BatchStore
from harvester.mock_teacher.faults.actions import Stage
from harvester.mock_teacher.faults.script import MODELS, Script, read_rules
from harvester.mock_teacher.limits import LimitValues
from harvester.mock_teacher.server import MockTeacher
from harvester.mock_teacher.settings import MockSettings
from harvester.mock_teacher.spoil import SpoiledReply

CHAT_PATH = "/v1/chat/completions"
MODELS_PATH = "/v1/models"
# Routes that continue a text as it is; only with a model.
TEXT_ROUTES = {"/v1/completions": "completions", "/generate": "generate"}


def application(teacher: MockTeacher) -> ASGIApp:
    """Return the ASGI app. A request in absolute form, as sent to a proxy, is served by its path."""
    rest = Starlette(
        routes=[
            Route("/mock/ledger", _ledger(teacher), methods=["GET"]),
            Route("/mock/state", _state(teacher), methods=["GET"]),
            Route("/mock/limits", _limits(teacher), methods=["POST"]),
            Route("/mock/faults", _faults(teacher), methods=["POST"]),
            *BatchStore(teacher).routes(),
        ],
        exception_handlers={HTTPException: _no_such_route, ConfigError: _bad_order},
    )
    models = _Models(teacher)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if not path.startswith("/"):
            path = urlsplit(path).path
        if path == CHAT_PATH and scope["method"] == "POST":
            await teacher.chat(scope, receive, send)
        elif scope["method"] == "POST" and path in TEXT_ROUTES and teacher.serves(TEXT_ROUTES[path]):
            await teacher.chat(scope, receive, send, TEXT_ROUTES[path])
        elif path == MODELS_PATH and scope["method"] == "GET":
            await models(scope, receive, send)
        else:
            await rest(scope, receive, send)

    return app


class _Models:
    """`GET /v1/models`, with its own ordinals for fault rules that say `on = "models"`."""

    def __init__(self, teacher: MockTeacher) -> None:
        self._teacher = teacher
        self._served = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        teacher = self._teacher
        sender = teacher.sender(scope, receive, send)
        try:
            teacher.check_key(scope)
        except wire.Refusal as refusal:
            await sender.send(SpoiledReply(refusal.status, [spoil.JSON_TYPE], refusal.body))
            return
        self._served += 1
        rows = [{"id": teacher.settings.model, "object": "model", "created": 0, "owned_by": "mock"}]
        reply = SpoiledReply(200, [spoil.JSON_TYPE], orjson.dumps({"object": "list", "data": rows}))
        match = teacher.script.match(self._served, on=MODELS)
        if match is None:
            await sender.send(reply)
            return
        await receive()  # the empty body, so that the next message means the caller left
        rule = match[0]
        if rule.kind.stage is Stage.WIRE:
            await sender.cut(rule.action, rule.options, reply)
        elif rule.kind.stage is Stage.REFUSE:
            await sender.send(spoil.refuse(rule.action, rule.options))
        else:
            await sender.send(spoil.spoil_body(rule.action, rule.options, reply))


Endpoint = Callable[[Request], Awaitable[Response]]


def _json(value: Any, status: int = 200) -> Response:
    return Response(orjson.dumps(value), status, media_type="application/json")


def _ledger(teacher: MockTeacher) -> Endpoint:
    async def ledger(request: Request) -> Response:
        """Return the ledger; `?since=N` leaves out the first N charges, `?entries=0` all of them."""
        try:
            since = max(0, int(request.query_params.get("since", "0")))
        except ValueError as error:
            raise ConfigError("since must be a whole number", place="/mock/ledger") from error
        wanted = request.query_params.get("entries") != "0"
        return _json(
            {"totals": teacher.ledger.totals(), "entries": list(teacher.ledger.rows(since)) if wanted else []}
        )

    return ledger


def _state(teacher: MockTeacher) -> Endpoint:
    async def state(_: Request) -> Response:
        return _json(teacher.state())

    return state


async def _order(request: Request, kind: type, place: str) -> Any:
    try:
        order = orjson.loads(await request.body())
    except orjson.JSONDecodeError as error:
        raise ConfigError("the body is not JSON", place=place) from error
    if not isinstance(order, kind):
        raise ConfigError(f"the body must be a JSON {kind.__name__}", place=place)
    return order


def _limits(teacher: MockTeacher) -> Endpoint:
    async def limits(request: Request) -> Response:
        """Change the named limits (null removes one) and return all limits in force."""
        order = await _order(request, dict, "/mock/limits")
        unknown = set(order) - set(LimitValues.__slots__)
        if unknown:
            raise ConfigError(f"unknown limit {sorted(unknown)[0]!r}", place="/mock/limits")
        values = replace(teacher.limits.values, **order)
        try:
            # The same checks as at the start.
            MockSettings(
                rpm=values.rpm,
                tpm=values.tpm,
                burst_s=values.burst_s,
                window_s=values.window_s,
                max_concurrency=values.max_concurrency,
                concurrency_status=values.concurrency_status,
            )
        except TypeError as error:
            raise ConfigError("a limit is a number or null", place="/mock/limits") from error
        teacher.limits.change(values, time.monotonic())
        return _json(teacher.state()["limits"])

    return limits


def _faults(teacher: MockTeacher) -> Endpoint:
    async def faults(request: Request) -> Response:
        """Replace the fault script. Its counters start again at 0; ordinals continue."""
        teacher.script = Script(read_rules(await _order(request, list, "/mock/faults"), "/mock/faults"))
        return _json(teacher.state()["faults"])

    return faults


async def _no_such_route(request: Request, error: Exception) -> Response:
    status = error.status_code if isinstance(error, HTTPException) else 404
    text = f"Invalid URL ({request.method} {request.url.path})"
    return Response(
        wire.error_body(text, "invalid_request_error", None), status, media_type="application/json"
    )


async def _bad_order(_: Request, error: Exception) -> Response:
    return Response(
        wire.error_body(str(error), "mock_error", "bad_order"), 400, media_type="application/json"
    )
