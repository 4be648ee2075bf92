"""Test that every option of every command can be given by an environment variable."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main

from harvester.cli import main
from harvester.cli.mock import _arguments_of_variables, mock_variables
from harvester.mock_teacher.__main__ import parser
from tests.journey.run_process import harvester, write_folder
from tests.journey.test_verbs import PROGRAMS, VERBS
from trainer import harvester_process

STORE = Path(__file__).parents[1] / "harvester" / "store" / "earlier_store"
ARGUMENTS_OF_MOCK = ("harvester", "mock-teacher")


def context_of(path: tuple[str, ...]) -> Any:
    """Parse the command of `path` in its variables alone; its arguments name a store."""
    group: Any = typer.main.get_command(PROGRAMS[path[0]].app)
    context = group.make_context(path[0], [*path[1:], "x"])
    for word in path[1:-1]:
        group = group.commands[word]
        context = group.make_context(word, [path[-1], "x"], parent=context)
    command = group.commands[path[-1]]
    arguments = [str(STORE) for parameter in command.params if parameter.param_type_name == "argument"]
    return command.make_context(path[-1], arguments, parent=context)


def options_of(path: tuple[str, ...]) -> list[Any]:
    command: Any = VERBS[path]
    return [p for p in command.params if p.param_type_name == "option"]


def value_for(option: Any, folder: Path) -> str:
    """Return a value that the option takes and that is not its default."""
    kind = option.type_descriptor
    if kind.is_choice:
        names = [getattr(choice, "value", choice) for choice in kind.choices]
        return str(next(name for name in reversed(names) if name != option.default))
    if option.is_flag:
        return "no" if option.default else "yes"
    if kind.is_path or kind.is_list:
        return str(folder)
    return "3" if option.default != 3 else "4"


CASES = [(path, option) for path in VERBS for option in options_of(path)]


@pytest.mark.parametrize("path", [path for path in VERBS if options_of(path)], ids=" ".join)
def test_each_option_is_read_from_its_variable_and_a_flag_wins(
    path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    required = [option for option in options_of(path) if option.required]
    for option in options_of(path):
        flag = max(option.opts, key=len)
        name = "_".join([*path, flag.strip("-")]).replace("-", "_").upper()
        for each in required:
            monkeypatch.setenv(
                "_".join([*path, max(each.opts, key=len).strip("-")]).replace("-", "_").upper(),
                value_for(each, tmp_path),
            )
        monkeypatch.setenv(name, value_for(option, tmp_path))
        context = context_of(path)
        assert context.get_parameter_source(option.name).name == "ENVIRONMENT", name
        assert context.params[option.name] != option.default
        if not option.required:
            monkeypatch.setenv(name, "")  # counts as not set
            assert context_of(path).get_parameter_source(option.name).name == "DEFAULT"
        monkeypatch.delenv(name)


def test_each_option_of_the_mock_teacher_is_read_from_its_variable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    flags = parser("harvester mock-teacher")
    options = mock_variables()
    assert len(options) == sum(bool(action.option_strings) for action in flags._actions) - 1  # --help
    for name, option in options.items():
        other = [str(choice) for choice in option.choices or ["2"] if choice != option.default]
        value = "yes" if option.nargs == 0 else other[0]
        monkeypatch.setenv(name, value)
        parsed = vars(flags.parse_args(_arguments_of_variables([])))
        assert parsed[option.dest] not in (option.default, None), name
        flag = max(option.option_strings, key=len)
        assert _arguments_of_variables([f"{flag}=3"]) == []
        monkeypatch.delenv(name)
    done = harvester("mock-teacher", HARVESTER_MOCK_TEACHER_PORT="many", HARVESTER_MOCK_TEACHER_PROT="1")
    assert done.returncode == 2
    assert "HARVESTER_MOCK_TEACHER_PORT" in done.stderr
    assert "warning: the variable HARVESTER_MOCK_TEACHER_PROT is not read" in done.stderr


def test_a_wrong_value_names_its_variable(tmp_path: Path) -> None:
    for name, value in (
        ("LIMIT", "many"),
        ("LIMIT", "0"),
        ("MAX_USD", "nan"),
        ("RETRY", "all"),
        ("WATCH", "perhaps"),
        ("TRANSPORT", "post"),
        ("FINISH_BY", "soon"),
    ):
        done = harvester("run", tmp_path / "none.toml", **{f"HARVESTER_RUN_{name}": value})
        assert (done.returncode, done.stdout) == (2, "")
        assert f"(environment variable HARVESTER_RUN_{name})" in " ".join(done.stderr.split()), done.stderr
    done = harvester("run", tmp_path / "none.toml", "--limit", "0", HARVESTER_RUN_LIMIT="2")
    assert "HARVESTER_RUN_LIMIT" not in done.stderr


def test_a_variable_bounds_a_run_and_one_without_an_option_is_named(
    mock_teacher: Any, tmp_path: Path
) -> None:
    mock = mock_teacher(accuracy=1.0)
    config = write_folder(tmp_path, mock.base_url, 5)
    done = harvester("run", config, HARVESTER_RUN_LIMIT="2", HARVESTER_RUN_JSON="1", HARVESTER_RUN_LIMITS="4")
    assert done.returncode == 10
    assert json.loads(done.stdout)["answers_stored"] == 2
    [warning] = [line for line in done.stderr.splitlines() if line.startswith("warning")]
    assert "HARVESTER_RUN_LIMITS is not read" in warning
    # What Kubernetes sets beside a Service `harvester-run` is no option that was misspelt.
    done = harvester(
        "run", config, HARVESTER_RUN_SERVICE_HOST="10.0.0.1", HARVESTER_RUN_PORT="tcp://10.0.0.1:1"
    )
    assert (done.returncode, "warning" in done.stderr) == (0, False)


def test_a_harvest_of_the_trainer_takes_ceilings_from_variables_and_nothing_else(
    mock_teacher: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mock = mock_teacher(accuracy=1.0)
    config = write_folder(tmp_path, mock.base_url, 5, more="[store]\npath = 'answers'")
    monkeypatch.setenv("HARVESTER_RUN_SHARD", "1/2")  # would harvest into another store
    monkeypatch.setenv("HARVESTER_RUN_MAX_TOKENS", "200")
    code, summary = harvester_process.run_harvester("run", config)
    assert (code, summary["store"]) == (10, str(tmp_path / "answers"))
    monkeypatch.delenv("HARVESTER_RUN_MAX_TOKENS")
    assert harvester_process.run_harvester("run", config)[0] == 0


@pytest.mark.parametrize("path", [path for path in VERBS if path != ARGUMENTS_OF_MOCK], ids=" ".join)
def test_help_fits_a_narrow_terminal_and_cuts_no_word(
    path: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = {}
    for columns in (60, 80, 200):
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setattr("sys.argv", [*path, "--help"])
        with pytest.raises(SystemExit):
            PROGRAMS[path[0]].main()
        texts[columns] = capsys.readouterr().out
        assert max(map(len, texts[columns].splitlines())) <= max(columns, 60)
        assert "…" not in texts[columns]
        assert "\\" not in texts[columns]
        assert re.search(rf"Example: {' '.join(path)}\b", " ".join(texts[columns].split()))
    words = {columns: re.findall(r"[A-Za-z]{4,}", text) for columns, text in texts.items()}
    wide = set(words[200])
    assert [word for word in words[80] if word not in wide] == []


def test_the_list_of_commands_shows_whole_sentences(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr("sys.argv", ["harvester", "--help"])
    with pytest.raises(SystemExit):
        main.main()
    shown = capsys.readouterr().out
    assert "..." not in shown.replace("[ARGS]...", "")
    assert max(map(len, shown.splitlines())) <= 60


@pytest.mark.parametrize(
    ("path", "name", "between"),
    [
        (("harvester", "export"), "HARVESTER_EXPORT_DECONTAMINATE", ":"),
        (("trainer", "evaluate"), "TRAINER_EVALUATE_HARNESS", " "),
    ],
)
def test_a_variable_holds_several_values_as_the_help_says(
    path: tuple[str, ...], name: str, between: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = [str(tmp_path / "a"), str(tmp_path / "b")]
    for folder in given:
        Path(folder).mkdir()
    monkeypatch.setenv(name, between.join(given))
    assert [str(value) for value in context_of(path).params[name.rsplit("_", 1)[1].lower()]] == given
    command: Any = VERBS[path]
    text = " ".join(command.get_help(context_of(path)).split())
    assert (
        f"{name} may hold several values, with {'spaces' if between == ' ' else repr(between)} between"
        in text
    )


def test_an_empty_path_of_a_variable_is_not_the_current_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HARVESTER_EXPORT_DECONTAMINATE", f"{tmp_path}:")
    done = harvester("export", STORE, tmp_path / "out")
    assert done.returncode == 2
    assert "empty path" in done.stderr
    assert "HARVESTER_EXPORT_DECONTAMINATE" in done.stderr
