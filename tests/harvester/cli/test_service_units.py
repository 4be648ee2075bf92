"""Units for schedulers: syntax by the schedulers' own tools where they are, and the fields that matter."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from random import Random
from typing import Any
from zoneinfo import ZoneInfo

import pytest
import yaml

from harvester import errors
from harvester.cli import service_units
from harvester.cli.explain import error_classes
from harvester.config.run_section import BudgetSection
from harvester.config.schedule import DAYS, parse
from harvester.errors import ConfigError
from harvester.system import unit_text

ROOT = Path(__file__).resolve().parents[3]
NIGHTS = (parse("Mon-Fri 22:30-07:00 Europe/Berlin"), parse("Sat,Sun 00:00-24:00 UTC"))
HOUR = r"(?:[01]?\d|2[0-3])"
CRON = re.compile(rf"([0-5]?\d) (\*|{HOUR}(?:,{HOUR})*) (\*) (\*) (\*|[0-6](?:,[0-6])*) (\S.*)\Z")


def harvest(folder: Path, openings: Sequence[Any] = NIGHTS, **more: Any) -> service_units.Harvest:
    command = [sys.executable, "-m", "harvester"]
    return service_units.Harvest(
        "harvest-x", command, folder / "harvest.toml", "store", 25.0, openings, **more
    )


def verified(files: dict[str, str], folder: Path) -> None:
    """What systemd itself says of the units; where there is no systemd, only that they parse."""
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    tool = shutil.which("systemd-analyze")
    if tool is None:
        return
    paths = [str(folder / name) for name in files]
    done = subprocess.run([tool, "verify", "--man=no", *paths], capture_output=True, text=True, timeout=240)
    about_ours = [line for line in done.stderr.splitlines() if "harvest-x" in line]
    assert about_ours == []
    for line in files["harvest-x.timer"].splitlines():
        if line.startswith("OnCalendar="):
            event = line.partition("=")[2]
            subprocess.run([tool, "calendar", event], capture_output=True, check=True, timeout=240)


def section(text: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None, comment_prefixes=("#",))
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(text)
    return parser


def test_systemd_runs_it_as_a_notify_service_and_restarts_only_what_may_mend(tmp_path: Path) -> None:
    files = service_units.systemd(harvest(tmp_path))
    verified(files, tmp_path)
    service = section(files["harvest-x.service"])["Service"]
    assert (service["Type"], service["NotifyAccess"], service["KillSignal"]) == ("notify", "main", "SIGTERM")
    assert shlex.split(service["ExecStart"])[-2:] == ["run", str(tmp_path / "harvest.toml")]
    assert int(service["TimeoutStopSec"]) >= 25 + 30
    assert int(service["WatchdogSec"]) >= 10
    assert service["Restart"] == "on-failure"
    never = {int(code) for code in service["RestartPreventExitStatus"].split()}
    fine = {int(code) for code in service["SuccessExitStatus"].split()}
    ends = {kind.exit_code for kind in error_classes().values()}
    assert (never | fine) >= ends - {1}  # every ending that trying again at once can't mend
    assert fine == {10, 130, 143}
    timer = section(files["harvest-x.timer"])["Timer"]
    assert (timer["Unit"], timer["Persistent"]) == ("harvest-x.service", "true")
    for nights in ("Mon,Tue,Wed,Thu,Fri *-*-* 22,23", "Tue,Wed,Thu,Fri,Sat *-*-* 00,01,02,03,04,05,06"):
        assert f"OnCalendar={nights}:30:00 Europe/Berlin\n" in files["harvest-x.timer"]
    assert "OnCalendar=Sat,Sun *-*-* *:00:00 UTC\n" in files["harvest-x.timer"]


def test_systemd_takes_an_odd_path_literally(tmp_path: Path) -> None:
    odd = tmp_path / 'a b%h"$HOME'
    odd.mkdir()
    files = service_units.systemd(harvest(odd, ()))
    verified(files, tmp_path)
    service = files["harvest-x.service"]
    start = next(line for line in service.splitlines() if line.startswith("ExecStart="))
    assert start.endswith(
        'run "' + str(odd / "harvest.toml").replace("%", "%%").replace('"', '\\"').replace("$", "$$") + '"'
    )
    assert f"WorkingDirectory={str(odd).replace('%', '%%')}\n" in service
    assert "OnCalendar=hourly\n" in files["harvest-x.timer"]


@pytest.mark.parametrize(
    "path", ["/a\n[Service]\nExecStart=/bin/false", "/a/\udcff", "/a/\u202eb", "/a/\x1b[2J"]
)
def test_a_path_that_no_line_holds_is_refused_for_every_scheduler(path: str) -> None:
    odd = Path("/b") / path.replace("/", "_")  # kubernetes names the file only
    for make, entry in (
        (service_units.systemd, harvest(Path(path))),
        (service_units.cron, harvest(Path(path))),
        (service_units.kubernetes, replace(harvest(Path("/b")), config=odd)),
    ):
        with pytest.raises(ConfigError, match="invisible or invalid") as caught:
            make(entry)
        assert caught.value.place.isascii()


def test_the_end_of_a_folder_is_not_lost(tmp_path: Path) -> None:
    for name in ("b\\", "b "):
        with pytest.raises(ConfigError, match="ends with"):
            service_units.systemd(harvest(Path("/a") / name))
    with pytest.raises(ConfigError, match="backslash"):
        service_units.cron(harvest(Path("/a/b\\")))
    assert "cd '/a/b '" in service_units.cron(harvest(Path("/a/b ")))["harvest-x.cron"]
    last = replace(harvest(tmp_path), config=tmp_path / "harvest\\")
    files = service_units.systemd(last)
    verified(files, tmp_path)
    unit = section(files["harvest-x.service"])["Unit"]
    assert (unit["Description"][-2:], unit["After"]) == ("\\\\", "network-online.target")


def test_a_program_with_a_dollar_is_found_by_systemd(tmp_path: Path) -> None:
    program = tmp_path / "a$HOME b" / "harvester"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    files = service_units.systemd(replace(harvest(tmp_path), command=[str(program)]))
    verified(files, tmp_path)  # it looks for the program
    assert f'ExecStart="{program}" run' in files["harvest-x.service"]
    with pytest.raises(ConfigError, match="program's name"):
        service_units.systemd(replace(harvest(tmp_path), command=["/a/${HOME}/python", "-m", "harvester"]))


def words_of(container: dict[str, Any]) -> list[str]:
    """The arguments of `harvester` in the shell of a CronJob's pod."""
    (shell, option, script) = [word.replace("$$", "$") for word in container["command"]]
    assert (shell, option) == ("sh", "-c")
    (line,) = [line for line in script.splitlines() if line.startswith("harvester ")]
    assert line.endswith(" &")
    return shlex.split(line[:-2])[1:]


def test_kubernetes_takes_odd_names_literally_and_long_ones_not(tmp_path: Path) -> None:
    odd = replace(harvest(tmp_path), config=tmp_path / "a$(HOME)$$b😀.toml", store="st$ore")
    (text, _) = service_units.kubernetes(odd).values()
    (container,) = yaml.safe_load(text)["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    assert words_of(container) == ["run", "/harvest/a$(HOME)$$b😀.toml"]
    (text,) = service_units.kubernetes(replace(odd, openings=())).values()
    (alone,) = yaml.safe_load(text)["spec"]["template"]["spec"]["containers"]
    assert alone["args"] == ["run", "/harvest/a$$(HOME)$$$$b😀.toml"]
    assert container["livenessProbe"]["exec"]["command"][2] == "/harvest/st$$ore"
    assert len(service_units.kubernetes(replace(odd, name="x" * 50))) == 2
    with pytest.raises(ConfigError, match="52 characters"):
        service_units.kubernetes(replace(odd, name="x" * 51))
    assert len(service_units.kubernetes(replace(odd, name="x" * 52, openings=NIGHTS[:1]))) == 1


def test_a_job_array_runs_one_shard_in_each_task(tmp_path: Path) -> None:
    split = replace(harvest(tmp_path / "it's"), shards=8)
    (text,) = service_units.slurm(split).values()
    script = tmp_path / "job.sbatch"
    script.write_text(text)
    assert "#SBATCH --array=1-8\n" in text
    assert "#SBATCH --signal=B:TERM@85\n" in text
    (tmp_path / "it's").mkdir()
    program = tmp_path / "it's" / "show"
    program.write_text('#!/bin/sh\necho "$PWD" "$@"\n')
    program.chmod(0o755)
    script.write_text(service_units.slurm(replace(split, command=[str(program)]))["harvest-x.sbatch"])
    environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "3"}
    shown = subprocess.run(["bash", script], capture_output=True, text=True, env=environment, check=True)
    assert shown.stdout.split() == [str(tmp_path / "it's"), "run", str(split.config), "--shard", "3/8"]


def test_an_indexed_job_runs_one_shard_in_each_pod(tmp_path: Path) -> None:
    split = replace(harvest(tmp_path), openings=(), shards=8, store="st ore")
    job = yaml.safe_load(service_units.kubernetes(split)["harvest-x.job.yaml"])["spec"]
    assert [job[name] for name in ("completionMode", "completions", "parallelism")] == ["Indexed", 8, 8]
    assert (job["backoffLimitPerIndex"], "backoffLimit" in job) == (6, False)
    assert job["podFailurePolicy"]["rules"][1]["action"] == "FailIndex"
    (container,) = job["template"]["spec"]["containers"]
    for command, words in (
        (container["command"], ["run", "/harvest/harvest.toml", "--shard", "3/8"]),
        (container["livenessProbe"]["exec"]["command"], ["status", "/harvest/st ore-3-of-8", "--check"]),
    ):
        (shell, option, script) = [word.replace("$$", "$") for word in command]
        assert (shell, option) == ("sh", "-c")
        shown = subprocess.run(
            ["sh", "-c", script.replace("exec harvester", "printf '%s\\n'")],
            capture_output=True,
            text=True,
            env={**os.environ, "JOB_COMPLETION_INDEX": "2"},
            check=True,
        )
        assert shown.stdout.splitlines()[: len(words)] == words
    assert len(service_units.kubernetes(replace(split, openings=NIGHTS))) == 2
    alone = yaml.safe_load(service_units.kubernetes(replace(split, shards=1))["harvest-x.job.yaml"])["spec"]
    assert (alone["backoffLimit"], alone["podFailurePolicy"]["rules"][1]["action"]) == (6, "FailJob")


def test_cron_lines_name_minute_hour_days_and_zone(tmp_path: Path) -> None:
    odd = tmp_path / "100% mine's"
    text = service_units.cron(harvest(odd))["harvest-x.cron"]
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert lines[0] == "CRON_TZ=Europe/Berlin"
    assert lines[3] == "CRON_TZ=UTC"
    assert lines[5:] == ['CRON_TZ=""']  # cronie: empty is the machine's own again
    matches = [CRON.match(lines[number]) for number in (1, 2, 4)]
    assert [match.groups()[:5] if match else None for match in matches] == [
        ("30", "22,23", "*", "*", "1,2,3,4,5"),
        ("30", "0,1,2,3,4,5,6", "*", "*", "2,3,4,5,6"),
        ("0", "*", "*", "*", "0,6"),
    ]
    assert matches[0] is not None
    command = matches[0][6].replace("\\%", "%")
    assert "%" not in matches[0][6].replace("\\%", "")
    assert shlex.split(command)[:2] == ["cd", str(odd)]
    assert shlex.split(command)[-3:] == [">>", "harvest.log", "2>&1"]
    alone = service_units.cron(harvest(odd, ()))["harvest-x.cron"].splitlines()[-1]
    assert CRON.match(alone)


@pytest.mark.parametrize(
    ("hours", "events"),
    [
        ("Mon-Fri 09:15-17:00", ["15 9,10,11,12,13,14,15,16 * * 1,2,3,4,5"]),
        ("09:00-09:30", ["0 9 * * *"]),
        ("Sun 23:00-01:00", ["0 23 * * 0", "0 0 * * 1"]),
        ("Fri 23:30-00:15", ["30 23 * * 5"]),
        ("22:00-02:00", ["0 0,1,22,23 * * *"]),
        ("Mon-Sun 00:00-24:00", ["0 * * * *"]),
    ],
)
def test_an_opening_across_midnight_has_two_events(tmp_path: Path, hours: str, events: list[str]) -> None:
    lines = service_units.cron(harvest(tmp_path, [parse(f"{hours} UTC")]))["harvest-x.cron"].splitlines()
    assert [line.partition(" cd ")[0] for line in lines if " cd " in line] == events


MONDAY = datetime(2027, 1, 4)


def cron_starts(event: str) -> set[datetime]:
    """The wall-clock times at which an event starts something in two weeks."""
    (minute, at, _, _, on) = event.split()
    hours = range(24) if at == "*" else [int(hour) for hour in at.split(",")]
    days = range(7) if on == "*" else {(int(day) - 1) % 7 for day in on.split(",")}
    return {
        MONDAY + timedelta(days=day, hours=hour, minutes=int(minute))
        for day in range(14)
        if day % 7 in days
        for hour in hours
    }


def calendar_starts(event: str) -> set[datetime]:
    """The same of an event of systemd, by its own words."""
    match = re.fullmatch(r"(?:(\S+) )?\*-\*-\* (\S+):(\d\d):00 \S+", event)
    assert match is not None
    days = [str((DAYS.index(day) + 1) % 7) for day in match[1].split(",")] if match[1] else ["*"]
    return cron_starts(f"{int(match[3])} {match[2]} * * {','.join(days)}")


def test_every_hour_of_an_opening_has_a_start_and_none_lies_outside(tmp_path: Path) -> None:
    """So a run that ended within the hours is started again within an hour, in any time zone."""
    random = Random(1)
    across_midnight = 0
    for _ in range(300):
        days = ",".join(random.sample(DAYS, random.randint(1, 7)))
        start, end = random.sample(range(0, 1440, 15), 2)
        zone = random.choice(["UTC", "Europe/Berlin", "Asia/Kolkata", "Pacific/Auckland"])
        opening = parse(f"{days} {start // 60:02d}:{start % 60:02d}-{end // 60:02d}:{end % 60:02d} {zone}")
        across_midnight += end < start
        wanted = set()
        for day in range(-1, 14):
            span = opening.on((MONDAY + timedelta(days=day)).date())
            if span is not None:
                first = datetime.fromtimestamp(span[0], ZoneInfo(zone)).replace(tzinfo=None)
                hours = range(-(int(span[0] - span[1]) // 3600))  # begun ones
                wanted |= {first + timedelta(hours=hour) for hour in hours}
        wanted = {start for start in wanted if MONDAY <= start < MONDAY + timedelta(days=14)}
        planned = harvest(tmp_path, [opening])
        lines = service_units.cron(planned)["harvest-x.cron"].splitlines()
        events = [line.partition(" cd ")[0] for line in lines if " cd " in line]
        assert set().union(*map(cron_starts, events)) == wanted, opening
        assert sum(len(cron_starts(event)) for event in events) == len(wanted)  # none twice
        timer = service_units.systemd(planned)["harvest-x.timer"].splitlines()
        events = [line.partition("=")[2] for line in timer if line.startswith("OnCalendar=")]
        assert set().union(*map(calendar_starts, events)) == wanted, opening
        (text,) = service_units.kubernetes(planned).values()
        assert cron_starts(yaml.safe_load(text)["spec"]["schedule"]) >= wanted, opening
    assert across_midnight > 50


def test_kubernetes_starts_one_at_a_time_and_never_retries_what_retrying_cant_mend(tmp_path: Path) -> None:
    files = service_units.kubernetes(harvest(tmp_path, key_env="TEACHER_API_KEY", image="r/harvester:1"))
    loaded = [yaml.safe_load(text) for text in files.values()]
    assert [(manifest["kind"], manifest["metadata"]["name"]) for manifest in loaded] == [
        ("CronJob", "harvest-x-1"),
        ("CronJob", "harvest-x-2"),
    ]
    spec = loaded[0]["spec"]
    assert (spec["schedule"], spec["timeZone"]) == (
        "30 0,1,2,3,4,5,6,22,23 * * 1,2,3,4,5,6",
        "Europe/Berlin",
    )
    assert spec["concurrencyPolicy"] == "Forbid"
    job = spec["jobTemplate"]["spec"]
    rule = next(rule for rule in job["podFailurePolicy"]["rules"] if rule["action"] == "FailJob")
    ends = {kind.exit_code for kind in error_classes().values()} - {1, 130}
    assert set(rule["onExitCodes"]["values"]) == ends
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"  # podFailurePolicy demands it
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert pod["terminationGracePeriodSeconds"] >= 25 + 30
    assert words_of(container) == ["run", "/harvest/harvest.toml"]
    assert container["livenessProbe"]["exec"]["command"][:4] == [
        "harvester",
        "status",
        "/harvest/store",
        "--check",
    ]
    secret = container["env"][0]["valueFrom"]["secretKeyRef"]
    assert (container["env"][0]["name"], secret["key"]) == ("TEACHER_API_KEY", "TEACHER_API_KEY")
    assert "value" not in container["env"][0]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    volume = pod["volumes"][0]
    assert volume["name"] == container["volumeMounts"][0]["name"]


def started_by_cronjob(folder: Path, harvester: str, shards: int = 1) -> subprocess.Popen[str]:
    """A pod's shell with a program of that text in place of `harvester`."""
    program = folder / "harvester"
    program.write_text(f"#!/bin/sh\n{harvester}\n")
    program.chmod(0o755)
    (text, _) = service_units.kubernetes(replace(harvest(folder), shards=shards)).values()
    (container,) = yaml.safe_load(text)["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    (_, _, script) = [word.replace("$$", "$") for word in container["command"]]
    path = f"{folder}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "JOB_COMPLETION_INDEX": "2"}
    return subprocess.Popen(["sh", "-c", script], env=environment, stdout=subprocess.PIPE, text=True)


@pytest.mark.parametrize(("ended", "code"), [(0, 0), (10, 0), (75, 0), (1, 1), (3, 3), (77, 77), (143, 143)])
def test_a_start_outside_the_hours_is_no_failed_job(tmp_path: Path, ended: int, code: int) -> None:
    for shards, words in ((1, ""), (8, " --shard 3/8")):
        pod = started_by_cronjob(tmp_path, f'echo "$@"; exit {ended}', shards)
        shown, _ = pod.communicate(timeout=60)
        assert (shown, pod.returncode) == (f"run /harvest/harvest.toml{words}\n", code)


def test_a_pod_of_a_cronjob_that_is_stopped_drains(tmp_path: Path) -> None:
    drains = (
        "trap 'echo draining; sleep 0.2; echo drained; exit 143' TERM; echo up; while :; do sleep 0.05; done"
    )
    pod = started_by_cronjob(tmp_path, drains)
    assert pod.stdout is not None
    assert pod.stdout.readline() == "up\n"
    pod.terminate()
    assert pod.stdout.read() == "draining\ndrained\n"
    assert pod.wait(60) == 143
    pod.stdout.close()


def test_kubernetes_without_hours_is_a_job(tmp_path: Path) -> None:
    (text,) = service_units.kubernetes(harvest(tmp_path, ())).values()
    loaded = yaml.safe_load(text)
    assert (loaded["apiVersion"], loaded["kind"]) == ("batch/v1", "Job")
    assert loaded["spec"]["template"]["spec"]["containers"][0]["env"] == []
    outside = service_units.Harvest("x", ["h"], tmp_path / "h.toml", "../elsewhere", 25.0, ())
    with pytest.raises(ConfigError):
        service_units.kubernetes(outside)


@pytest.mark.parametrize(
    ("folder", "name"), [("My Run_7", "harvest-my-run-7"), ("日本", "harvest"), ("--x--", "harvest-x")]
)
def test_names_are_fit_for_kubernetes(tmp_path: Path, folder: str, name: str) -> None:
    assert unit_text.name_of(tmp_path / folder / "harvest.toml", "harvest") == name


def test_the_containerfile_copies_what_is_there_and_drops_root() -> None:
    lines = (ROOT / "Containerfile").read_text(encoding="utf-8").splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    known_steps = {"FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER", "STOPSIGNAL", "ENTRYPOINT", "CMD"}
    assert {step for step, _ in steps} <= known_steps
    assert steps[0][0] == "FROM"
    for step, rest in steps:
        if step == "COPY":
            assert all((ROOT / source).exists() for source in rest.split()[:-1])
    last = dict(steps)
    assert (last["USER"], last["STOPSIGNAL"]) == ("65532:65532", "SIGTERM")
    assert last["ENTRYPOINT"] == '["harvester"]'


def test_every_exit_code_of_the_tree_is_in_the_help() -> None:
    from harvester.cli.main import EXIT_CODES

    codes_in_help = {int(number) for number in re.findall(r"\b(\d+)\b", EXIT_CODES)}
    assert {kind.exit_code for kind in error_classes().values()} <= codes_in_help
    assert errors.EXIT_COMPLETE in codes_in_help


@pytest.mark.parametrize(
    ("budget", "renewed"),
    [
        ({"usd": 50.0}, True),
        ({"run": {"tokens": 9}}, True),
        ({"usd": 50.0, "day": {"usd": 5.0}}, False),
        ({"store": {"tokens": 9}}, False),
        ({}, False),
    ],
)
def test_a_ceiling_of_one_run_holds_for_the_store_in_units(
    tmp_path: Path, budget: dict[str, Any], renewed: bool
) -> None:
    planned = harvest(tmp_path, budget=BudgetSection.model_validate(budget))
    service = service_units.systemd(planned)["harvest-x.service"]
    assert service.rstrip().count("--budget-per store") == renewed
    assert ("--budget-per store" in service_units.cron(planned)["harvest-x.cron"]) == renewed
    for text in service_units.kubernetes(planned).values():
        pod = yaml.safe_load(text)["spec"]["jobTemplate"]["spec"]["template"]["spec"]
        assert ("--budget-per" in words_of(pod["containers"][0])) == renewed
    lasting = [f"[budget.{span}]" for span in ("store", "day") if span in budget]
    assert all(span in service for span in lasting)


@pytest.mark.parametrize(
    ("budget", "openings", "options"),
    [
        ({"usd": 5.0, "month": {"usd": 50.0}}, NIGHTS, "--share-opening"),
        ({"tokens": 9, "store": {"usd": 50.0}}, NIGHTS[:1], "--share-opening"),
        ({"usd": 5.0, "day": {"usd": 50.0}}, (), "--budget-per day"),
        ({"usd": 5.0, "day": {"usd": 50.0}}, (parse("00:00-24:00 UTC"),), "--budget-per day"),
        ({"month": {"usd": 50.0}}, NIGHTS, ""),
    ],
)
def test_hourly_starts_do_not_renew_the_ceiling_of_one_run(
    tmp_path: Path, budget: dict[str, Any], openings: Sequence[Any], options: str
) -> None:
    planned = harvest(tmp_path, openings, budget=BudgetSection.model_validate(budget))
    service = service_units.systemd(planned)["harvest-x.service"]
    (start,) = [line for line in service.splitlines() if line.startswith("ExecStart=")]
    assert start.partition("harvest.toml")[2].strip() == options
    assert ("That of a run holds for" in service) == bool(options)
    crontab = service_units.cron(planned)["harvest-x.cron"].splitlines()
    commands = [line for line in crontab if " cd " in line]
    for line in commands:
        assert line.partition("harvest.toml")[2].partition(">>")[0].strip() == options
    for text in service_units.kubernetes(planned).values():
        spec = yaml.safe_load(text)["spec"]
        if openings:
            (container,) = spec["jobTemplate"]["spec"]["template"]["spec"]["containers"]
            assert words_of(container)[2:] == options.split()
        else:  # it is started once
            assert spec["template"]["spec"]["containers"][0]["args"] == ["run", "/harvest/harvest.toml"]
    slurm = service_units.slurm(replace(planned, shards=2))["harvest-x.sbatch"]
    assert "--share-opening" not in slurm
