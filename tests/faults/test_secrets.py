"""Send a canary key through every fault of the mock teacher at DEBUG, and search all output for it."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import quote

import orjson
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.api.redaction import Redactor
from harvester.api.replies import completion
from harvester.mock_teacher.faults.actions import ACTIONS, Stage

CANARY = "sk-CANARY/+9f3a77c1=zz"
LOUD = (
    "import logging, runpy, sys\n"
    "logging.basicConfig(level=logging.DEBUG)\n"
    "sys.argv = ['harvester', *sys.argv[1:]]\n"
    "runpy.run_module('harvester', run_name='__main__')\n"
)
CONFIG = """\
[teacher]
base_url = "{base_url}"
model = "mock-teacher"
terms = "mock-teacher"
api_key_env = "CANARY_KEY"
[prompts]
files = ["a.jsonl"]
[sampling]
max_tokens = 64
stream = {stream}
[run]
deadline_s = 2
max_attempts = 1
max_failed = 1000
patience_s = 1
"""
OPTIONS: dict[str, dict[str, Any]] = {
    "content": {"value": "fine"},
    "body": {"value": "{}"},
    "headers": {"value": {"x-odd": "1"}},
    "patch": {"value": {"usage": None}},
    "choice": {"value": {"finish_reason": "stop"}},
    "message": {"value": {"content": "fine"}},
    "redirect": {"location": "http://127.0.0.1:9/elsewhere"},
    "huge_body": {"bytes": 40 << 20},
    "gzip_bomb": {"decoded_bytes": 40 << 20},
    "endless_headers": {"bytes": 1 << 20},
    "drip": {"bytes": 64, "interval_s": 0.01},
    "deep_json": {"depth": 10_000},
}
STATUSES = (400, 401, 402, 403, 404, 408, 409, 413, 422, 429, 500, 503, 529)


def disguises() -> list[bytes]:
    """The key as it is, and as it may hide: base64 at its three phases, percent-encoded, JSON-escaped."""
    raw = CANARY.encode()
    phases = [base64.b64encode(b"\0" * phase + raw)[4 * (phase > 0) : -4] for phase in range(3)]
    escaped = json.dumps(CANARY).strip('"').encode(), CANARY.replace("/", "\\/").encode()
    coded = [quote(CANARY, safe="").encode(), quote(CANARY).encode(), raw.hex().encode()]
    return [raw, raw[3:], *phases, *coded, *escaped]


def echoes() -> list[dict[str, Any]]:
    """A teacher that sends the key back, in every place and dress."""
    answer = {"choices": [{"message": {"content": "?"}, "finish_reason": "stop"}], "model": "mock-teacher"}
    content = json.dumps(answer)
    spelt = "".join(f"\\u{ord(c):04x}" for c in CANARY)
    texts = [*(form.decode() for form in disguises()), spelt, CANARY[:9] + "\\u002f" + CANARY[10:]]
    bodies = [{"action": "body", "value": content.replace("?", f"it is {text}.")} for text in texts]
    pieces = json.dumps([{"type": "text", "text": letter} for letter in CANARY])
    hidden = json.dumps({"content": [{"token": "?", "bytes": list(CANARY.encode()), "logprob": -1}]})
    escaped = json.dumps(json.dumps({"k": "?"}).replace("?", spelt))[1:-1]
    called = f'{{"id": "c", "type": "function", "function": {{"name": "f", "arguments": "{escaped}"}}}}'
    bodies += [
        {"action": "body", "value": value}
        for value in (
            content.replace('"?"', pieces),
            content.replace('"finish_reason"', f'"logprobs": {hidden}, "finish_reason"'),
            content.replace("?", spelt)[:-1] + ', "x": NaN}',
            content.replace("?", spelt)[:-1] + ', "x": 1e999}',
            content.replace("?", spelt)[:-1] + f', "x": {"9" * 400}}}',
            content.replace('"content": "?"', f'"content": null, "tool_calls": [{called}]'),
            content.replace("?", spelt)[:-1],  # cut before its end
        )
    ]
    words = f"wrong key {CANARY}"
    refused = [{"action": "status", "status": s, "message": words} for s in (400, 401, 429, 500)]
    return [
        *bodies,
        *refused,
        {"action": "error_200", "message": words, "code": CANARY},
        {"action": "body", "value": f"<html>{CANARY}</html>", "content_type": "text/html"},
        {"action": "body", "value": f"not JSON {CANARY}"},
        {"action": "redirect", "location": f"http://127.0.0.1:9/?key={quote(CANARY, safe='')}"},
        {"action": "headers", "value": {"x-key": CANARY, "retry-after": CANARY}},
        {"action": "garbage_status", "value": f"HTTP/9.9 abc {CANARY}"},
        *(
            {"action": name, "value": CANARY}
            for name in ("content", "refusal", "reasoning", "finish_reason", "id", "fingerprint")
        ),
        {"action": "tool_call", "function": "f", "arguments": json.dumps({"key": CANARY})},
    ]


def every_action(*, stream: bool) -> list[dict[str, Any]]:
    """Each action once; those of a stream where answers are streamed."""
    chosen = [
        n for n, a in ACTIONS.items() if (a.stage is Stage.STREAM) == stream and n not in {"status", "model"}
    ]
    result = [{"action": name, **OPTIONS.get(name, {})} for name in chosen]
    if stream:
        words = [f["action"] for f in echoes()]
        return result + [
            f for f, name in zip(echoes(), words, strict=True) if name in {"content", "reasoning"}
        ]
    result += [{"action": "status", "status": status} for status in STATUSES]
    return [*result, {"action": "status", "status": 429, "code": "insufficient_quota"}, *echoes()]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "CANARY_KEY": CANARY, "PYTHONWARNINGS": "ignore", **more}


def leaks(places: dict[str, bytes]) -> list[str]:
    return [f"{name}: {form!r}" for name, result in places.items() for form in disguises() if form in result]


def inside(root: Path) -> dict[str, bytes]:
    """Every file as it lies, and what compression and pages hide: Parquet's columns, the journal's rows."""
    result = {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
    for path in root.rglob("*.parquet"):
        file = pq.ParquetFile(path)
        values = repr(file.schema_arrow.metadata) + repr(file.read().to_pylist())
        result[f"{path.name} read"] = values.encode("utf-8", "surrogatepass")
    for path in root.rglob("journal.db"):
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as journal:
            tables = [
                name for (name,) in journal.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            ]
            for name in tables:
                values = repr(journal.execute(f"SELECT * FROM {name}").fetchall())
                result[f"journal {name} read"] = values.encode("utf-8", "surrogatepass")
    return result


class Loud:
    """A harvester at DEBUG whose command lines are watched while it lives."""

    def __init__(self, *arguments: str, program: str = LOUD) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-X", "dev", "-c", program, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        self.seen: set[bytes] = set()
        self._ended = threading.Event()
        self._watch = threading.Thread(target=self._look)
        self._watch.start()

    def _look(self) -> None:
        while not self._ended.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    self.seen.add(path.read_bytes())
                except OSError:
                    continue

    def end(self) -> tuple[int, dict[str, bytes]]:
        out, err = self.process.communicate(timeout=120)
        self._ended.set()
        self._watch.join()
        assert any(b"harvester" in line or b"runpy" in line for line in self.seen), "nobody was watched"
        return self.process.returncode, {"stdout": out, "stderr": err, "processes": b"\n".join(self.seen)}


def prepared(root: Path, base_url: str, prompts: list[str], *, stream: bool = False) -> str:
    lines = "".join(json.dumps({"prompt": text}) + "\n" for text in prompts)
    (root / "a.jsonl").write_text(lines, encoding="utf-8")
    path = root / "harvest.toml"
    path.write_text(CONFIG.format(base_url=base_url, stream=str(stream).lower()), encoding="utf-8")
    return str(path)


def test_the_scan_would_find_every_disguise():
    for form in disguises():
        assert leaks({"x": b"before" + form + b"after"})


@pytest.mark.parametrize(
    "stream", [pytest.param(False, marks=pytest.mark.long), pytest.param(True, marks=pytest.mark.slow)]
)
def test_no_fault_of_the_mock_teacher_brings_the_key_out(
    tmp_path: Path, mock_teacher, monkeypatch, stream: bool
):
    monkeypatch.setenv("CANARY_KEY", CANARY)
    faults = [
        {**fault, "name": f"{n:03d} {fault['action']}", "prompt": f"fault {n:03d} ", "times": 1}
        for n, fault in enumerate(every_action(stream=stream))
    ]
    teacher = mock_teacher(require_key_env="CANARY_KEY", faults=faults)
    prompts = [f"fault {n:03d} What is 12 + 30?" for n in range(len(faults))] + ["What is 1 + 2?"]
    path = prepared(tmp_path, teacher.base_url, prompts, stream=stream)
    codes = []
    for turn in range(40):  # a fault that stops a run leaves the others to the next
        code, places = Loud("run", path).end()
        codes.append(code)
        assert leaks(places) == []
        assert b"DEBUG" in places["stderr"], "the run was not loud"
        assert code in {0, 3, 4, 10}, places["stderr"][
            -3000:
        ].decode()  # asyncio's DEBUG prints traces itself
        fired = teacher.fired()
        if all(fired.values()) and code in {0, 3}:
            break
        assert turn < 39, (codes, [name for name, times in fired.items() if not times])
    assert teacher.state()["statuses"].get("401", 0) <= sum(f.get("status") == 401 for f in faults)
    assert leaks(inside(tmp_path)) == []
    if not stream:
        assert leaks({**afterwards(tmp_path), **inside(tmp_path)}) == []
        assert set(codes) & {4}, "no refusal stopped a run"
        assert any(
            b"it is ***." in values for name, values in inside(tmp_path).items() if name.endswith("read")
        )


def afterwards(root: Path) -> dict[str, bytes]:
    """What the other verbs say of that store, and the pages of `view`, all at DEBUG."""
    store, result = str(root / "store"), {}
    (root / "curate.toml").write_text('corpus = "store"\nout = "curated"\n', encoding="utf-8")
    for verb in (
        ("status", store, "--json"),
        ("verify", store),
        ("report", store),
        ("metrics", store),
        ("plan", str(root / "harvest.toml")),
        ("terms", "check", str(root / "harvest.toml"), "--json"),
        ("curate", str(root / "curate.toml")),
        ("export", store, str(root / "out"), "--to", "openai"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", LOUD, *verb],
            capture_output=True,
            timeout=240,
            env=environment(),
            check=False,
        )
        assert b"Traceback" not in done.stderr, done.stderr.decode()
        result[" ".join(verb[:2])] = done.stdout + done.stderr
    return result | pages(store)


def pages(store: str) -> dict[str, bytes]:
    command = [sys.executable, "-c", LOUD, "view", store, "--port", "0", "--json"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, env=environment(), **pipes) as process:
        try:
            assert process.stdout is not None
            address = json.loads(process.stdout.readline())["view"]
            page = urllib.request.urlopen(address, timeout=240).read()
            links = {m.decode() for m in re.findall(rb'(?:href|src)="(/[^"#]*)"', page)} | {"/metrics"}
            root = re.match(r"https?://[^/]+", address)
            assert root is not None
            values = {
                link: urllib.request.urlopen(root[0] + link, timeout=240).read() for link in sorted(links)
            }
        finally:
            process.send_signal(signal.SIGINT)
    return {"view": page, **values}


@pytest.mark.slow
def test_a_crash_prints_the_traceback_and_not_the_key(tmp_path: Path, mock_teacher, monkeypatch):
    monkeypatch.setenv("CANARY_KEY", CANARY)
    teacher = mock_teacher(require_key_env="CANARY_KEY")
    path = prepared(tmp_path, teacher.base_url, ["What is 1 + 2?"])
    broken = "import harvester.api.http.client as c\nc.Client.__aenter__ = lambda self: 1 / 0\n" + LOUD
    code, places = Loud("run", path, program=broken).end()
    assert code not in {0, 3}
    assert b"ZeroDivisionError" in places["stderr"]
    assert leaks({**places, **inside(tmp_path)}) == []


@pytest.mark.slow
def test_what_a_run_sends_to_its_socket_holds_no_key(tmp_path: Path, mock_teacher, monkeypatch):
    monkeypatch.setenv("CANARY_KEY", CANARY)
    teacher = mock_teacher(require_key_env="CANARY_KEY", faults=[{"action": "silence"}])
    config = prepared(tmp_path, teacher.base_url, ["What is 1 + 2?", "What is 2 + 2?"])
    loud = Loud("run", config, "--watch", "--grace", "0")  # it stays up until it is told to stop
    facts: dict[str, bytes] = {}
    for _ in range(100):
        done = subprocess.run(
            [sys.executable, "-m", "harvester", "status", str(tmp_path / "store"), "--json"],
            capture_output=True,
            env=environment(),
            timeout=240,
            check=False,
        )
        facts["status"] = done.stdout + done.stderr
        if done.returncode == 0 and json.loads(done.stdout).get("alive"):
            break
        assert loud.process.poll() is None, "the run ended although it watches its prompts"
    else:
        raise AssertionError("no status of a live run in 100 looks")
    loud.process.terminate()
    _, places = loud.end()
    assert leaks({**facts, **places, **inside(tmp_path)}) == []


PLAIN = st.text(st.characters(codec="ascii", categories=["L", "N"], include_characters="-_/+=."), min_size=12)


@given(PLAIN, st.text(max_size=20), st.text(max_size=20), st.integers(0, 2))
def test_no_spelling_of_a_key_passes_the_mask(key: str, before: str, after: str, phase: int):
    mask = Redactor(key)
    spelt = "".join(f"\\u{ord(char):04x}" for char in key)
    for text in (json.dumps({"a": f"{before}{key}{after}"}), f'{{"a": "{spelt}"}}'):
        masked = mask.body(text.encode("utf-8", "surrogatepass"))
        try:
            assert key not in json.dumps(orjson.loads(masked), ensure_ascii=False)
        except orjson.JSONDecodeError:
            assert key.encode() not in masked
    coded = base64.b64encode(b"x" * phase + key.encode() + b"yyy")
    assert mask.text(coded) != coded
    assert mask.text(quote(key, safe="").encode()) == b"***"


@given(st.binary(max_size=200), st.sampled_from([None, "EMPTY", "test"]))
def test_where_there_is_no_key_the_bytes_stay(body: bytes, key: str | None):
    assert Redactor(key).body(body) is body


@pytest.mark.parametrize("escaped", ["sk-canary-12345678", "sk-can\\u0061ry-12345678"])
def test_no_key_beside_the_document_passes_the_mask(escaped: str):
    document = json.dumps({"choices": [{"message": {"content": "4"}, "finish_reason": "stop"}]})
    for body in (
        f'{document}{{"half": "{escaped}',
        f"{document}<!-- {escaped} -->",
        f'{document}\n{{"id": "{escaped}"}}\n{{"id": "1"}}',
        document.replace("{", f'{{"id": "{escaped}", "id": "1", ', 1),
        f": {escaped}\n\n{document}",
        f"{document}\n\ndata: [DONE]\n: {escaped}",
        json.dumps({"body": document, "debug": "?"}).replace("?", escaped),
        json.dumps(json.dumps({"body": document, "debug": "?"})).replace("?", escaped.replace("\\", "\\\\")),
    ):
        assert escaped in body or "\\\\" in body
        kept = Redactor("sk-canary-12345678").body(body.encode())
        assert not any(spelt in kept for spelt in (b"canary-12345678", b"ry-12345678"))
        assert completion.parse(kept).text == "4"


def test_a_mask_shows_no_key():
    assert CANARY not in repr(Redactor(CANARY))
