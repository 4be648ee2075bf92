"""Serve the answers of a benchmark: nginx if it is installed, else a small server process of our own.

Both answer `POST /v1/chat/completions` with one fixed completion of 1.1 KB, at once or after 0.5 to 1 s
(nginx answers the first request of each connection at once), and `GET /v1/models` with a list. They need
very little CPU compared with what is measured.

    python benchmarks/load_side.py [--slow]       # our own server alone: prints its port, then serves
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MODEL = "mock-teacher"
SLOW_S = (0.5, 1.0)
MODELS = json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]})
ANSWER = json.dumps(
    {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 1_760_000_000,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop",
                "message": {"role": "assistant", "content": "It is forty-two, for these reasons. " * 21},
            }
        ],
        "usage": {"prompt_tokens": 16, "completion_tokens": 190, "total_tokens": 206},
    }
)

# `return` would answer before limit_req is asked. A static file refuses POST with 405, which comes after it,
# and the error page of that is the answer. One zone for each delay, so that a bucket of one request per
# connection makes each request wait for its predecessor's time to pass.
NGINX = """
daemon off; worker_processes 1; worker_rlimit_nofile 16384; pid {folder}/pid; error_log {folder}/errors;
events {{ worker_connections 8192; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 600s; default_type application/json;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s; open_file_cache max=10;
  map $connection $half {{ "~[0369]$" $connection; default ""; }}
  map $connection $three_quarters {{ "~[147]$" $connection; default ""; }}
  map $connection $whole {{ "~[258]$" $connection; default ""; }}
  limit_req_zone $half zone=half:8m rate=120r/m;
  limit_req_zone $three_quarters zone=three_quarters:8m rate=80r/m;
  limit_req_zone $whole zone=whole:8m rate=60r/m;
  server {{
    listen 127.0.0.1:{port} backlog=8192; root {folder};
    location = /v1/models {{ return 200 '{models}'; }}
    location = /v1/chat/completions {{
      {waits} error_page 405 =200 /answer.json; try_files /answer.json =404;
    }}
  }}
}}
"""
WAITS = "limit_req zone=half burst=9; limit_req zone=three_quarters burst=9; limit_req zone=whole burst=9;"


@dataclass(frozen=True, slots=True)
class Load:
    """A running load side."""

    base_url: str
    kind: str


@contextmanager
def load_side(*, slow: bool = False, own: bool = False) -> Iterator[Load]:
    """Serve until the block ends.

    Args:
        slow: answer after 0.5 to 1 s instead of at once.
        own: our own server even where nginx is installed.
    """
    nginx = None if own else shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    with tempfile.TemporaryDirectory(prefix="load-") as folder:
        if nginx:
            port, command = (
                _free_port(),
                [nginx, "-p", folder, "-e", f"{folder}/errors", "-c", f"{folder}/conf"],
            )
            waits = WAITS if slow else ""
            conf = NGINX.format(folder=folder, port=port, models=MODELS, waits=waits)
            Path(folder, "conf").write_text(conf, encoding="utf-8")
            Path(folder, "answer.json").write_text(ANSWER, encoding="utf-8")
            Path(folder).chmod(0o755)  # a worker that root started reads it as another user
            process = subprocess.Popen(command, text=True)
        else:
            command = [sys.executable, __file__, *(["--slow"] if slow else [])]
            process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
            assert process.stdout is not None
            port = int(process.stdout.readline())
        try:
            _await_port(process, port)
            yield Load(f"http://127.0.0.1:{port}/v1", "nginx" if nginx else "own server")
        finally:
            process.terminate()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_port(process: subprocess.Popen[str], port: int) -> None:
    until = time.monotonic() + 10
    while time.monotonic() < until and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.01)
    raise SystemExit(f"the load side does not start: {process.args!r}")


class _Connection(asyncio.Protocol):
    """HTTP/1.1 as far as a benchmark's client speaks it: one request at a time, a Content-Length."""

    slow = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._got = bytearray()

    def data_received(self, data: bytes) -> None:
        self._got += data
        head = self._got.find(b"\r\n\r\n")
        if head < 0:
            return
        lines = self._got[:head].lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), 0)
        if len(self._got) < head + 4 + length:
            return
        del self._got[: head + 4 + length]
        body = (ANSWER if lines[0].startswith(b"post") else MODELS).encode()
        head_lines = (
            f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        delay_s = random.uniform(*SLOW_S) if self.slow and lines[0].startswith(b"post") else 0.0
        if delay_s:
            asyncio.get_running_loop().call_later(delay_s, self._transport.write, head_lines.encode() + body)
        else:
            self._transport.write(head_lines.encode() + body)


async def _serve(slow: bool) -> None:
    _Connection.slow = slow
    server = await asyncio.get_running_loop().create_server(_Connection, "127.0.0.1", 0, backlog=8192)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--slow", action="store_true", help="answer after 0.5 to 1 s")
    asyncio.run(_serve(parser.parse_args().slow))
