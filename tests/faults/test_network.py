"""Test network faults over real sockets: names, certificates, proxies, redirects, backlogs."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import trustme

from harvester.api.http import client
from harvester.errors import ConfigError
from harvester.mock_teacher.running import RunningMock, start_in_thread
from harvester.mock_teacher.settings import MockSettings
from harvester.run.prepare import prepare
from tests.faults.bench import POISON, run_harvest
from tests.ports import refusing_port

DAY = timedelta(days=1)


@pytest.fixture(scope="module")
def mock() -> Iterator[RunningMock]:
    with start_in_thread(MockSettings()) as running:
        yield running


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def at(mock: RunningMock, host: str, scheme: str = "http") -> str:
    """The mock's address under another name."""
    return re.sub(r"//[^:]+", f"//{host}", mock.base_url).replace("http:", f"{scheme}:")


def over_tls(folder: Path, leaf: trustme.LeafCert) -> RunningMock:
    certificate, key = folder / "cert.pem", folder / "key.pem"
    certificate.write_bytes(b"".join(blob.bytes() for blob in leaf.cert_chain_pems))
    leaf.private_key_pem.write_to_path(key)
    return start_in_thread(MockSettings(certificate=certificate, private_key=key))


def test_row_15_a_redirect_carries_neither_key_nor_prompt_elsewhere(
    mock: RunningMock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", "sk-CANARY-0123456789")
    with start_in_thread(MockSettings()) as elsewhere:
        for number, code in enumerate((301, 302, 303, 307, 308)):
            fault = {
                "action": "redirect",
                "status": code,
                "location": f"{elsewhere.base_url}/chat/completions",
            }
            folder = tmp_path / str(number)
            folder.mkdir()
            ended = run_harvest(mock, folder, [fault], teacher={"api_key_env": "TEACHER_KEY"})
            assert (ended.exit_code, ended.fired >= 1) == (4, True)
            assert "redirects to 127.0.0.1" in ended.output
        assert elsewhere.state()["received"] == 0


@pytest.mark.parametrize(
    "url", ["http://teacher.example/v1", "https://user:pw@teacher.example/v1", "ftp://x/v1"]
)
def test_an_address_unfit_for_a_key_costs_nothing(mock: RunningMock, tmp_path: Path, url: str) -> None:
    ended = run_harvest(mock, tmp_path, teacher={"base_url": url})
    assert (ended.exit_code, ended.billed["requests"]) == (2, 0)
    assert "pw" not in ended.output


def test_row_30_a_full_backlog_times_out_and_is_surely_not_billed(tmp_path: Path, mock: RunningMock) -> None:
    with ExitStack() as stack:
        hole = stack.enter_context(closing(socket.socket()))
        hole.bind(("127.0.0.1", 0))
        hole.listen(0)
        for _ in range(3):  # fill the backlog: the kernel drops every further SYN
            plug = stack.enter_context(closing(socket.socket()))
            plug.setblocking(False)
            plug.connect_ex(hole.getsockname())
        url = f"http://127.0.0.1:{hole.getsockname()[1]}/v1"
        ended = run_harvest(
            mock, tmp_path, teacher={"base_url": url}, run={"connect_timeout_s": 0.2, "patience_s": 5}
        )
        assert (ended.exit_code, ended.totals.possibly_billed) == (10, 0)
        assert "no connection within connect_timeout_s" in ended.output
        # One replica that is a black hole holds nobody up, and costs no row an attempt.
        other = run_harvest(
            mock, tmp_path, teacher={"replicas": [url]}, run={"connect_timeout_s": 0.2, "max_attempts": 1}
        )
        assert (other.exit_code, other.totals.answers, other.totals.possibly_billed) == (0, 3, 0)


class Resolver:
    """Stands for getaddrinfo: fails with a code while told to, then knows every name as this machine."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: int, code: int) -> None:
        self.asked = 0
        real = socket.getaddrinfo

        def look_up(host: Any, *args: Any, **options: Any) -> Any:
            if host != "localhost":
                return real(host, *args, **options)
            self.asked += 1
            if self.asked in range(2 if fails < 99 else 1, 2 + fails):
                raise socket.gaierror(code, "stubbed")
            return real("127.0.0.1", *args, **options)

        monkeypatch.setattr(socket, "getaddrinfo", look_up)


def test_row_36_an_unknown_name_stops_at_the_start(
    mock: RunningMock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = Resolver(monkeypatch, 99, socket.EAI_NONAME)
    ended = run_harvest(mock, tmp_path, teacher={"base_url": at(mock, "localhost")})
    assert names.asked >= 1
    assert (ended.exit_code, ended.totals.attempts) == (4, 0)
    assert "the host name can't be resolved" in ended.output


def test_row_36_a_resolver_that_fails_midway_is_asked_again(
    mock: RunningMock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "DNS_CACHE_S", 0)
    names = Resolver(monkeypatch, 3, socket.EAI_AGAIN)
    ended = run_harvest(
        mock,
        tmp_path,
        [{"action": "close_idle"}],
        run={"max_attempts": 1},
        teacher={"base_url": at(mock, "localhost"), "limits": {"max_concurrency": 1}},
    )
    assert names.asked >= 5
    assert (ended.exit_code, ended.totals.answers, ended.totals.possibly_billed) == (0, 3, 0)
    assert ended.totals.errors == {}


@pytest.mark.parametrize("kind", ["unknown issuer", "wrong host", "expired", "not tls"])
def test_row_37_a_teacher_that_can_not_prove_itself_gets_nothing(
    mock: RunningMock, authority: trustme.CA, tmp_path: Path, kind: str
) -> None:
    now = datetime.now(UTC)
    leaf = authority.issue_cert(
        "elsewhere.example" if kind == "wrong host" else "localhost",
        not_before=now - 3 * DAY,
        not_after=now + (-DAY if kind == "expired" else DAY),
    )
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    trust = {} if kind == "unknown issuer" else {"ca_file": "ca.pem"}
    with over_tls(tmp_path, leaf) as teacher:
        target = at(mock if kind == "not tls" else teacher, "localhost", "https")
        ended = run_harvest(mock, tmp_path, teacher={"base_url": target, **trust})
        assert (ended.exit_code, ended.totals.attempts) == (4, 0)
        assert ("TLS fails" if kind == "not tls" else "the certificate is not trusted") in ended.output
        assert "Cannot connect to host" not in ended.output


def test_row_37_a_bundle_of_ones_own_is_trusted(
    mock: RunningMock, authority: trustme.CA, tmp_path: Path
) -> None:
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    with over_tls(tmp_path, authority.issue_cert("localhost")) as teacher:
        target = at(teacher, "localhost", "https")
        ended = run_harvest(mock, tmp_path, teacher={"base_url": target, "ca_file": "ca.pem"})
        assert (ended.exit_code, ended.totals.answers) == (0, 3)
    (tmp_path / "ca.pem").write_text("no certificate")
    with pytest.raises(ConfigError, match=r"ca\.pem: can't be read as certificates"):
        prepare(tmp_path / "harvest.toml")


class Proxy:
    """A forward proxy for plain HTTP: notes each request line, sends it on to the host it names."""

    def __init__(self) -> None:
        self.lines: list[bytes] = []
        self.heads: list[bytes] = []
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        assert self._ready.wait(240)
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(240)

    async def _serve(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        async with await asyncio.start_server(self._relay, "127.0.0.1", 0) as server:
            self.port = server.sockets[0].getsockname()[1]
            self._ready.set()
            await self._over.wait()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        line, _, rest = head.partition(b"\r\n")
        self.lines.append(line)
        self.heads.append(head)
        method, url, version = line.split(b" ")
        host, port, path = re.fullmatch(rb"http://([^:/]+):(\d+)(/.*)", url).groups()  # type: ignore[union-attr]
        length = re.search(rb"(?i)content-length: (\d+)", rest)
        body = await reader.readexactly(int(length[1])) if length else b""
        up, down = await asyncio.open_connection(host.decode(), int(port))
        rest = re.sub(rb"(?i)(proxy-)?connection: [^\r]*\r\n", b"", rest)
        down.write(b" ".join((method, path, version)) + b"\r\nConnection: close\r\n" + rest + body)
        writer.write(await up.read())
        await writer.drain()
        writer.close()
        down.close()


def test_row_39_a_proxy_is_used_when_asked_for_shown_by_host_and_never_otherwise(
    mock: RunningMock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy() as proxy:
        monkeypatch.setenv("http_proxy", f"http://who:secret@127.0.0.1:{proxy.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        off = run_harvest(mock, tmp_path)
        assert (off.exit_code, proxy.lines) == (0, [])
        on = run_harvest(mock, tmp_path, run={"trust_env": True}, sampling={"seed": 1})
        assert (on.exit_code, on.billed["requests"]) == (0, 3)
        assert sum(b"POST" in line for line in proxy.lines) == 3
        text = "\n".join(prepare(tmp_path / "harvest.toml").lines())
        assert f"proxy   127.0.0.1:{proxy.port}" in text
        assert "secret" not in text
        seen = len(proxy.lines)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        around = run_harvest(mock, tmp_path, run={"trust_env": True}, sampling={"seed": 2})
        assert (around.exit_code, len(proxy.lines)) == (0, seen)
        assert "proxy   " not in "\n".join(prepare(tmp_path / "harvest.toml").lines())


def test_row_39_a_dead_proxy_is_named(
    mock: RunningMock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with refusing_port() as port:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{port}")
        ended = run_harvest(mock, tmp_path, run={"trust_env": True, "patience_s": 0.1})
    assert (ended.exit_code, ended.totals.attempts) == (10, 0)
    assert "the proxy can't be reached" in ended.output


def test_row_38_a_kept_connection_that_the_teacher_closed_costs_no_attempt(tmp_path: Path) -> None:
    """The teacher closes each connection unannounced: the next request finds it gone, or opens another."""
    with start_in_thread(MockSettings()) as mock:
        faults = [{"action": "close_idle"}]
        ended = run_harvest(
            mock,
            tmp_path,
            faults,
            # One request at a time: the close has arrived before the next one is sent.
            teacher={"limits": {"max_concurrency": 1}},
            run={"max_attempts": 1},
            prompts=[f"What is {n} + 1?" for n in range(30)],
        )
        assert (ended.fired, ended.exit_code, ended.totals.answers) == (30, 0, 30)
        assert ended.totals.possibly_billed == 0


def test_row_29_the_system_error_of_a_connection_is_shown(mock: RunningMock, tmp_path: Path) -> None:
    with refusing_port() as port:
        gone, both = (
            run_harvest(
                mock, tmp_path, teacher={"base_url": f"http://{host}:{port}/v1"}, run={"patience_s": 5}
            )
            for host in ("127.0.0.1", "localhost")
        )
    assert gone.exit_code == 10
    assert "can't connect: connection refused; is it running" in gone.output
    assert "connection refused" in both.output.lower()
    for ended in (gone, both):
        assert "Cannot connect to host" not in ended.output
        assert "Connect call failed" not in ended.output
        assert ended.totals.attempts == 0


def _sent(proxy: Proxy) -> list[bytes]:
    """Values of the header in the requests that went through, and empties the list."""
    heads, proxy.heads = [head for head in proxy.heads if head.startswith(b"POST")], []
    return [match[1] for head in heads if (match := re.search(rb"(?i)idempotency-key: (\S+)", head))]


def test_an_idempotency_key_is_one_for_all_attempts_at_a_request_and_off_by_default(
    mock: RunningMock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fails = [{"action": "status", "status": 500, "prompt": POISON, "times": 1}]
    on = {"idempotency_header": "Idempotency-Key"}
    with Proxy() as proxy:
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.port}")
        monkeypatch.delenv("no_proxy", raising=False)
        off = run_harvest(mock, tmp_path, fails, run={"trust_env": True})
        assert (off.exit_code, off.fired, _sent(proxy)) == (0, 1, [])
        ended = run_harvest(mock, tmp_path, fails, run={"trust_env": True}, teacher=on, sampling={"seed": 1})
        first = _sent(proxy)
        assert (ended.exit_code, ended.fired, len(first), len(set(first))) == (0, 1, 4, 3)
        again = run_harvest(
            mock, tmp_path, run={"trust_env": True, "epoch": 1}, teacher=on, sampling={"seed": 1}
        )
        assert again.exit_code == 0
        assert not set(_sent(proxy)) & set(first)
    disguise = run_harvest(mock, tmp_path, teacher={"idempotency_header": "User-Agent"})
    assert (disguise.exit_code, "idempotency_header" in disguise.output) == (2, True)
