"""Run nginx with `limit_req` before a mock teacher, and whole harvests as processes, for limit_share.py.

`limit_req rate=R burst=B nodelay` is what many people put before a model: no headers, an HTML page with
status 429, and a burst that is small against the rate.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from load_side import MODEL, _await_port, _free_port

from harvester.mock_teacher.running import start_process
from harvester.store.journal.journal import Journal

NGINX = """
daemon off; worker_processes 1; worker_rlimit_nofile 16384; pid {folder}/pid; error_log {folder}/errors;
events {{ worker_connections 8192; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 600s;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
  log_format brief '$status';
  limit_req_zone $server_name zone=all:1m rate={rate}r/s; limit_req_status 429;
  upstream teacher {{ server {upstream}; keepalive 600; }}
  server {{
    listen 127.0.0.1:{port} backlog=8192; server_name one;
    proxy_http_version 1.1; proxy_set_header Connection "";
    location = /v1/chat/completions {{
      access_log {folder}/access brief;
      limit_req zone=all burst={burst} nodelay; proxy_pass http://teacher;
    }}
    location / {{ proxy_pass http://teacher; }}
  }}
}}
"""


def find_nginx() -> str | None:
    """Path of nginx, None where it is not installed."""
    return shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@dataclass(frozen=True, slots=True)
class LimitingNginx:
    """A running nginx; `statuses` counts what it answered."""

    base_url: str
    folder: Path

    def statuses(self) -> dict[str, int]:
        """Replies to chat requests by status."""
        counts: dict[str, int] = {}
        for status in (self.folder / "access").read_text(encoding="ascii").split():
            counts[status] = counts.get(status, 0) + 1
        return counts


@contextmanager
def limiting_nginx(rate: int, burst: int, latency_s: float) -> Iterator[LimitingNginx]:
    """Serve until the block ends; the mock teacher behind it has no limit of its own."""
    nginx = find_nginx()
    assert nginx is not None
    with (
        tempfile.TemporaryDirectory(prefix="nginx-") as name,
        start_process("--latency", str(latency_s)) as mock,
    ):
        folder, port = Path(name), _free_port()
        folder.chmod(0o755)  # a worker that root started writes there as another user
        upstream = mock.base_url.partition("//")[2].partition("/")[0]
        conf = NGINX.format(folder=folder, port=port, upstream=upstream, rate=rate, burst=burst)
        (folder / "conf").write_text(conf, encoding="utf-8")
        command = [nginx, "-p", name, "-e", f"{name}/errors", "-c", f"{name}/conf"]
        process = subprocess.Popen(command, text=True)
        try:
            _await_port(process, port)
            yield LimitingNginx(f"http://127.0.0.1:{port}/v1", folder)
        finally:
            process.terminate()
            process.wait()


@dataclass(frozen=True, slots=True)
class Harvest:
    """A whole `harvester run` as a process.

    Attributes:
        whole_s: from the start of the process to its end.
        run_s: from the begin of the run in the journal to its end, without the start of the process.
        sent: requests that were sent.
        late_timeouts: attempts that timed out more than ten seconds after the begin of the run.
        learned: lines of the status.
    """

    whole_s: float
    run_s: float
    sent: int
    late_timeouts: int
    learned: list[str]


def whole_harvest(base_url: str, rows: int, limits: dict[str, Any], deadline_s: float = 60) -> Harvest:
    """Ask so many rows in a process of its own, and wait until it ends.

    Raises:
        SystemExit: a row has no answer.
    """
    with tempfile.TemporaryDirectory(prefix="harvest-") as name:
        folder = Path(name)
        limit_lines = "".join(f"{key} = {value}\n" for key, value in limits.items())
        (folder / "harvest.toml").write_text(
            f'[teacher]\nbase_url = "{base_url}"\nmodel = "{MODEL}"\nterms = "mock-teacher"\n'
            f'[teacher.limits]\n{limit_lines}[prompts]\nfiles = ["p.jsonl"]\n[sampling]\nmax_tokens = 64\n'
            f"[run]\ndeadline_s = {deadline_s}\n",
            encoding="utf-8",
        )
        prompts = (json.dumps({"prompt": f"What is {n} + {7 * n}?"}) + "\n" for n in range(rows))
        (folder / "p.jsonl").write_text("".join(prompts), encoding="utf-8")
        command = [sys.executable, "-m", "harvester", "run", str(folder / "harvest.toml"), "--json"]
        begun_at = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True)
        whole_s = time.monotonic() - begun_at
        with Journal.open(folder / "store", read_only=True) as journal, journal.reading() as connection:
            stored = journal.totals().answers
            if stored != rows:
                raise SystemExit(f"{stored} of {rows} rows were answered:\n{done.stdout}{done.stderr}")
            begun_us, ended_us = connection.execute("SELECT started_us, ended_us FROM runs").fetchone()
            (late,) = connection.execute(
                "SELECT count(*) FROM failures WHERE code = 'timeout' AND at_us > ?", (begun_us + 10_000_000,)
            ).fetchone()
        status = json.loads((folder / "store" / "status.json").read_text(encoding="utf-8"))
        run_s = (ended_us - begun_us) / 1e6
        return Harvest(whole_s, run_s, int(status["requests_sent"]), late, list(status.get("learned") or []))
