"""Run every command and snippet of README.md and docs/, in order, against the mock teacher.

What a comment marks as not to be run (`tests/snippets.py` explains the comments) is checked for syntax and
must have a reason.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import typer.main

from harvester.cli import main
from harvester.config import config as harvest_config
from harvester.errors import HarvesterError
from harvester.export import curate
from tests import commands
from tests.snippets import Block, blocks
from trainer import config as train_config
from trainer.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# The port of the mock teacher in the documents. The tests use a free one.
PORT = 8000
CONFIGURED = (":8000/", f"--port {PORT}")
DEADLINE_S = 240


TIERS = ("", "slow", "long")


def pages() -> list[Any]:
    """Return pages and the blocks that each tier of tests runs; a later tier also runs those before."""
    found = []
    for path in PAGES:
        every, shorter = blocks(path, ROOT), 0
        for number, marker in enumerate(TIERS):
            these = [block for block in every if tier(every, block) <= number]
            if len(these) > shorter and any(block.action != "parse" for block in these):
                marks = [getattr(pytest.mark, marker)] if marker else []
                name = path.relative_to(ROOT).as_posix()
                found.append(pytest.param(these, marks=marks, id=f"{name}-{marker}".rstrip("-")))
            shorter = len(these)
    return found


def tier(page: list[Block], block: Block) -> int:
    """Return the place in `TIERS` of the tests that run a block; a setup belongs to the block after it."""
    rest = page[page.index(block) :]
    shown = next((each for each in rest if each.language != "setup"), block)
    return TIERS.index(shown.action) if shown.action in TIERS else 0


@pytest.fixture
def reader(tmp_path: Path) -> Iterator[Reader]:
    reader = Reader(tmp_path)
    yield reader
    reader.close()


class Reader:
    """Somebody who works through a page in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._teacher: commands.Command | None = None
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]

    def close(self) -> None:
        if self._teacher is not None:
            self._teacher.terminate()
            self._teacher.communicate(timeout=DEADLINE_S)

    def follow(self, block: Block) -> None:
        """Do what a block says."""
        if block.action == "parse":
            check_syntax(block)
        elif block.action == "write":
            path = self.folder / block.argument
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self._here(block.text), encoding="utf-8")
            if path.suffix == ".toml" and "[[record]]" not in block.text:
                validate(path, tomllib.loads(block.text), block.place)
        elif block.language == "console":
            exits = int(block.argument) if block.action == "exit" else 0
            for number, line in enumerate(block.commands, 1):
                code, text = self._run(line)
                wanted = exits if number == len(block.commands) else 0
                assert code == wanted, f"{block.place}: {line}\n{text}"
                self._use_free_port()
        elif block.language == "python":
            # Not forked by `tests.commands`: that process has left out imports which no command needs.
            program = [sys.executable, "-W", "ignore", "-c", self._here(block.text)]
            done = subprocess.run(
                program, cwd=self.folder, capture_output=True, text=True, timeout=DEADLINE_S
            )
            assert done.returncode == 0, f"{block.place}\n{done.stderr}"
        elif block.language == "toml":
            path = self.folder / (block.argument if block.action == "into" else "my-run/harvest.toml")
            validate(path, merged(tomllib.loads(path.read_text()), tomllib.loads(block.text)), block.place)
        elif block.language == "setup":
            environment = {**os.environ, "ROOT": str(ROOT)}
            subprocess.run(["bash", "-euc", block.text], cwd=self.folder, env=environment, check=True)
        else:
            pytest.fail(f"{block.place}: nobody knows how to test {block.language!r}")

    def _here(self, text: str) -> str:
        return text.replace(f":{PORT}/", f":{self._port}/").replace(f"--port {PORT}", f"--port {self._port}")

    def _use_free_port(self) -> None:
        """Put the mock teacher's port into the files that a command wrote."""
        for path in self.folder.rglob("*.toml"):
            text = path.read_text(encoding="utf-8")
            if f":{PORT}/" in text:
                path.write_text(self._here(text), encoding="utf-8")

    def _run(self, line: str) -> tuple[int, str]:
        words = shlex.split(self._here(line), comments=True)
        if words[:2] == ["harvester", "mock-teacher"]:
            self._start_teacher(words[2:])
            return 0, ""
        if words[0] in ("harvester", "trainer"):
            done = commands.run(words[0], words[1:], cwd=self.folder, timeout=DEADLINE_S)
            assert "Traceback" not in done.stderr, done.stderr
            return done.returncode, done.stdout + done.stderr
        if words[0] == "cd":
            self.folder = self.folder / words[1]
            return 0, ""
        assert words[0] in ("cp",), f"{words[0]}: mark the block with `<!-- test: parse, REASON -->`"
        return subprocess.run(words, cwd=self.folder).returncode, ""

    def _start_teacher(self, options: list[str]) -> None:
        assert self._teacher is None, "the page starts two teachers"
        log = (self.folder / "mock-teacher.log").open("w")
        with log:
            self._teacher = commands.Command(
                "harvester", ["mock-teacher", *options], cwd=self.folder, stdout=log, stderr=log
            )
        ends = time.monotonic() + DEADLINE_S
        while time.monotonic() < ends:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self._port)) == 0:
                    return
            assert self._teacher.poll() is None, (self.folder / "mock-teacher.log").read_text()
            time.sleep(0.02)  # between two looks at a process that is starting
        pytest.fail("the mock teacher did not start")


@pytest.mark.parametrize("page", pages())
def test_every_block_of_a_page_does_what_it_says(page: list[Block], reader: Reader):
    for block in page:
        reader.follow(block)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_is_not_run_is_valid_and_has_a_reason(path: Path):
    for block in blocks(path, ROOT):
        if block.action == "parse":
            assert block.argument, f"{block.place}: say why it is not run"
            check_syntax(block)


def check_syntax(block: Block) -> None:
    """Check a block that is not run: bash by `bash -n`, TOML and Python by their parsers, and the verbs."""
    if block.language == "toml":
        tomllib.loads(block.text)
    elif block.language == "python":
        compile(block.text, block.place, "exec")
    elif block.language in ("bash", "console"):
        script = block.text if block.language == "bash" else "\n".join(block.commands)
        script = script.replace("<this repository>", "REPOSITORY")
        done = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, f"{block.place}: {done.stderr}"
        apps = {"harvester": typer.main.get_command(main.app), "trainer": typer.main.get_command(cli.app)}
        for program, verb in re.findall(r"^(harvester|trainer) ([a-z-]+)", script, re.MULTILINE):
            assert verb in getattr(apps[program], "commands", {}), f"{block.place}: {program} {verb}"
    else:
        pytest.fail(f"{block.place}: nobody knows how to check {block.language!r}")


def validate(path: Path, table: Mapping[str, Any], place: str) -> None:
    """Check a configuration by the class that reads it, which its file name tells."""
    readers: dict[str, Callable[[dict[str, Any]], object]] = {
        "harvest": lambda data: harvest_config.parse(data, place=place),
        "train": lambda data: train_config.parse(data, root=path.parent, place=place),
        "curate": lambda _: curate.load(path),
    }
    try:
        readers[path.stem](dict(table))
    except HarvesterError as error:
        pytest.fail(f"{place}: {error}")


def merged(table: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    """Return a table with the keys of another put in, tables into tables."""
    result = dict(table)
    for key, value in more.items():
        inner = result.get(key)
        result[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return result


def test_a_block_that_fails_fails_the_test(tmp_path: Path, reader: Reader):
    """The runner itself: exit codes, invalid keys and wrong verbs are found."""
    page = tmp_path / "page.md"
    for text in (
        "```console\n$ harvester verify missing\n```\n",
        "```python\nraise SystemExit(1)\n```\n",
        "<!-- test: write harvest.toml -->\n```toml\n[teacher]\nbase_uri = 1\n```\n",
        "<!-- test: parse, reason -->\n```bash\nif then\n```\n",
        "<!-- test: parse, reason -->\n```bash\nharvester harvest x\n```\n",
        "```yaml\na: 1\n```\n",
    ):
        page.write_text(text)
        (block,) = blocks(page, tmp_path)
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            reader.follow(block)
