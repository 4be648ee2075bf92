"""Test the view's server without a browser: local host names only, read-only, every word escaped."""

from __future__ import annotations

import html.parser
import json
import signal
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from starlette.testclient import TestClient

from harvester.observe.report import html as page
from harvester.observe.report import samples, server
from harvester.store.shards import seal
from harvester.system.safe_text import one_line, visible
from tests import commands
from tests.harvester import store_rows
from tests.open_files import open_files
from tests.pages import hostile

TOKEN = "a-token_of-this-test"


def view_of(store: Path) -> TestClient:
    """A client of the view of a store; its requests carry the token."""
    return TestClient(server.build_app(store, TOKEN), base_url=f"http://127.0.0.1:8765/{TOKEN}/")


@pytest.fixture(scope="module")
def client(hostile_store: Path) -> TestClient:
    return view_of(hostile_store)


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example:8765", "", "127.0.0.1@evil.example"]
)
def test_other_names_get_403(client: TestClient, host: str):
    reply = client.get("/", headers={"host": host})
    assert reply.status_code == 403
    assert "Harvest" not in reply.text


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "127.0.0.1:8765", "localhost:9"])
def test_local_names_are_served(client: TestClient, host: str):
    assert client.get("/metrics", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_it_only_reads(client: TestClient, method: str):
    reply = client.request(method, "/")
    assert reply.status_code == 405
    assert reply.headers["allow"] == "GET, HEAD"


def test_every_reply_carries_the_policy(client: TestClient):
    for path in ("/", "/overview", "/samples?q=x", "/metrics", "/nowhere"):
        headers = client.get(path).headers
        policy = dict(part.strip().split(" ", 1) for part in headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'none'"
        assert policy["frame-ancestors"] == "'none'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["cross-origin-resource-policy"] == "same-origin"


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, tuple[str, ...]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, tuple(name for name, _ in attrs)))


def tags_of(text: str) -> list[tuple[str, tuple[str, ...]]]:
    parser = Tags()
    parser.feed(text)
    return parser.found


@pytest.mark.parametrize("text", hostile.TEXTS)
def test_a_hostile_text_adds_no_tag_and_no_attribute(text: str):
    def samples(words: str) -> str:
        entry = {"prompt": words, "completion": words, "outcome": words, "tokens": words}
        return page.fragment(
            "samples", {"samples": [{**entry, "further": [(words, words)], "facts": [(words, words)]}]}
        )

    assert tags_of(samples(text)) == tags_of(samples("plain"))
    drawn = samples(text)
    assert not any(ord(c) < 32 and c not in "\n\t" for c in drawn)
    assert not {"\u202e", "\u2066", "\x85", "\u2028"} & set(drawn)


def test_text_for_people_keeps_what_people_write():
    kept = "日本語　全角 العربية 👩‍👩‍👧‍👦 naïve\tline\nnext"
    assert visible(kept) == kept
    assert one_line("a\nb\r\x1b[0m") == "a\\nb\\r\\x1b[0m"
    assert visible("\ud800") == "\\ud800"


def test_search_walks_the_whole_store_page_by_page(tmp_path: Path):
    store = tmp_path / "store"
    with store_rows.open_store(store) as journal:
        for start in (0, 150):
            store_rows.fill(journal, range(start, start + 150))
            seal.seal(journal, store, target_bytes=1 << 20, everything=True)
        store_rows.fill(journal, range(300, 420))
        seen: list[str] = []
        cursor = ""
        while True:
            rows = samples.search(store, "WHAT IS", cursor=cursor)
            assert len(rows.samples) <= samples.PAGE
            seen += [sample.prompt_id for sample in rows.samples]
            cursor = rows.cursor
            if not cursor:
                break
        assert sorted(seen) == sorted(f"p{n}" for n in range(420))
        assert [s.prompt_id for s in samples.search(store, "is 417 +").samples] == ["p417"]
        assert [s.prompt_id for s in samples.search(store, "is 7 +").samples] == ["p7"]
        assert samples.search(store, "", outcome="truncated").samples == []
        assert len(samples.search(store, "nothing", cursor="no-shard:1:1").samples) == 0


def test_a_search_that_takes_long_hands_over_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(samples, "PATIENCE_S", 0.0)
    store = tmp_path / "store"
    with store_rows.open_store(store) as journal:
        for start in (0, 10):
            store_rows.fill(journal, range(start, start + 10))
            seal.seal(journal, store, target_bytes=1 << 20, everything=True)
    first = samples.search(store, "is 3 +")
    assert (first.samples, bool(first.cursor), first.looked_at) == ([], True, 10)
    second = samples.search(store, "is 3 +", cursor=first.cursor)
    assert [s.prompt_id for s in second.samples] == ["p3"]


@pytest.mark.parametrize("at", [f"journal:0:{2**63}", f"journal:0:{2**63 - 10}", f"journal:{'9' * 5000}:0"])
def test_a_cursor_that_was_never_given_begins_anew(client: TestClient, hostile_store: Path, at: str):
    reply = client.get("/samples", params={"after": at})
    assert (reply.status_code, reply.json()["count"]) == (200, min(samples.PAGE, len(hostile.TEXTS)))
    names = [path.name for path in (hostile_store / "shards").glob("*.parquet")]
    assert client.get("/samples", params={"after": f"{names[0]}:0:{10**15 - 1}"}).json()["count"] == 0


def test_a_store_that_went_away_while_it_was_viewed_is_no_store_of_zeros(tmp_path: Path):
    store = tmp_path / "store"
    with store_rows.open_store(store) as journal:
        store_rows.fill(journal, range(10))
    away = view_of(store)
    assert away.get("/metrics").status_code == 200
    store.rename(tmp_path / "elsewhere")
    for path in ("/metrics", "/", "/overview", "/samples?q=x"):
        reply = away.get(path)
        assert (reply.status_code, "no " in reply.text, str(store) in reply.text) == (503, True, True)


def test_without_the_token_nothing_is_looked_at(client: TestClient, monkeypatch: pytest.MonkeyPatch):
    looked: list[str] = []

    def search(*_: object, **__: object) -> samples.SearchResult:
        looked.append("search")
        return samples.SearchResult([], "", 0)

    def account(_: server.LiveReport) -> None:
        looked.append("account")

    monkeypatch.setattr(server, "search", search)
    monkeypatch.setattr(server.LiveReport, "account", account)
    bare = TestClient(client.app, base_url="http://127.0.0.1:8765")
    prefixes = [
        "",
        "/",
        f"/{TOKEN[:-1]}",
        f"/{TOKEN}x",
        f"/{TOKEN.upper()}",
        f"//{TOKEN}",
        "/x",
        f"/%00{TOKEN}",
    ]
    replies = {
        (reply.status_code, reply.content, tuple(sorted(reply.headers.items())))
        for prefix in prefixes
        for page_name in ("", "/", "/overview", "/samples?q=hit", "/samples?q=miss", "/metrics/x", "/é")
        if (reply := bare.get(f"{prefix}{page_name}")) is not None
    }
    assert len(replies) == 1  # one and the same, whatever was asked for
    assert next(iter(replies))[0] == 403
    assert looked == []
    assert client.get("samples?q=hit").status_code == 200
    assert looked == ["search"]


@pytest.fixture
def viewing(hostile_store: Path) -> Iterator[tuple[commands.Command, str]]:
    """`harvester view` in a process of its own, and its address."""
    process = commands.Command("harvester", ["view", hostile_store, "--port", "0", "--json"])
    try:
        assert process.stdout is not None
        yield process, json.loads(process.stdout.readline())["view"]
    finally:
        process.kill()
        process.communicate()


def test_each_start_has_a_token_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hostile_store: Path
):
    addresses: list[str] = []
    monkeypatch.setattr(server.uvicorn.Server, "run", lambda *_, **__: None)
    for _ in range(2):
        server.serve(hostile_store, 0, addresses.append)
    tokens = {urlsplit(address).path for address in addresses}
    assert len(tokens) == 2
    assert min(map(len, tokens)) > 20


def test_the_command_serves_one_local_address_and_ends_cleanly(
    viewing: tuple[commands.Command, str], hostile_store: Path
):
    process, address = viewing
    port = urlsplit(address).port
    assert port is not None
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(address, timeout=240) as reply:
        assert "Harvest of" in reply.read().decode()
    assert listeners(process.pid, port) == ["0100007F"]
    with pytest.raises(urllib.error.HTTPError, match="403"):
        opener.open(urllib.request.Request(address, headers={"Host": "rebound.example"}), timeout=240)
    with pytest.raises(urllib.error.HTTPError, match="403"):
        opener.open(f"http://127.0.0.1:{port}/samples?q=x", timeout=240)
    taken = commands.run("harvester", ["view", hostile_store, "--port", port], timeout=240)
    assert taken.returncode == 2
    assert "--port 0" in taken.stderr
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=240) == 0
    assert process.stderr is not None
    assert process.stderr.read() == ""


def listeners(pid: int, port: int) -> list[str]:
    """Addresses (hex, as the kernel tells) at which a process listens on a port."""
    sockets = open_files(pid)
    result = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address, local_port = fields[1].split(":")
            if fields[3] == "0A" and int(local_port, 16) == port and f"socket:[{fields[9]}]" in sockets:
                result.append(address)
    return result
