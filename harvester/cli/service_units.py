"""Write the files with which systemd, cron, Kubernetes or Slurm run a harvest.

The templates are in data/units. This module fills them and quotes values for each syntax: systemd.syntax(7)
and systemd.service(5), crontab(5), YAML flow scalars (every JSON string is one).
"""

from __future__ import annotations

import json
import re
import shlex
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from harvester.config.budget_spans import BudgetSpan
from harvester.config.run_section import BudgetSection, CeilingSection
from harvester.config.schedule import DAYS, Opening, OpeningHours
from harvester.errors import ConfigError
from harvester.system.unit_text import RENAME, checked, fill, plain, yaml_argument, yaml_text

# Seconds that a run may take to seal and end after --grace, before the scheduler kills it.
SEALING_S = 60

# A Job gets the name of its CronJob and eleven characters more; 63 are allowed.
LONGEST_CRONJOB = 52

# Folder in the container at which the harvest's folder is mounted.
MOUNT = PurePosixPath("/harvest")


@dataclass(frozen=True, slots=True)
class Harvest:
    """What the files must contain.

    Attributes:
        name: name of the units.
        command: the command that starts the harvester.
        config: absolute path of harvest.toml.
        store: [store] path as configured.
        grace_s: seconds to wait for answers in flight after a signal.
        openings: the [schedule] hours; empty for any time.
        budget: the ceilings of harvest.toml.
        key_env: name of the environment variable with the API key.
        image: container image, for Kubernetes.
        shards: number of parts that the harvest is split into; 1 for none.
    """

    name: str
    command: Sequence[str]
    config: Path
    store: str
    grace_s: float
    openings: Sequence[Opening]
    budget: BudgetSection = field(default_factory=BudgetSection)
    key_env: str | None = None
    image: str = "harvester"
    shards: int = 1

    @property
    def stop_s(self) -> int:
        """Seconds from SIGTERM until the scheduler may kill the run."""
        return int(self.grace_s) + SEALING_S

    def options(self, *, hourly: bool) -> tuple[str, ...]:
        """Return options of `harvester run`, by which no start renews the ceilings of one run.

        A scheduler starts one run after another. Without a ceiling that lasts, those of a run hold for the
        store. With one, hourly starts share them: those of one opening, or where there is no end to the hours
        those of a day.

        Args:
            hourly: whether the scheduler starts it every hour.
        """
        if not _is_set(self.budget.by_span[BudgetSpan.RUN]):
            return ()
        if not self._lasting:
            return ("--budget-per", "store")
        if not hourly:
            return ()
        return ("--share-opening",) if self._closes else ("--budget-per", "day")

    @property
    def _lasting(self) -> list[BudgetSpan]:
        spans = self.budget.by_span.items()
        return [span for span, ceiling in spans if span is not BudgetSpan.RUN and _is_set(ceiling)]

    @property
    def _closes(self) -> bool:
        """Whether there are hours, and times outside them."""
        hours, now = OpeningHours(tuple(self.openings)), time.time()
        return bool(self.openings) and (not hours.is_open(now) or hours.closes_at(now) is not None)

    def budget_comment(self, *, hourly: bool) -> str:
        """Return one line of comment about the ceilings that survive restarts."""
        options = self.options(hourly=hourly)
        if "store" in options:
            return "[budget] holds for all runs of the store together here, so that no restart renews it."
        if not self._lasting:
            return "No ceiling in [budget]: nothing bounds what the runs cost together."
        lasting = ", ".join(f"[budget.{span}]" for span in self._lasting)
        text = f"Ceilings that survive restarts: {lasting}. `harvester status` says what is left."
        if options:
            span = "the runs of one opening" if "--share-opening" in options else "a day (UTC)"
            text += f" That of a run holds for {span} here."
        return text


def _is_set(ceiling: CeilingSection) -> bool:
    return ceiling.usd is not None or ceiling.tokens is not None


def systemd(harvest: Harvest) -> dict[str, str]:
    """Return a service of Type=notify, and a timer that starts it every hour while it may work.

    Raises:
        ConfigError: a unit file can't hold a path.
    """
    folder = checked(str(harvest.config.parent))
    if folder.endswith((" ", "\\")):  # WorkingDirectory= has no quotes: systemd strips the line
        raise ConfigError(
            "the folder's name ends with a space or backslash, which systemd would drop",
            place=repr(folder),
            remedy=RENAME,
        )
    events = [event for opening in harvest.openings for event in _calendar_events(opening)] or ["hourly"]
    values = {
        "name": harvest.name,
        # A backslash at the end would join the next line.
        "described": plain(str(harvest.config)).replace("%", "%%").replace("\\", "\\\\"),
        "folder": folder.replace("%", "%%"),
        "command": " ".join([_systemd_program(harvest.command[0]), *map(_systemd_word, harvest.command[1:])]),
        "config": " ".join(map(_systemd_word, (str(harvest.config), *harvest.options(hourly=True)))),
        "budget": harvest.budget_comment(hourly=True),
        "stop_s": str(harvest.stop_s),
        "calendar": "\n".join(f"OnCalendar={event}" for event in events),
    }
    return {
        f"{harvest.name}.service": fill("harvest.service", values),
        f"{harvest.name}.timer": fill("harvest.timer", values),
    }


def cron(harvest: Harvest) -> dict[str, str]:
    """Return lines for `crontab -e`, one or two for each opening, which start every hour while it may work.

    Raises:
        ConfigError: cron would change a path.
    """
    words = [
        checked(word)
        for word in (*harvest.command, "run", str(harvest.config), *harvest.options(hourly=True))
    ]
    if bad_word := next((word for word in words if "\\" in word), ""):  # cron daemons disagree about these
        raise ConfigError("cron would change a path with a backslash", place=bad_word, remedy=RENAME)
    folder, command = shlex.quote(str(harvest.config.parent)), shlex.join(words)
    # In crontab(5) an unescaped % ends the command.
    entry = f"cd {folder} && {command} >> harvest.log 2>&1".replace("%", "\\%")
    values = {"described": plain(str(harvest.config)), "budget": harvest.budget_comment(hourly=True)}
    lines = [fill("harvest.cron", values).rstrip()]
    if not harvest.openings:
        lines.append(f"17 * * * * {entry}")
    zone = ""
    for opening in harvest.openings:
        if opening.zone != zone:
            zone = opening.zone
            lines.append(f"CRON_TZ={zone}")
        lines += [f"{event} {entry}" for event in _cron_events(opening)]
    if zone:
        lines.append('CRON_TZ=""')  # lines after these use the machine's time zone again
    return {f"{harvest.name}.cron": "\n".join(lines) + "\n"}


def kubernetes(harvest: Harvest) -> dict[str, str]:
    """Return a CronJob for each opening, or a Job if there are none; exit codes decide whether it is retried.

    Raises:
        ConfigError: the store is outside the folder that is mounted, or a name is too long or not allowed.
    """
    store = PurePosixPath(harvest.store)
    if store.is_absolute() or ".." in store.parts:
        raise ConfigError(
            "must be inside the folder of harvest.toml",
            place="[store] path",
            remedy="that folder becomes the volume of the pod; use a relative path",
        )
    env = []
    if harvest.key_env:
        secret = {"name": f"{harvest.name}-teacher", "key": harvest.key_env}
        env = [{"name": harvest.key_env, "valueFrom": {"secretKeyRef": secret}}]
    pod = fill(
        "harvest.pod.yaml",
        {
            "name": harvest.name,
            "stop_s": str(harvest.stop_s),
            "image": yaml_text(harvest.image),
            **_pod_commands(harvest, str(MOUNT / store)),
            "budget": harvest.budget_comment(hourly=bool(harvest.openings)),
            "env": json.dumps(env),
        },
    )
    if not harvest.openings:
        job = textwrap.indent(pod.rstrip(), "  ")
        return {f"{harvest.name}.job.yaml": fill("harvest.job.yaml", {"name": harvest.name, "job": job})}
    files = {}
    for number, opening in enumerate(harvest.openings, start=1):
        name = f"{harvest.name}-{number}" if len(harvest.openings) > 1 else harvest.name
        if len(name) > LONGEST_CRONJOB:
            raise ConfigError(
                f"{name!r} is longer than the {LONGEST_CRONJOB} characters that a CronJob's name may have",
                place="--name",
                remedy="give a shorter one",
            )
        files[f"{name}.cronjob.yaml"] = fill(
            "harvest.cronjob.yaml",
            {
                "name": name,
                "schedule": json.dumps(_cronjob_event(opening)),
                "zone": json.dumps(opening.zone),
                "job": textwrap.indent(pod.rstrip(), " " * 6),
            },
        )
    return files


# What a pod of a CronJob runs in place of the command alone. A limit that the operator set (10), as the end
# of the hours or a start outside them, and a store that the run of another opening holds (75) leave the rest
# to the next start. Kubernetes would count such a Job as failed, and forget a real failure for it. SIGTERM is
# passed on, for sh is process 1.
_FOR_CRONJOB = """\
run= stopped=
trap 'stopped=1; [ -z "$run" ] || kill -TERM "$run"' TERM
{command} &
run=$!
[ -z "$stopped" ] || kill -TERM "$run"
wait "$run"
code=$?
while kill -0 "$run" 2>/dev/null; do # the trap ended the wait
  wait "$run"
  code=$?
done
case "$code" in 10|75) exit 0;; esac
exit "$code"
"""


def _pod_commands(harvest: Harvest, store: str) -> dict[str, str]:
    """Return what a pod runs and how its store is checked; in an indexed Job it finds out which shard it is.

    The index of a pod is in its environment, from 0. A failed shard does not end the others.
    """
    run = ("run", str(MOUNT / harvest.config.name), *harvest.options(hourly=bool(harvest.openings)))
    check = ("status", store, "--check", "--max-age", "10m")
    if harvest.shards == 1:
        command = f"harvester {shlex.join(run)}"
        start = f"args: [{', '.join(map(yaml_argument, run))}]"
        values = {
            "completions": "",
            "retries": "backoffLimit: 6",
            "failed": "FailJob",
            "check": ", ".join(["harvester", *map(yaml_argument, check)]),
        }
    else:
        shard = "$((JOB_COMPLETION_INDEX + 1))"
        of_shard = f"{shlex.quote(store.rstrip('/'))}-{shard}-of-{harvest.shards}"
        check_shard = f"exec harvester status {of_shard} {shlex.join(check[2:])}"
        command = f"harvester {shlex.join(run)} --shard {shard}/{harvest.shards}"
        start = f"command: [sh, -c, {yaml_argument(f'exec {command}')}]"
        values = {
            "completions": "completionMode: Indexed\n"
            f"completions: {harvest.shards}\nparallelism: {harvest.shards}\n",
            "retries": "backoffLimitPerIndex: 6",
            "failed": "FailIndex",
            "check": f"sh, -c, {yaml_argument(check_shard)}",
        }
    if harvest.openings:
        script = _FOR_CRONJOB.format(command=checked(command)).replace("$", "$$")  # see `yaml_argument`
        start = "command:\n  - sh\n  - -c\n  - |\n" + textwrap.indent(script.rstrip(), " " * 4)
    return {**values, "start": textwrap.indent(start, " " * 8).lstrip()}  # as deep as in the template


def slurm(harvest: Harvest) -> dict[str, str]:
    """Return a job array with a task for each shard, for `sbatch`.

    Raises:
        ConfigError: a script can't hold a path.
    """
    words = [
        checked(word)
        for word in (*harvest.command, "run", str(harvest.config), *harvest.options(hourly=False))
    ]
    store = PurePosixPath(harvest.config.parent, harvest.store)
    values = {
        "name": harvest.name,
        "described": plain(str(harvest.config)),
        "budget": harvest.budget_comment(hourly=False),
        "shards": str(harvest.shards),
        "stop_s": str(harvest.stop_s),
        "folder": shlex.quote(checked(str(harvest.config.parent))),
        "command": shlex.join(words),
        "store": shlex.quote(checked(str(store))),
    }
    return {f"{harvest.name}.sbatch": fill("harvest.sbatch", values)}


def _starts(opening: Opening) -> list[tuple[frozenset[int], frozenset[int]]]:
    """Days of the week (Monday is 0) and hours at which to start, at the minute of the opening.

    When it opens, and every hour from then on while it is open: a run that ended meanwhile, for a teacher
    that was down, a long wait or a reboot, would else be started a day or a week later. A start while one is
    running is none. An opening across midnight has two such pairs, for its hours before and after.
    """
    end = opening.end if opening.end > opening.start else opening.end + 1440
    hours = [start // 60 for start in range(opening.start, end, 60)]
    evening = frozenset(hour for hour in hours if hour < 24)
    morning = frozenset(hour - 24 for hour in hours if hour >= 24)
    if len(opening.days) == 7:
        return [(opening.days, evening | morning)]
    next_days = frozenset((day + 1) % 7 for day in opening.days)
    return [(opening.days, evening), *([(next_days, morning)] if morning else [])]


def _calendar_events(opening: Opening) -> list[str]:
    """Return the starts as systemd.time(7) writes them."""
    events = []
    for days, hours in _starts(opening):
        on = "" if len(days) == 7 else ",".join(DAYS[day] for day in sorted(days)) + " "
        at = "*" if len(hours) == 24 else ",".join(f"{hour:02d}" for hour in sorted(hours))
        events.append(f"{on}*-*-* {at}:{opening.start % 60:02d}:00 {opening.zone}")
    return events


def _cron_events(opening: Opening) -> list[str]:
    """Return minute, hours and days of the week of the starts, as in crontab(5)."""
    return [_cron_event(opening, days, hours) for days, hours in _starts(opening)]


def _cronjob_event(opening: Opening) -> str:
    """Return one event that has all starts, and for an opening across midnight further ones.

    A CronJob has one schedule, and two CronJobs would both start what one of them runs already.
    """
    pairs = _starts(opening)
    days, hours = (frozenset().union(*parts) for parts in zip(*pairs, strict=True))
    return _cron_event(opening, days, hours)


def _cron_event(opening: Opening, days: frozenset[int], hours: frozenset[int]) -> str:
    """Return minute, hours and days; in crontab(5) 0 is Sunday."""
    on = "*" if len(days) == 7 else ",".join(str(day) for day in sorted((d + 1) % 7 for d in days))
    at = "*" if len(hours) == 24 else ",".join(map(str, sorted(hours)))
    return f"{opening.start % 60} {at} * * {on}"


def _systemd_program(text: str) -> str:
    """Return the first word of ExecStart; systemd replaces variables only in the name the program sees."""
    if "${" in text or "$$" in text:
        raise ConfigError("systemd would change the program's name", place=text, remedy=RENAME)
    return _systemd_word(text).replace("$$", "$")


def _systemd_word(text: str) -> str:
    """Return one word of ExecStart with specifiers and variables escaped."""
    escaped = checked(text).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return escaped if re.fullmatch(r"[\w./:@=+,-]+", text) else f'"{escaped}"'
