"""The bare client that ratios are compared with: httpx over an aiohttp transport, with its usual settings."""

from __future__ import annotations

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

HEADERS = {"content-type": "application/json"}


def bare_httpx() -> httpx.AsyncClient:
    """As many connections as there are requests, one deadline of a minute."""

    def session() -> aiohttp.ClientSession:
        return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))

    return httpx.AsyncClient(transport=AiohttpTransport(client=session), timeout=60)
