"""Test the command line with wrong input: one clear line, the remedy, the exit code, no traceback."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harvester.cli.main import app
from harvester.config import config
from harvester.errors import ConfigError, UsageError
from harvester.export import curate
from tests import commands
from tests.journey.run_process import harvester
from tests.open_files import open_files
from tests.ports import refusing_port
from tests.waiting import until

EARLIER_STORE = Path(__file__).parents[1] / "harvester" / "store" / "earlier_store"

CONFIG = """\
[teacher]
base_url = "{base_url}"
model = "{model}"
terms = "mock-teacher"
[prompts]
files = ["*.jsonl"]
[sampling]
temperature = 0.0
max_tokens = 64
[run]
deadline_s = 10
"""


def folder(
    tmp_path: Path,
    base_url: str,
    *,
    model: str = "mock-teacher",
    lines: tuple[str, ...] = ('{"prompt": "What is 12 + 30?"}',),
) -> Path:
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    path = tmp_path / "harvest.toml"
    path.write_text(CONFIG.format(base_url=base_url, model=model), encoding="utf-8")
    return path


def test_a_missing_config_names_the_file_and_the_remedy(tmp_path: Path):
    done = harvester("run", str(tmp_path / "none.toml"))
    assert done.returncode == 2
    assert "no such file" in done.stderr
    assert "none.toml" in done.stderr
    assert "harvester init" in done.stderr


def test_a_folder_in_place_of_a_file_is_answered_with_the_files_in_it(tmp_path: Path):
    with pytest.raises(ConfigError, match="is a folder") as caught:
        config.load(tmp_path)
    assert caught.value.remedy == "name a TOML file"
    (tmp_path / "harvest.toml").write_text("")
    with pytest.raises(ConfigError, match="is a folder") as caught:
        config.load(tmp_path)
    assert caught.value.remedy == "name a TOML file in it: harvest.toml"


@pytest.mark.parametrize("program", ["harvester", "trainer"])
def test_the_current_folder_in_place_of_a_file_is_said_to_be_one(tmp_path: Path, program: str):
    (tmp_path / "some.toml").write_text("")
    done = commands.run(program, ["plan", "."], cwd=tmp_path)
    assert (done.returncode, "is a folder" in done.stderr) == (2, True), done.stderr
    assert "name a TOML file in it: some.toml" in done.stderr


@pytest.mark.parametrize(
    ("command", "file", "commands_of_file"),
    [
        (("harvester", "run"), "train.toml", "`trainer train`"),
        (("harvester", "plan"), "curate.toml", "`harvester curate`"),
        (("harvester", "curate"), "harvest.toml", "`harvester run`"),
        (("trainer", "train"), "harvest.toml", "`harvester run`"),
        (("trainer", "train"), "distil.toml", "`trainer distil`"),
        (("trainer", "distil"), "train.toml", "`trainer train`"),
        (("trainer", "plan"), "judge.toml", "`harvester judge`"),
        (("trainer", "plan"), "curve.toml", "`trainer curve`"),
        (("harvester", "run"), "loop.toml", "`trainer loop`"),
    ],
)
def test_the_file_of_another_command_is_known(
    tmp_path: Path, command: tuple[str, str], file: str, commands_of_file: str
):
    texts = {
        "harvest.toml": CONFIG.format(base_url="http://127.0.0.1:9/v1", model="mock-teacher"),
        "train.toml": '[student]\nbase = "base"\n[data]\ncorpus = "store"\n',
        "curate.toml": 'corpus = "store"\nout = "curated"\nfilters = ["finished"]\n',
        "distil.toml": 'harvest = "harvest.toml"\ncurate = "curate.toml"\ntrain = "train.toml"\n',
        "judge.toml": '[judge]\ncorpus = "store"\n[teacher]\nmodel = "mock-teacher"\n',
        "curve.toml": 'train = "train.toml"\nrows = [10, 20, 30]\n',
        "loop.toml": 'harvest = "harvest.toml"\ntrain = "train.toml"\npool = ["a.jsonl"]\nrounds = 1\n',
    }
    (tmp_path / file).write_text(texts[file])
    done = commands.run(command[0], [command[1], tmp_path / file])
    assert (done.returncode, "unknown key" in done.stderr) == (2, True), done.stderr
    assert f"this looks like a {file}" in done.stderr
    assert commands_of_file in done.stderr


def test_a_stray_key_of_another_file_is_no_other_file(tmp_path: Path):
    path = folder(tmp_path, "http://127.0.0.1:9/v1")
    path.write_text(f"{path.read_text()}[student]\nbase = 'base'\n")
    done = harvester("plan", str(path))
    assert (done.returncode, "unknown key 'student'" in done.stderr) == (2, True), done.stderr
    assert "looks like" not in done.stderr


def test_a_misspelt_key_is_answered_with_the_nearest_one(tmp_path: Path):
    path = folder(tmp_path, "http://127.0.0.1:9/v1")
    path.write_text(path.read_text().replace("max_tokens", "max_token"))
    done = harvester("plan", str(path))
    assert done.returncode == 2
    assert "did you mean 'max_tokens'?" in done.stderr


def test_the_remedy_of_a_condition_fits_the_command_line(tmp_path: Path):
    """What it shows can be pasted; `where = {...}`, as in a file, could not."""
    done = harvester("export", EARLIER_STORE, tmp_path / "out", "--where", "x")
    assert done.returncode == 2
    assert "where = {" not in done.stderr
    (words,) = (line for line in done.stderr.splitlines() if line.startswith("  remedy"))
    again = harvester("export", EARLIER_STORE, tmp_path / "out", *shlex.split(words.split(maxsplit=1)[1]))
    assert "is no condition" not in again.stderr


def test_a_broken_prompt_line_is_named_before_anything_is_sent(tmp_path: Path, mock_teacher):
    teacher = mock_teacher()
    path = folder(tmp_path, teacher.base_url, lines=('{"prompt": "What is 12 + 30?"}', '{"prompt": 3'))
    done = harvester("run", str(path))
    assert done.returncode == 2
    assert "a.jsonl:2" in done.stderr
    assert teacher.totals()["answers"] == 0


def test_an_unreachable_teacher_is_named_quickly(tmp_path: Path):
    with refusing_port() as port:
        path = folder(tmp_path, f"http://127.0.0.1:{port}/v1")
        path.write_text(path.read_text() + "patience_s = 1.5\n")
        done = harvester("run", str(path))
    assert done.returncode == 10
    assert f"nobody answers at 127.0.0.1:{port}" in done.stderr
    assert "is base_url right?" in done.stdout


def test_a_wrong_model_says_which_models_exist(tmp_path: Path, mock_teacher):
    teacher = mock_teacher()
    done = harvester("run", str(folder(tmp_path, teacher.base_url, model="mock-teacher-2")))
    assert done.returncode == 4
    assert "mock-teacher-2" in done.stderr
    assert "mock-teacher" in done.stderr.replace("mock-teacher-2", "")


def test_undeclared_terms_are_refused_before_the_first_byte(tmp_path: Path, mock_teacher):
    teacher = mock_teacher()
    path = folder(tmp_path, teacher.base_url)
    path.write_text(
        path.read_text().replace('terms = "mock-teacher"\n', "").replace("mock-teacher", "some-model")
    )
    done = harvester("run", str(path))
    assert done.returncode == 77
    assert teacher.totals()["answers"] == 0


def test_an_unset_key_variable_is_named_and_a_set_one_never_shown(tmp_path: Path, mock_teacher):
    teacher = mock_teacher()
    path = folder(tmp_path, teacher.base_url)
    path.write_text(path.read_text().replace("[prompts]", 'api_key_env = "DOORS_KEY"\n[prompts]'))
    done = harvester("run", str(path))
    assert done.returncode == 2
    assert "DOORS_KEY" in done.stderr
    done = harvester("run", str(path), DOORS_KEY="canary-3f9a")
    assert done.returncode == 0, done.stderr
    assert "canary-3f9a" not in done.stdout + done.stderr


@pytest.mark.parametrize("verb", ["status", "verify", "report", "export", "seal", "rederive", "metrics"])
@pytest.mark.parametrize("name", ["nothing", "empty", "file.txt", "new"])
def test_a_store_that_is_none_is_wrong_usage_for_every_verb(tmp_path: Path, verb: str, name: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("mine")
    (tmp_path / "new").mkdir()
    folder(tmp_path / "new", "http://127.0.0.1:1/v1")  # a harvest.toml that was never run
    with pytest.raises(UsageError) as caught:
        app([verb, str(tmp_path / name), *([str(tmp_path / "out")] if verb == "export" else [])])
    assert caught.value.exit_code == 2
    assert name in caught.value.place
    assert not (tmp_path / "out").exists()


def test_folders_and_files_that_are_in_use_are_wrong_usage(tmp_path: Path, mock_teacher) -> None:
    config = folder(tmp_path, mock_teacher().base_url)
    assert harvester("run", config).returncode == 0
    used = tmp_path / "used"
    used.mkdir()
    (used / "x").write_text("mine")
    (tmp_path / "curate.toml").write_text('corpus = "store"\nout = "curated"\n')
    assert harvester("curate", tmp_path / "curate.toml").returncode == 0
    for arguments in (
        ("export", tmp_path / "store", used),
        ("curate", tmp_path / "curate.toml"),
        ("import", tmp_path / "a.jsonl", "--out", tmp_path / "a.jsonl"),
        ("init", tmp_path),
    ):
        done = harvester(*arguments)
        assert (done.returncode, "remedy" in done.stderr) == (2, True), (arguments, done.stderr)


@pytest.mark.parametrize(
    ("text", "place", "problem"),
    [
        ('corpus = "nope"\nout = "c"\n', "curate.toml:1", "no answers are stored in"),
        ('out = "c"\ncorpus = "empty"\n', "curate.toml:2", "no answers are stored in"),
        ('corpus = "s"\nout = "c"\nfilters = ["finishd"]\n', "curate.toml:3", "unknown filter 'finishd'"),
        ('corpus = "s"\nout = "c"\nfilters = [\n "finished",\n "judge",\n]\n', "curate.toml:5", "'judge'"),
        ('corpus = "s"\nout = "c"\nfilters = [{longest = 0}]\n', "curate.toml:3", "positive number"),
        ('corpus = "s"\nout = "c"\nfilters = [\n {run = []},\n]\n', "curate.toml:4", "id of a run"),
        ('corpus = "s"\nout = "c"\nfilters = [\n\n[1]]\n', "curate.toml:5", "a filter is a name"),
        ('corpus = "s"\nout = 3\n', "curate.toml:2", "path of a folder"),
    ],
)
def test_an_error_in_curate_toml_names_file_and_line(
    tmp_path: Path, text: str, place: str, problem: str
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "curate.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        curate.load(tmp_path / "curate.toml")
    assert caught.value.place.endswith(place)
    assert problem in caught.value.message


def test_a_curation_that_keeps_nothing_warns(tmp_path: Path, mock_teacher) -> None:
    assert harvester("run", folder(tmp_path, mock_teacher().base_url)).returncode == 0
    (tmp_path / "curate.toml").write_text('corpus = "store"\nout = "c"\nfilters = [{run = ["other"]}]\n')
    done = harvester("curate", tmp_path / "curate.toml", "--json")
    assert json.loads(done.stdout)["kept"] == 0
    assert "warning: no row was kept of 1" in done.stderr


def test_plan_names_a_misspelt_terms_record_and_an_unset_key(tmp_path: Path) -> None:
    path = folder(tmp_path, "http://127.0.0.1:1/v1")
    wrong = 'terms = "mok-teacher"\napi_key_env = "UNSET_KEY"'
    path.write_text(path.read_text().replace('terms = "mock-teacher"', wrong))
    notes = "\n".join(json.loads(harvester("plan", path, "--json").stdout)["warnings"])
    assert "did you mean 'mock-teacher'?" in notes
    assert "UNSET_KEY is not set" in notes


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_store_exists_is_answered_in_words(tmp_path: Path, number: int) -> None:
    path = folder(tmp_path, "http://127.0.0.1:1/v1")
    prompts = tmp_path / "a.jsonl"  # reading them takes seconds
    prompts.write_text("".join(f'{{"prompt": "{n}"}}\n' for n in range(600_000)))
    process = commands.Command("harvester", ["run", path])

    def is_reading() -> bool:
        assert process.poll() is None
        return str(prompts.resolve()) in open_files(process.pid)

    until(is_reading)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=240)
    assert process.returncode == 128 + number
    assert "nothing was sent and nothing was written" in stderr
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "arguments", [("run",), ("run", "x", "--nope"), ("run", "x", "--limit", "0"), ("frobnicate",)]
)
def test_wrong_usage_exits_2(arguments: tuple[str, ...]):
    assert harvester(*arguments).returncode == 2


@pytest.mark.parametrize(
    ("name", "value", "problem"),
    [
        ("rpm", "fast", "'fast' is not a number for rpm"),
        ("rps", "3", "can't set 'rps'"),
        ("max-concurrency", "0", "from 1 to"),
        ("budget-day", "3 euros", "is not a budget"),
        ("budget-store", "1,50", "is not a budget"),  # was 150 dollars
        ("rpm", "1,5", "is not a number for rpm"),
        ("rpm", "0,500", "is not a number for rpm"),
    ],
)
def test_a_wrong_setting_is_named_where_no_run_is_active(
    tmp_path: Path, name: str, value: str, problem: str
) -> None:
    (tmp_path / "shards").mkdir()
    wrong = harvester("set", str(tmp_path), name, value)
    assert (wrong.returncode, problem in wrong.stderr) == (2, True), wrong.stderr


@pytest.mark.parametrize(
    "arguments",
    [("pause",), ("resume",), ("stop",), ("stop", "--cancel-batches"), ("attach",), ("set", "rpm", "6")],
)
def test_commands_to_a_run_refuse_a_folder_that_is_no_store(
    tmp_path: Path, arguments: tuple[str, ...]
) -> None:
    command, *rest = arguments
    wrong = harvester(command, str(tmp_path), *rest)
    assert (wrong.returncode, "no store is here" in wrong.stderr) == (2, True), wrong.stderr
    assert str(tmp_path) in wrong.stderr
    assert "name the folder of a store" in wrong.stderr
    assert list(tmp_path.iterdir()) == []
    path = folder(tmp_path, "http://127.0.0.1:1/v1")
    (tmp_path / "store").mkdir()
    empty = harvester(command, str(path), *rest)
    assert (empty.returncode, "is a folder without a store" in empty.stderr) == (2, True), empty.stderr
    assert list((tmp_path / "store").iterdir()) == []


def test_a_right_setting_needs_an_active_run(tmp_path: Path) -> None:
    (tmp_path / "shards").mkdir()
    right = harvester("set", str(tmp_path), "rpm", "600")
    assert (right.returncode, "no run is active" in right.stderr) == (1, True), right.stderr


def test_a_wrong_value_is_named_with_its_line(tmp_path: Path) -> None:
    path = folder(tmp_path, "http://127.0.0.1:1/v1")
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines, "max_attempts = 'many'", ""]))
    done = harvester("plan", str(path))
    assert done.returncode == 2
    assert f"{path}:{len(lines) + 1}" in done.stderr
    assert "run.max_attempts: must be a whole number" in done.stderr


def test_a_run_completes_resumes_for_nothing_and_says_so(tmp_path: Path, mock_teacher):
    teacher = mock_teacher()
    lines = tuple(json.dumps({"prompt": f"What is {a} + 30?"}) for a in range(10, 60))
    path = folder(tmp_path, teacher.base_url, lines=lines)
    first = harvester("run", str(path), "--json")
    assert first.returncode == 0, first.stderr
    stdout = json.loads(first.stdout)
    assert (stdout["requests_sent"], stdout["answers_stored"], stdout["from_cache"]) == (50, 50, 0)
    again = json.loads(harvester("run", str(path), "--json").stdout)
    assert (again["requests_sent"], again["answers_stored"], again["from_cache"]) == (0, 0, 50)
    assert teacher.totals()["answers"] == 50
    assert harvester("verify", str(tmp_path / "store")).returncode == 0
    status = harvester("status", str(tmp_path / "store"), "--check")
    assert status.returncode == 0, status.stderr
    plan = json.loads(harvester("plan", str(path), "--json").stdout)
    assert (plan["rows"], plan["cached"]) == (50, 50)
    report = harvester("report", str(tmp_path / "store"))
    assert report.returncode == 0, report.stderr
    assert (tmp_path / "store" / "report.html").stat().st_size > 5000


def test_a_row_limit_ends_with_10_and_resumes(tmp_path: Path, mock_teacher):
    teacher = mock_teacher()
    lines = tuple(json.dumps({"prompt": f"What is {a} + 40?"}) for a in range(10, 60))
    path = folder(tmp_path, teacher.base_url, lines=lines)
    first = harvester("run", str(path), "--limit", "20", "--json")
    assert first.returncode == 10, first.stderr
    held = json.loads(first.stdout)["answers_stored"]
    assert held == 20
    second = harvester("run", str(path), "--json")
    assert second.returncode == 0, second.stderr
    assert json.loads(second.stdout)["answers_stored"] == 30
    assert teacher.totals()["answers"] == 50


def test_a_store_is_found_by_the_configuration_that_names_it(tmp_path: Path, mock_teacher):
    path = folder(tmp_path, mock_teacher().base_url)
    assert harvester("run", str(path)).returncode == 0
    for named in (tmp_path, path, tmp_path / "store"):
        assert json.loads(harvester("verify", str(named), "--json").stdout)["answers"] == 1
    missing = harvester("status", str(tmp_path / "other.toml"))
    assert missing.returncode == 2
    assert "other.toml" in missing.stderr


@pytest.mark.parametrize(
    "name", ["-x", "--dash", "a 'b\"", "new\nline", "tab\tstop", "~", "\u202edlrow", "$(x)"]
)
def test_a_printed_command_can_be_typed_into_a_shell(tmp_path: Path, name: str) -> None:
    done = commands.run("harvester", ["init", "--", name], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    typed = done.stdout.rpartition("      harvester ")[2].strip()
    words = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {typed}"], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    assert words[0] == "run"
    assert not words[1].startswith("-")
    assert (tmp_path / words[1]).samefile(tmp_path / name / "harvest.toml")


def test_a_command_to_resume_holds_for_a_folder_that_begins_with_a_dash(tmp_path: Path, mock_teacher) -> None:
    folder(tmp_path, mock_teacher().base_url).rename(tmp_path / "-x.toml")
    done = commands.run("harvester", ["run", "--max-runtime", "0s", "--", "-x.toml"], cwd=tmp_path)
    assert done.returncode == 10, done.stderr
    resume = done.stdout.rpartition("resume with: harvester ")[2].split()
    assert resume == ["run", "./-x.toml"]
    assert commands.run("harvester", resume, cwd=tmp_path).returncode == 0


@pytest.mark.parametrize(
    "verb",
    [("report",), ("verify",), ("rederive",), ("export", "OUT"), ("publish", "file://OUT")],
    ids=lambda verb: verb[0],
)
def test_a_store_under_a_name_that_is_no_utf8_is_refused_by_name(
    tmp_path: Path, mock_teacher, verb: tuple[str, ...]
) -> None:
    assert harvester("run", folder(tmp_path, mock_teacher().base_url)).returncode == 0
    moved = os.fsdecode(os.fsencode(tmp_path) + b"/moved\xff")
    (tmp_path / "store").rename(moved)
    rest = [word.replace("OUT", str(tmp_path / "out")) for word in verb[1:]]
    done = harvester(verb[0], moved, *rest)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "no UTF-8" in done.stderr
    assert "restore journal.db" not in done.stderr


def test_no_folder_is_made_where_no_run_could_start(tmp_path: Path) -> None:
    name = os.fsdecode(b"no-utf8-\xff")
    for arguments in (
        ("harvester", "init", name),
        ("trainer", "init", name),
        ("trainer", "init", "new", "--base", name),
        ("trainer", "init", "new", "--corpus", name),
        ("trainer", "init", "new", "--corpus", ""),
    ):
        done = commands.run(arguments[0], arguments[1:], cwd=tmp_path)
        assert done.returncode == 2, (arguments, done.stderr)
        assert "Traceback" not in done.stderr
        assert "remedy" in done.stderr
    assert list(tmp_path.iterdir()) == []


def as_ordinary_user(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the harvester without root's right to pass over permissions."""
    words = [sys.executable, "-m", "harvester", *map(str, arguments)]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root, and no setpriv that drops its rights")
        rights = "-dac_override,-dac_read_search"
        words = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}", *words]
    return subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("hidden", ["journal.db", "shards/*.parquet"])
def test_what_a_user_may_not_read_is_no_damage(tmp_path: Path, mock_teacher, hidden: str) -> None:
    assert harvester("run", folder(tmp_path, mock_teacher().base_url)).returncode == 0
    (path,) = (tmp_path / "store").glob(hidden)
    path.chmod(0)
    done = as_ordinary_user("verify", tmp_path / "store")
    path.chmod(0o600)
    assert done.returncode == 5, (done.stdout, done.stderr)
    assert path.name in done.stderr
    assert "permissions" in done.stderr
    assert "--repair" not in done.stdout + done.stderr
    assert harvester("verify", tmp_path / "store").returncode == 0


def test_a_prompt_folder_that_may_not_be_read_is_named(tmp_path: Path) -> None:
    config = folder(tmp_path, "http://127.0.0.1:9/v1")
    (tmp_path / "prompts").mkdir()
    (tmp_path / "a.jsonl").rename(tmp_path / "prompts" / "a.jsonl")
    config.write_text(config.read_text().replace("*.jsonl", "prompts/*.jsonl"))
    (tmp_path / "prompts").chmod(0)
    done = as_ordinary_user("plan", config)
    (tmp_path / "prompts").chmod(0o700)
    assert done.returncode == 2, done.stderr
    assert f"{tmp_path / 'prompts'}\n" in done.stderr
    assert "permission denied" in done.stderr


def test_an_emptied_journal_beside_shards_is_not_taken_for_a_new_store(tmp_path: Path, mock_teacher) -> None:
    config = folder(tmp_path, mock_teacher().base_url)
    assert harvester("run", config).returncode == 0
    for file in (tmp_path / "store").glob("journal.db*"):
        file.write_bytes(b"")
    for command in (("status", tmp_path / "store"), ("report", tmp_path / "store"), ("run", config)):
        done = harvester(*command)
        assert done.returncode == 5, done.stderr
        assert "sealed answers" in done.stderr
        assert "nothing was stored" not in done.stderr
    verified = harvester("verify", tmp_path / "store")
    assert verified.returncode == 1
    assert "1 finding\n" in verified.stdout
    assert "put journal.db back from a copy" in verified.stderr


@pytest.mark.parametrize("command", ["report", "metrics"])
def test_a_page_or_metrics_replace_no_file_of_another_kind(tmp_path: Path, command: str) -> None:
    shutil.copytree(EARLIER_STORE, tmp_path / "store")
    mine, new, words = (
        tmp_path / "harvest.toml",
        tmp_path / "new",
        (command, str(tmp_path / "store"), "--out"),
    )
    mine.write_text("# my settings\n")
    done = harvester(*words, str(mine))
    assert (done.returncode, "another file is there" in done.stderr) == (2, True), done.stderr
    assert mine.read_text() == "# my settings\n"
    for _ in range(2):  # the second one replaces its own
        assert harvester(*words, str(new)).returncode == 0


def test_a_curated_corpus_is_not_written_to_a_folder_called_tilde(tmp_path: Path) -> None:
    shutil.copytree(EARLIER_STORE, tmp_path / "store")
    config_file = tmp_path / "curate.toml"
    config_file.write_text('corpus = "store"\nout = "~/curated"\n')
    done = harvester("curate", str(config_file))
    assert (done.returncode, "~ is not replaced" in done.stderr) == (2, True), done.stderr
    assert f"{config_file}:2" in done.stderr
    assert not (tmp_path / "~").exists()


WRONG_PROMPTS = {
    "a.csv": (b"id,prompt\n1,one, two\n", "stands in quotes"),
    "b.csv": (b'prompt\n"a "quote" here"\n', "written twice"),
    "c.csv": ("prompt\nGröße\n".encode("latin-1"), "iconv"),
    "d.txt": ("Größe\n".encode("latin-1"), "iconv"),
    "e.jsonl": (b'{"prompt": "a", "tags": "math"}\n', '"tags": ["math", "easy"]'),
    "f.jsonl": (b'{"messages": []}\n', '"role": "user"'),
    "g.jsonl": (b'{"messages": [{"role": "user", "content": 5}]}\n', '"role": "user"'),
    "i.json": (b'[{"prompt": "a"} {"prompt": "b"}]', "commas between"),
    "j.jsonl": (b"\n\n", "write one a line"),
    "k.txt": (b"x" * (17 << 20), "by URL"),
}


@pytest.mark.parametrize("name", WRONG_PROMPTS)
def test_a_wrong_prompt_file_has_a_remedy_of_its_own(name: str, tmp_path: Path) -> None:
    content, remedy = WRONG_PROMPTS[name]
    path = folder(tmp_path, "http://127.0.0.1:1/v1")
    path.write_text(path.read_text().replace("*.jsonl", name))
    (tmp_path / name).write_bytes(content)
    is_list = name.endswith(".json")  # a run reads lines only
    done = harvester("import", str(tmp_path / name)) if is_list else harvester("plan", str(path))
    assert done.returncode == 2, done.stderr
    assert remedy in " ".join(done.stderr.split()), done.stderr
    assert name in done.stderr


def test_status_says_why_a_run_ended_until_another_one_completes(mock_teacher, tmp_path: Path):
    mock = mock_teacher()
    path = folder(tmp_path, mock.base_url.removesuffix("/v1"))
    refused = harvester("run", str(path))
    assert refused.returncode == 4, refused.stderr
    shown = harvester("status", str(path)).stdout
    [why] = [line for line in shown.splitlines() if line.startswith("why ")]
    assert "HTTP 404" in why
    assert "check model, and base_url with its /v1" in why
    folder(tmp_path, mock.base_url)
    limited = harvester("run", str(path), "--max-tokens", "10")
    assert limited.returncode == 10, limited.stderr
    facts = json.loads(harvester("status", str(path), "--json").stdout)
    assert facts["why"] in limited.stderr + limited.stdout
    assert "10" in facts["why"]
    assert harvester("run", str(path)).returncode == 0
    assert "\nwhy " not in harvester("status", str(path)).stdout


@pytest.mark.parametrize(
    ("address", "price", "is_told"),
    [
        ("https://api.example.com/v1", "0.0", True),
        ("https://api.example.com/v1", "0.1", False),
        ("http://127.0.0.1:9/v1", "0.0", False),
        ("http://10.0.0.7:8000/v1", "0.0", False),
    ],
)
def test_a_price_of_nothing_on_the_internet_is_pointed_out(
    tmp_path: Path, address: str, price: str, is_told: bool
):
    path = folder(tmp_path, address)
    path.write_text(f"{path.read_text()}[teacher.price]\ninput = {price}\noutput = {price}\n")
    done = harvester("plan", str(path))
    assert done.returncode == 0, done.stderr
    told = "no ceiling in USD ever ends a run" in " ".join((done.stdout + done.stderr).split())
    assert told == is_told, done.stdout
