"""Test every verb of both command lines: --json, an example, and one clear error for wrong input."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer.main
from typer.testing import CliRunner

from harvester.cli import main
from harvester.mock_teacher.__main__ import parser
from tests.tiers import rest_is_slow
from trainer.cli import main as cli

PROGRAMS = {"harvester": main, "trainer": cli}
OWN_HELP = {("harvester", "mock-teacher")}
"""Parsed by argparse, shared with `python -m harvester.mock_teacher`; held to the same below."""
NEEDS = {
    ("harvester", "purge"): ["--prompt-id", "p"],
    ("harvester", "set"): ["rpm", "60"],
    ("harvester", "schedule"): ["--cron"],
    ("harvester", "view"): ["--port", "0"],
    ("harvester", "export"): ["OUT"],
    ("harvester", "merge"): ["another", "OUT"],
    ("harvester", "fetch"): ["OUT"],
    ("trainer", "export"): ["OUT"],
    ("trainer", "publish"): ["s3://bucket/student"],
    ("trainer", "push"): ["owner/name"],
}
TAKES_NO_FILE = {("harvester", "explain"), ("harvester", "terms", "show"), ("harvester", "terms", "review")}
MAKES_IT = {("harvester", "init"), ("harvester", "demo"), ("trainer", "init")}
"""Their argument is a folder to make: only what is a file already is wrong."""


def verbs() -> Iterator[tuple[tuple[str, ...], click.Command]]:
    def walk(
        path: tuple[str, ...], command: click.Command
    ) -> Iterator[tuple[tuple[str, ...], click.Command]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield path, command
            return
        for name, entry in inner.items():
            yield from walk((*path, name), entry)

    for name, program in PROGRAMS.items():
        yield from walk((name,), typer.main.get_command(program.app))


VERBS = dict(verbs())
FED = [
    path
    for path, command in VERBS.items()
    if any(
        isinstance(parameter, click.Argument) or parameter.param_type_name == "argument"
        for parameter in command.params
    )
    and path not in TAKES_NO_FILE | OWN_HELP
]


def test_the_walk_meets_every_verb_we_promise():
    promised = (
        "init plan run status pause resume stop set seal verify purge rederive"
        " curate export report view metrics"
    )
    assert {("harvester", verb) for verb in promised.split()} <= set(VERBS)
    assert {("harvester", "terms", verb) for verb in ("list", "show", "check", "record", "review")} <= set(
        VERBS
    )
    assert {("trainer", v) for v in ("plan", "doctor", "train", "evaluate", "export", "trace")} <= set(VERBS)


@pytest.mark.parametrize("path", [path for path in VERBS if path not in OWN_HELP], ids=" ".join)
def test_a_verb_takes_json_and_shows_an_example(path: tuple[str, ...]):
    shown = CliRunner().invoke(PROGRAMS[path[0]].app, [*path[1:], "--help"], env={"COLUMNS": "200"})
    assert shown.exit_code == 0
    assert "--json" in shown.output
    assert f"Example: {' '.join(path)}" in " ".join(shown.output.replace("│", " ").split())


def test_the_mock_teacher_module_has_the_same_help():
    shown = parser("harvester mock-teacher").format_help()
    assert "--json" in shown
    assert "example: harvester mock-teacher" in shown


@pytest.mark.parametrize(
    "kind", rest_is_slow(["missing", "typed", "plain", "binary", "folder", "empty"], first=3)
)
@pytest.mark.parametrize("path", FED, ids=" ".join)
def test_input_that_is_none_is_one_clear_error(path, kind, tmp_path: Path, monkeypatch, capsys):
    if path in MAKES_IT and kind in {"missing", "folder"}:
        pytest.skip("makes what is not there")
    settings = tmp_path / ("given" if kind == "plain" else "given.toml")
    if kind == "folder":
        settings.mkdir()
    elif kind != "missing":
        contents = {
            "empty": b"",
            "plain": b"a file\n",
            "binary": b"\xff\xfe\x00PAR1",
            "typed": b"teacher = 3\nstudent = 4\n",
        }
        settings.write_bytes(contents[kind])
    more = [str(tmp_path / "out") if word == "OUT" else word for word in NEEDS.get(path, [])]
    monkeypatch.setattr("sys.argv", [path[0], *path[1:], str(settings), *more, "--json"])
    with pytest.raises(SystemExit) as ended:
        PROGRAMS[path[0]].main()
    output = capsys.readouterr()
    assert ended.value.code in ({1, 2, 5} if path[1] in {"pause", "resume", "stop", "set"} else {2, 5})
    assert output.err.startswith("error[")
    assert str(settings) in output.err
    assert "remedy" in output.err
    assert output.out == ""
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", [*FED, ("harvester", "terms", "show")], ids=" ".join)
@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_not_taken_for_the_current_folder(path, name, tmp_path: Path, monkeypatch, capsys):
    """As `harvester purge "$STORE"` gives it where the variable is not set."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", [path[0], *path[1:], name, *NEEDS.get(path, []), "--json"])
    with pytest.raises(SystemExit) as ended:
        PROGRAMS[path[0]].main()
    assert ended.value.code == 2
    assert "the name is empty" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_the_desk_answers_in_json(capsys, monkeypatch):
    for words in (["show", "llama-3"], ["list"]):
        monkeypatch.setattr("sys.argv", ["harvester", "terms", *words, "--json"])
        with pytest.raises(SystemExit):
            main.main()
        result = json.loads(capsys.readouterr().out)
        record = result if "id" in result else next(r for r in result["records"] if r["id"] == "llama-3")
        assert (record["id"], record["layer"], record["state"]) == ("llama-3", "weights", "good")


@pytest.mark.parametrize(
    "words",
    [
        "--max-usd inf",
        "--max-usd nan",
        "--max-usd 1e308",
        "--grace inf",
        "--grace nan",
        "--epoch 9007199254740992",
        "--max-runtime 1e9d",
        "--finish-by 0001-01-01T00:00+14:00",
    ],
)
def test_a_number_that_nothing_can_count_with_is_refused_by_its_flag(words: str, tmp_path: Path):
    done = CliRunner().invoke(main.app, ["run", str(tmp_path / "none.toml"), *words.split()])
    text = done.output + str(getattr(done.exception, "place", ""))
    assert (getattr(done.exception, "exit_code", done.exit_code), words.split()[0] in text) == (2, True)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_lists_every_verb_once_in_a_section(program: str) -> None:
    """A verb without a section would stand below "Commands"."""
    shown = CliRunner().invoke(PROGRAMS[program].app, ["--help"], terminal_width=80).output
    listed = shown.partition("Options:")[2]
    titles = re.findall(r"^(\S.*):$", listed, re.MULTILINE)
    assert len(titles) > 3
    assert "Commands" not in titles
    names = re.findall(r"^  ([a-z-]+)  ", listed.partition("\n\n")[2], re.MULTILINE)
    assert sorted(names) == sorted(typer.main.get_command(PROGRAMS[program].app).commands)
