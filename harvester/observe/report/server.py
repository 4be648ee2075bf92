"""Serve the report's page live, on this machine only (`harvester view`). It only reads the store.

It binds 127.0.0.1 and nothing else, answers GET and HEAD only, and only to the names in `HOSTS`: a web page
that rebinds its own name to this address gets 403. Every address but `/metrics`, which holds counts and no
texts, begins with a token that is made at each start: a request without it is refused before the store is
looked at, so that the time of the reply tells nothing either. What a teacher wrote reaches the browser
escaped, under a policy that runs our one script and loads nothing from anywhere.
"""

from __future__ import annotations

import hmac
import secrets
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from harvester.errors import ConfigError, StoreError
from harvester.observe.canary import read_rounds
from harvester.observe.report import html as page
from harvester.observe.report import prometheus, report
from harvester.observe.report.answer_statistics import ShardStatistics
from harvester.observe.report.samples import sample_view, samples_view, search
from harvester.observe.timeline import read_timeline

HOSTS = frozenset({"127.0.0.1", "localhost"})
# The corpus is read again after READ_EVERY_S, or READ_SHARE times the duration of reading it, if longer.
READ_EVERY_S = 5.0
READ_SHARE = 20
TOKEN_BYTES = 16
_METRICS = "/metrics"
_REMEDY = "open the address that `harvester view` printed: it holds a token that is new at each start\n"
# What browsers say of requests that this page itself made, and of an address that was typed.
_OWN_SITES = frozenset({b"same-origin", b"none"})
_HEADERS = (
    (b"content-security-policy", (page.policy(page.VIEW_SCRIPT) + "; frame-ancestors 'none'").encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)


class Guard:
    """Let only local names, reading methods, our own pages and addresses with the token through.

    Every reply gets the headers that keep pages of others out.
    """

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), *_HEADERS]
            await send(message)

        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close"})  # before it is accepted: a 403
        if scope["type"] != "http":
            return
        _, given, rest = (*scope["path"].split("/", 2), "", "")[:3]
        if refused := self._refusal(scope, given):
            await refused(scope, receive, guarded)
            return
        path = scope["path"] if scope["path"] == _METRICS else f"/{rest}"
        await self._app({**scope, "path": path, "raw_path": path.encode()}, receive, guarded)

    def _refusal(self, scope: Scope, given: str) -> Response | None:
        """Return the reply to a request that is not served, without a look at the store."""
        sites = [value for name, value in scope["headers"] if name == b"sec-fetch-site"]
        hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
        if len(hosts) != 1 or (hosts[0].rpartition(":")[0] not in HOSTS and hosts[0] not in HOSTS):
            return PlainTextResponse("this page answers to 127.0.0.1 and localhost only\n", 403)
        if any(site not in _OWN_SITES for site in sites):
            return PlainTextResponse("not for pages of other sites\n", 403)
        if scope["method"] not in {"GET", "HEAD"}:
            return PlainTextResponse("read-only\n", 405, {"allow": "GET, HEAD"})
        if scope["path"] != _METRICS and not hmac.compare_digest(given.encode(), self._token):
            return PlainTextResponse(_REMEDY, 403)
        return None


class LiveReport:
    """What the page shows: ledger, trace and status as of now; the corpus as of a moment ago."""

    def __init__(self, store: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.store = store
        self._clock = clock
        self._known: ShardStatistics = {}
        self._lock = threading.Lock()
        self._reading = False
        self._due = 0.0
        self._account = self._take()

    def account(self) -> report.ReportData:
        """Return the newest data. A due statistics is computed in a thread; a later call returns it."""
        with self._lock:
            begin = self._clock() >= self._due and not self._reading
            self._reading = self._reading or begin
        if begin:
            threading.Thread(target=self._refresh, name="statistics", daemon=True).start()
        account = self._account
        status, totals, runs = report.ledger_of(self.store)
        return replace(
            account,
            status=status,
            totals=totals,
            runs=runs,
            points=read_timeline(self.store),
            rounds=read_rounds(self.store),
        )

    def _take(self) -> report.ReportData:
        began = self._clock()
        account = report.gather(self.store, known=self._known)
        self._due = self._clock() + max(READ_EVERY_S, READ_SHARE * (self._clock() - began))
        return account

    def _refresh(self) -> None:
        try:
            self._account = self._take()
        except StoreError:  # a shard was merged into another while it was read: the next look finds that one
            self._due = self._clock() + READ_EVERY_S
        finally:
            self._reading = False


def build_app(store: Path, token: str) -> ASGIApp:
    """Return the whole server as an ASGI app.

    Args:
        token: first part of the path of every page.

    Raises:
        StoreError: the store can't be read.
    """
    live = LiveReport(store)

    def page_document(_: Request) -> Response:
        account = live.account()
        browsed = samples_view(account.statistics, account.samples[:50])
        return HTMLResponse(page.document(report.overview(account), browsed, page.VIEW_SCRIPT))

    def overview(_: Request) -> Response:
        at = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC"
        return JSONResponse({"html": page.fragment("overview", report.overview(live.account())), "at": at})

    def samples(request: Request) -> Response:
        text, outcome = request.query_params.get("q", ""), request.query_params.get("outcome", "")
        cursor = request.query_params.get("after", "")
        result = search(store, text, outcome=outcome, cursor=cursor)
        html = page.fragment("samples", {"samples": [sample_view(sample) for sample in result.samples]})
        more = {"count": len(result.samples), "cursor": result.cursor, "looked_at": result.looked_at}
        return JSONResponse({"html": html, **more})

    def metrics(_: Request) -> Response:
        return PlainTextResponse(prometheus.metrics_text(store), media_type=prometheus.CONTENT_TYPE)

    def unreadable(_: Request, error: Exception) -> Response:
        return PlainTextResponse(f"{error}\n", 503)

    pages = {"/": page_document, "/overview": overview, "/samples": samples, _METRICS: metrics}
    routes = [Route(path, page_of) for path, page_of in pages.items()]
    return Guard(Starlette(routes=routes, exception_handlers={StoreError: unreadable}), token)


def serve(store: Path, port: int, ready: Callable[[str], None]) -> None:
    """Serve until a signal; `ready` gets the address with its token. Port 0 picks a free one.

    Raises:
        ConfigError: the port is taken; StoreError: the store can't be read.
    """
    token = secrets.token_urlsafe(TOKEN_BYTES)
    app = build_app(store, token)
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(("127.0.0.1", port))
            listening.listen()
        except OSError as error:
            raise ConfigError(
                f"can't listen on port {port}: {error.strerror}",
                place="--port",
                remedy="--port 0 picks a free one",
            ) from None
        settings = uvicorn.Config(
            app, log_level="warning", access_log=False, server_header=False, lifespan="off"
        )
        ready(f"http://127.0.0.1:{listening.getsockname()[1]}/{token}/")
        uvicorn.Server(settings).run(sockets=[listening])
