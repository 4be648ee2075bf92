"""Test faults of prompt files: a bad one is named before anything is sent, an odd one is read as it is."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from harvester.api.types import Request
from harvester.errors import PromptError
from harvester.mock_teacher.running import RunningMock, start_in_thread
from harvester.mock_teacher.settings import MockSettings
from harvester.prompts import compression, feed
from harvester.run import one_pass
from harvester.run.prepare import look_ahead, prepare
from harvester.store.journal.journal import Journal
from harvester.store.reader import Corpus
from tests.faults import bench
from tests.faults.bench import PROMPTS, Hasty, run_harvest

GOOD = b'{"prompt": "fine"}\n'
DEEP = b"[" * 300 + b"]" * 300


@pytest.fixture(scope="module")
def mock() -> Iterator[RunningMock]:
    with start_in_thread(MockSettings(context_tokens=10**7)) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, mock: RunningMock) -> Path:
    """A folder with a configuration that has run; its prompt file is each test's to replace."""
    root = tmp_path_factory.mktemp("prompts")
    run_harvest(mock, root)
    return root


def refused(mock: RunningMock, folder: Path, content: bytes, place: str, says: str) -> None:
    """The whole run ends with exit code 2, names the place, and nothing is sent."""
    (folder / "p.jsonl").write_bytes(content)
    sent = mock.state()["received"]
    code, stderr = bench.run(folder / "harvest.toml", Hasty())
    assert (code, mock.state()["received"]) == (2, sent)
    assert place in stderr
    assert says in stderr


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"prompt": "a"', "not a JSON line"),
        (b'{"text": 1}', "needs 'prompt'"),
        (b"[]", "JSON object"),
        (b'"text"', "JSON object"),
        (b'{"prompt": 7}', "needs 'prompt'"),
        (b'{"prompt": null}', "needs 'prompt'"),
        (b'{"prompt": ""}', "needs 'prompt'"),
        (b'{"prompt": " "}', "needs 'prompt'"),
        (b'{"prompt": "\\ud800"}', "not a JSON line"),
        (b'{"prompt": "\xff\xfe"}', "is not UTF-8: byte 13 of the line"),
        (b'{"prompt": NaN}', "not a JSON line"),
        (b"\x00\x00\x00", "not a JSON line"),
        (b'{"messages": [{"role": "user", "content": 7}]}', "needs 'content'"),
        (b'{"messages": {"role": "user"}}', "must be a list"),
        (b'{"prompt": "a", "tags": "b"}', "tags"),
        (b'{"prompt": "' + b"x" * (17 << 20) + b'"}', "longer than 16 MiB"),
        (b'{"messages": [{"role": "user", "content": "x", "n": 9007199254740993}]}', "no canonical JSON"),
        (b'{"messages": [{"role": "user", "content": [{"n": -9007199254740993}]}]}', "no canonical JSON"),
        (b'{"messages": [{"role": ["user"], "content": "x"}]}', "needs a role"),
        (b'{"prompt": "a", "tags": 5}', "tags"),
        (b'{"prompt": "a", "level": ' + DEEP + b"}", "nested"),
    ],
    ids=lambda part: part[:24].decode("latin-1") if isinstance(part, bytes) else "",
)
def test_rows_60_and_61_a_bad_line_is_named(mock: RunningMock, folder: Path, line: bytes, says: str) -> None:
    refused(mock, folder, GOOD + b"\r\n" + line + b"\n", "p.jsonl:3", says)


def test_row_60_an_id_of_two_prompts_is_named_with_both_places(mock: RunningMock, folder: Path) -> None:
    lines = b'{"prompt": "x", "id": "a"}\n{"prompt": "y", "id": "b"}\n{"prompt": "z", "id": "a"}\n'
    refused(mock, folder, lines, "p.jsonl:3", "the id 'a' belongs to another prompt, at p.jsonl:1")


def test_row_60_ids_of_two_prompts_are_counted(mock: RunningMock, folder: Path) -> None:
    """A remedy for the first alone would be followed a hundred times."""
    lines = b"".join(b'{"prompt": "%d", "id": "a%d"}\n' % (number, number % 7) for number in range(20))
    refused(mock, folder, lines, "belongs to another prompt", "and so it is with 6 more ids")


def test_row_60_the_same_prompt_twice_is_no_fault_and_paid_once(mock: RunningMock, tmp_path: Path) -> None:
    twice = [{"prompt": "What is 2 + 2?", "id": "a"}] * 2
    ended = run_harvest(mock, tmp_path, prompts=twice)
    assert (ended.exit_code, ended.billed["requests"]) == (0, 1)


def test_row_60_marks_line_ends_blanks_and_mixed_fields_are_read(mock: RunningMock, tmp_path: Path) -> None:
    run_harvest(mock, tmp_path)
    lines = b'\xef\xbb\xbf{"prompt": "What is 3 + 4?"}\r\n\r\n   \n{"prompt": "What is 1 + 8?", "level": 1}\n'
    (tmp_path / "p.jsonl").write_bytes(lines + b'{"prompt": "What is 1 + 9?", "level": "one"}')
    code, _ = bench.run(tmp_path / "harvest.toml", Hasty())
    samples = {
        row.messages[0]["content"]: row.source_line for row in Corpus.open(tmp_path / "store").samples()
    }
    assert code == 0
    assert (samples["What is 1 + 8?"], samples["What is 1 + 9?"]) == (4, 5)


def test_row_61_odd_text_is_sent_as_it_is(mock: RunningMock, tmp_path: Path) -> None:
    odd = [
        "nul \x00 in it",
        "\u202eright to left",
        "e\u0301 is not \u00e9",
        "\U0001f600 " * 3,
        "\u2028",
        "x" * (1 << 20),
    ]
    ended = run_harvest(mock, tmp_path, prompts=[text + " What is 1 + 1?" for text in odd])
    assert (ended.exit_code, ended.billed["requests"]) == (0, len(odd))
    sent = {json.loads(row.request_json)["messages"][0]["content"] for row in _rows(tmp_path)}
    assert sent == {text + " What is 1 + 1?" for text in odd}


def _rows(root: Path) -> list[object]:
    return list(Corpus.open(root / "store").samples())


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(lines=st.lists(st.binary(max_size=40), min_size=1, max_size=4))
def test_row_60_any_bytes_are_read_or_named(folder: Path, lines: list[bytes]) -> None:
    (folder / "p.jsonl").write_bytes(GOOD + b"\n".join(lines))
    try:
        rows = prepare(folder / "harvest.toml").rows_total
    except PromptError as error:
        named = error.place
    else:
        named = f"p.jsonl, {rows} rows"
    assert named.startswith("p.jsonl")


def test_row_62_a_cut_archive_costs_nothing(mock: RunningMock, folder: Path) -> None:
    complete = gzip.compress(b"".join(b'{"prompt": "What is %d + 1?"}\n' % n for n in range(200)))
    (folder / "p.jsonl").write_bytes(GOOD)
    archive = folder / "q.jsonl.gz"
    config = folder / "gz.toml"
    config.write_text((folder / "harvest.toml").read_text().replace('"*.jsonl"', '"q.jsonl.gz"'))
    for cut in (len(complete) - 9, len(complete) // 2, 5):
        archive.write_bytes(complete[:cut])
        sent = mock.state()["received"]
        code, stderr = bench.run(config, Hasty())
        assert (code, mock.state()["received"]) == (2, sent)
        assert "q.jsonl.gz" in stderr
    archive.write_bytes(complete)
    assert prepare(config).rows_total == 200


def test_row_62_a_pipe_is_refused_in_words(mock: RunningMock, folder: Path) -> None:
    pipe = folder / "pipe.jsonl"
    os.mkfifo(pipe)
    try:
        refused(mock, folder, GOOD, "pipe.jsonl", "is a pipe or a terminal, which can't be read twice")
    finally:
        pipe.unlink()


def test_row_62_edited_reordered_and_extended_prompts_re_pay_nothing(
    mock: RunningMock, tmp_path: Path
) -> None:
    run_harvest(mock, tmp_path, prompts=PROMPTS)
    changed = run_harvest(mock, tmp_path, prompts=("What is 2 + 9?", *reversed(PROMPTS)))
    assert (changed.exit_code, changed.billed["requests"], changed.totals.answers) == (0, 1, 4)
    assert "3 already stored" in changed.output
    assert re.search(
        r"note: p\.jsonl changed since run \d{8}T\d{6}-\w{6}: 1 rows new, 3 already stored", changed.output
    )
    same = run_harvest(mock, tmp_path, prompts=("What is 2 + 9?", *reversed(PROMPTS)))
    assert "changed since" not in same.output
    with Journal.open(tmp_path / "store", read_only=True) as journal, journal.reading() as connection:
        (note,) = connection.execute("SELECT value FROM meta WHERE name = 'prompts:p.jsonl'").fetchone()
    digest = hashlib.sha256((tmp_path / "p.jsonl").read_bytes()).hexdigest()
    assert json.loads(note)["sha256"] == digest
    assert Corpus.open(tmp_path / "store").verify() == []
    fewer = run_harvest(mock, tmp_path, prompts=PROMPTS[1:])
    assert (fewer.exit_code, fewer.billed["requests"], fewer.totals.answers) == (0, 0, 4)
    assert "0 rows new, 2 already stored" in fewer.output


LINES = b"".join(
    [
        b'{"prompt": "What is 1 + 1?"}\n',
        b'{"prompt": "cut\n',
        b'{"prompt": "' + b"x" * (33 << 20) + b'"}\n',
        b'{"prompt": "What is 1 + 2?"}\n',
        b'{"prompt": 7}\n',
    ]
)
NO_KEY = (
    b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "hi", "n": 9007199254740993}]}]}\n'
)


def _allow(root: Path, most: int) -> Path:
    config = root / f"bad{most}.toml"
    text = (root / "harvest.toml").read_text()
    config.write_text(text.replace("[prompts]\n", f"[prompts]\nmax_bad = {most}\n"))
    return config


def test_row_62_a_file_that_is_rewritten_while_it_is_read_ends_the_run_before_a_line_of_both_is_asked(
    mock: RunningMock, tmp_path: Path
) -> None:
    """A file that grows meanwhile is the same one."""
    old = [f"What is {n} + 1? {os.urandom(400).hex()}" for n in range(1500)]
    new = [f"Say {n}. {os.urandom(300).hex()}" for n in range(4000)]
    path = tmp_path / "p.jsonl"
    changes: list[str] = []

    def watch(status: Mapping[str, Any]) -> None:
        if status["answers_stored"] and not changes:
            changes.append("grown")
            with path.open("a") as file:
                file.write('{"prompt": "What is 1 + 1?"}\n')
        elif status["answers_stored"] > 20 and changes == ["grown"]:
            changes.append("rewritten")
            path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in new))

    ended = run_harvest(mock, tmp_path, prompts=old, watch=watch)
    assert changes == ["grown", "rewritten"]
    assert (ended.exit_code, "rewritten while it was read" in ended.output) == (2, True)
    asked = {row.messages[-1]["content"] for row in Corpus.open(tmp_path / "store").samples()}
    assert 20 < len(asked) < len(old)
    assert asked <= {*old, *new}
    assert run_harvest(mock, tmp_path, prompts=new[:50]).exit_code == 0


def test_row_62_a_file_that_was_read_to_its_end_before_an_edit_is_asked_as_it_was(
    mock: RunningMock, tmp_path: Path
) -> None:
    """A small file is read at once, so no line can be of both versions. The next run asks what is new."""
    old = [f"What is {n} + 1?" for n in range(600)]
    path = tmp_path / "p.jsonl"
    changes: list[str] = []

    def watch(status: Mapping[str, Any]) -> None:
        if status["answers_stored"] > 20 and not changes:
            changes.append("edited")
            path.write_text(path.read_text().replace("What is 7 +", "Name 7 +"))

    ended = run_harvest(mock, tmp_path, prompts=old, watch=watch)
    assert changes == ["edited"]
    assert (ended.exit_code, ended.totals.answers) == (0, 600)
    assert {row.messages[-1]["content"] for row in Corpus.open(tmp_path / "store").samples()} == {*old}
    again = run_harvest(mock, tmp_path, prompts=["Name 7 + 1?" if n == 7 else old[n] for n in range(600)])
    assert (again.exit_code, again.billed["requests"], again.totals.answers) == (0, 1, 601)


@pytest.mark.parametrize(
    ("old", "new", "first"),
    [
        (b"a\nb\nc\n", b"", 4),  # not all of it was read, and it ends where the reader is
        (b"a\nb", b"x\n", 3),  # the last line may have been half of one
        (b"a\nb\n", b"x\ny\nz\n", 4),
    ],
)
def test_row_62_a_file_that_was_not_read_in_whole_before_it_became_another_is_an_error(
    tmp_path: Path, old: bytes, new: bytes, first: int
) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(old)
    with compression.open_file(path) as buffered:
        file = buffered.raw  # type: ignore[attr-defined]
        assert file.read(first) == old[:first]
        path.write_bytes(new)
        os.utime(path, ns=(1, 1))  # another time, however coarse the file system's clock is
        with pytest.raises(compression.RewrittenError):
            file.read(9)


def test_row_62_what_comes_after_the_end_of_a_rewritten_file_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b"a\nb\n")
    with compression.open_file(path) as buffered:
        file = buffered.raw  # type: ignore[attr-defined]
        assert file.read(9) == b"a\nb\n"
        path.write_bytes(b"x\n")
        os.utime(path, ns=(1, 1))
        assert file.read(9) == b""
        path.write_bytes(b"x\ny\nz\n")
        os.utime(path, ns=(1, 1))
        with pytest.raises(compression.RewrittenError):
            file.read(9)


def test_row_60_so_many_bad_lines_as_allowed_are_listed_and_the_rest_is_asked(
    mock: RunningMock, tmp_path: Path
) -> None:
    run_harvest(mock, tmp_path, prompts=["What is 9 + 9?"])
    (tmp_path / "p.jsonl").write_bytes(LINES)
    sent = mock.totals()["requests"]
    code, stderr = bench.run(_allow(tmp_path, 2), Hasty())
    assert (code, mock.totals()["requests"]) == (2, sent)
    assert "p.jsonl:5" in stderr
    assert "max_bad allows 2 bad lines, and this is one more" in stderr
    assert "bad       3 lines will be passed over" in "\n".join(look_ahead(_allow(tmp_path, 3)).lines())
    code, stderr = bench.run(_allow(tmp_path, 3), Hasty())
    assert (code, mock.totals()["requests"]) == (0, sent + 2)
    listed = tmp_path / "store" / "bad_prompts.jsonl"
    assert f"note: 3 lines of prompt files were passed over: {listed.name}" in stderr
    bad = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [(entry["code"], entry["file"], entry["line"]) for entry in bad] == [
        ("prompt_file", "p.jsonl", number) for number in (2, 3, 5)
    ]
    assert "longer than 16 MiB" in bad[1]["message"]
    (tmp_path / "p.jsonl").write_bytes(GOOD)
    bench.run(_allow(tmp_path, 3), Hasty())
    assert not listed.exists()


def test_row_60_bad_rows_of_tables_and_texts_are_passed_over_too(mock: RunningMock, tmp_path: Path) -> None:
    run_harvest(mock, tmp_path)
    (tmp_path / "p.jsonl").unlink()
    (tmp_path / "p.csv").write_text("prompt,level\none,1\n,2\ntwo,2,3\nthree,3\n")
    (tmp_path / "p.txt").write_bytes(b"four\n\xff\xfe\nfive\n")
    config = _allow(tmp_path, 3)
    config.write_text(config.read_text().replace('"*.jsonl"', '"p.csv", "p.txt"'))
    ready = prepare(config)
    assert (ready.rows_total, len(ready.bad)) == (4, 3)
    assert [error.place for error in ready.bad] == ["p.csv:3", "p.csv:4", "p.txt:2"]


def test_row_60_a_line_without_canonical_json_is_one_more_bad_line(mock: RunningMock, tmp_path: Path) -> None:
    run_harvest(mock, tmp_path)
    (tmp_path / "p.jsonl").write_bytes(GOOD + NO_KEY + b'{"prompt": "What is 8 + 8?"}\n')
    sent = mock.totals()["requests"]
    code, stderr = bench.run(tmp_path / "harvest.toml", Hasty())
    assert (code, mock.totals()["requests"]) == (2, sent)
    assert "p.jsonl:2: no canonical JSON" in stderr
    assert "p.jsonl:2" in "\n".join(look_ahead(_allow(tmp_path, 1)).lines())
    code, stderr = bench.run(_allow(tmp_path, 1), Hasty())
    assert (code, mock.totals()["requests"]) == (0, sent + 2)
    assert "1 lines of prompt files were passed over" in stderr


@pytest.mark.parametrize(
    ("sampling", "says"),
    [
        ({"seed": 2**53 - 1, "samples": 2}, "sampling.seed: no canonical JSON"),
        ({"extra": {"top_k": 2**60}}, "sampling.top_k: no canonical JSON"),
    ],
)
def test_row_60_a_configuration_without_canonical_json_costs_nothing(
    mock: RunningMock, tmp_path: Path, sampling: dict[str, object], says: str
) -> None:
    sent = mock.state()["received"]
    ended = run_harvest(mock, tmp_path, sampling=sampling)
    assert (ended.exit_code, mock.state()["received"]) == (2, sent)
    assert says in ended.output


def test_a_reader_that_breaks_midway_ends_the_pass_in_words_and_keeps_what_was_paid(
    mock: RunningMock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests, before = feed.requests, mock.totals()["requests"]

    def broken(*arguments: Any) -> Iterator[Request]:
        yield from requests(*arguments)
        while mock.totals()["requests"] < before + 2:  # both answers are paid for when it breaks
            time.sleep(0.01)
        raise ZeroDivisionError("broken reader")

    monkeypatch.setattr(feed, "requests", broken)
    monkeypatch.setattr(one_pass, "CHUNK", 2)
    ended = run_harvest(mock, tmp_path, prompts=["What is 4 + 9?", "What is 5 + 9?"])
    assert (ended.exit_code, ended.billed["requests"], ended.totals.answers) == (2, 2, 2)
    assert "ZeroDivisionError: broken reader" in ended.output
    assert ended.totals.possibly_billed == 0


def test_a_store_under_a_name_that_is_no_text_is_refused_before_anything_is_paid(
    mock: RunningMock, tmp_path: Path
) -> None:
    root = tmp_path / os.fsdecode(b"r\xe4tsel")
    root.mkdir()
    sent = mock.state()["received"]
    ended = run_harvest(mock, root)
    assert (ended.exit_code, mock.state()["received"]) == (2, sent)
    assert "r\\xe4tsel/store: lies under a name that is no UTF-8" in ended.output
    fine = tmp_path / "r\u00e4tsel"
    fine.mkdir()
    assert run_harvest(mock, fine).exit_code == 0
