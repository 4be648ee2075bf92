"""Test explain, config schema, schedule, `.env` and shell completion."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest

from harvester.cli import explain, init_config
from harvester.config import dotenv
from harvester.config.config import HarvestConfig
from harvester.config.teacher_section import api_key
from harvester.errors import ConfigError, UsageError
from harvester.system.command_line.remedies import EXIT_CODES, TRAINER_CODES, remedy_of
from tests.journey.run_process import harvester


@pytest.mark.parametrize("code", sorted(explain.all_explanations()))
def test_every_code_is_explained_with_a_remedy(code: str) -> None:
    (explanation,) = explain.explanations(code)
    assert explanation.meaning
    assert explanation.done
    assert explanation.remedy
    assert explanation.code in explanation.lines()[0]


def test_exit_codes_are_explained_and_unknown_codes_answered_with_the_nearest() -> None:
    assert {explanation.code for explanation in explain.explanations("5")} >= {"store", "store_full"}
    assert [explanation.code for explanation in explain.explanations("143")] == ["interrupted"]
    assert [explanation.is_permanent for explanation in explain.explanations("rate_limited")] == [False]
    with pytest.raises(UsageError, match="did you mean 'rate_limited'"):
        explain.explanations("rate_limit")
    for odd in ("²", "٣", "9" * 5000):
        with pytest.raises(UsageError, match="no error or exit code is called"):
            explain.explanations(odd)
    done = harvester("explain", "prompt_rejected", "--json")
    assert json.loads(done.stdout)["exit_code"] is None
    assert harvester("explain", "what").returncode == 2
    for text in ("locked", "75"):  # ShardsInUse has the code of StoreLocked
        assert harvester("explain", text).stdout.startswith("locked: Another process holds the store.\n")


def test_without_a_code_all_codes_of_both_programs_are_listed() -> None:
    lines = harvester("explain").stdout.splitlines()
    first_words = {line.split()[0] for line in lines if line.startswith("  ")}
    assert first_words >= {*explain.error_classes(), *TRAINER_CODES, *map(str, EXIT_CODES)}
    listed = json.loads(harvester("explain", "--json").stdout)
    assert {each["code"] for each in listed["codes"]} == {*explain.error_classes(), *TRAINER_CODES}
    assert harvester("explain", "diverged").stdout.startswith("diverged: Loss or gradient was NaN")
    assert {each.code for each in explain.explanations("75")} == {"locked", "lost"}


def test_the_schema_accepts_the_starter_and_refuses_a_misspelt_key() -> None:
    schema = json.loads(harvester("config", "schema").stdout)
    jsonschema.Draft202012Validator.check_schema(schema)
    assert "(?" not in json.dumps(schema)  # ECMA-262, which editors go by, has no flags inside a pattern
    pattern = schema["$defs"]["TeacherSection"]["properties"]["idempotency_header"]["anyOf"][0]["pattern"]
    match = [
        bool(re.search(pattern, header)) for header in ("X-IDEMPOTENCY-Key", "idempotency", "X-Trace", "a b")
    ]
    assert match == [True, True, False, False]
    loaded = tomllib.loads(init_config.HARVEST_TOML)
    loaded["teacher"]["price"]["as_of"] = "2026-11-01"  # a date is a string to JSON
    jsonschema.validate(loaded, schema)
    assert set(schema["properties"]) == set(HarvestConfig.model_fields)
    loaded["sampling"]["max_token"] = 3
    with pytest.raises(jsonschema.ValidationError, match="max_token"):
        jsonschema.validate(loaded, schema)


def test_env_beside_the_file_is_read_and_never_overrides_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".env").write_text(
        "# a comment\nexport SCHOOL_KEY='from file'\nOTHER_KEY=sk-$(id)${HOME}\nEMPTY=\n", encoding="utf-8"
    )
    variables = dotenv.variables(tmp_path)
    assert variables["SCHOOL_KEY"] == "from file"
    assert variables["OTHER_KEY"] == "sk-$(id)${HOME}"  # nothing is run or expanded
    assert "OTHER_KEY" not in os.environ
    monkeypatch.setenv("OTHER_KEY", "from-environment")
    teacher = HarvestConfig.model_validate(
        {
            "teacher": {"base_url": "http://127.0.0.1:1/v1", "model": "m", "api_key_env": "OTHER_KEY"},
            "prompts": {"files": ["p"]},
        }
    ).teacher
    assert api_key(teacher, dotenv.variables(tmp_path)) == "from-environment"
    monkeypatch.setenv("OTHER_KEY", "")
    with pytest.raises(ConfigError, match="not set"):  # an empty one is set on purpose
        api_key(teacher, dotenv.variables(tmp_path))


def test_a_broken_env_line_is_named_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("A=1\n= sk-canary-77\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        dotenv.variables(tmp_path)
    assert caught.value.place == f"{tmp_path / '.env'}:2"
    assert "canary" not in str(caught.value)
    (tmp_path / ".env").write_bytes(b"A=\xff\n")
    with pytest.raises(ConfigError, match="UTF-8"):
        dotenv.variables(tmp_path)


def test_schedule_prints_units_and_wants_one_scheduler(tmp_path: Path) -> None:
    config = tmp_path / "harvest.toml"
    hours = '\n[schedule]\nhours = ["22:00-07:00 Europe/Berlin"]\nfinish_by = 2026-11-27T18:00:00+01:00\n'
    config.write_text(init_config.HARVEST_TOML + hours, encoding="utf-8")
    files = json.loads(harvester("schedule", "--systemd", config, "--json", "--name", "night").stdout)[
        "files"
    ]
    assert set(files) == {"night.service", "night.timer"}
    assert "22,23:00:00 Europe/Berlin" in files["night.timer"]
    assert harvester("schedule", config).returncode == 2
    assert harvester("schedule", "--cron", config, "--name", "no good").returncode == 2
    assert "--slurm needs --shards" in harvester("schedule", "--slurm", config).stderr
    assert "--shards is for job arrays" in harvester("schedule", "--cron", "--shards", "8", config).stderr
    for scheduler, word in (("--slurm", "#SBATCH --array=1-8"), ("--k8s", "completionMode: Indexed")):
        assert word in harvester("schedule", scheduler, "--shards", "8", config).stdout
    too_many = harvester("schedule", "--slurm", "--shards", "9000", config)
    assert (too_many.returncode, "shared by 9,000 shards" in too_many.stderr) == (2, True)
    config.write_text(init_config.HARVEST_TOML + '\n[schedule]\nhours = ["22-7 Berlin"]\n', encoding="utf-8")
    wrong = harvester("schedule", "--k8s", config)
    assert (wrong.returncode, "schedule.hours" in wrong.stderr) == (2, True)


def test_an_error_without_a_remedy_of_its_own_says_what_helps_in_general(tmp_path: Path) -> None:
    init_config.write_starter(tmp_path / "run")
    (tmp_path / "run" / "prompts" / "first.jsonl").write_text("1\n", encoding="utf-8")
    done = harvester("plan", tmp_path / "run" / "harvest.toml")
    assert done.returncode == 2
    cause, place, remedy = done.stderr.splitlines()
    assert cause.startswith("error[prompt_file]: a JSON object is expected")
    assert place.split() == ["where", "prompts/first.jsonl:1"]
    assert remedy == f"  remedy  {remedy_of('prompt_file')}"


def test_a_shell_completes_verbs() -> None:
    done = harvester(
        _HARVESTER_COMPLETE="complete_bash",
        COMP_WORDS="harvester st",
        COMP_CWORD="1",
    )
    completions = done.stdout.split()
    assert {"status", "stop"} <= set(completions), (done.stdout, done.stderr)


def test_status_loads_nothing_heavy(tmp_path: Path) -> None:
    heavy = ("httpx", "aiohttp", "openai", "pyarrow", "jinja2", "tenacity", "torch")
    code = (
        f"import sys; sys.argv=['harvester','status',{str(tmp_path)!r}]\n"
        "from harvester.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print([m for m in {heavy!r} if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_an_ascii_terminal_cant_show_is_escaped(tmp_path: Path) -> None:
    done = harvester("explain", "zażółć", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    assert done.returncode == 2
    assert r"za\u017c" in done.stderr
