"""Units for schedulers, filled in from a configuration: systemd, cron, Kubernetes.

The texts lie in data/units as templates; here is what fills them, and the quoting that each syntax wants:
systemd.syntax(7) and systemd.service(5), crontab(5), YAML flow scalars (a JSON string is one).
"""

from __future__ import annotations

import json
import re
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from string import Template

from harvester.config.schedule import DAYS, Opening
from harvester.errors import ConfigError
from harvester.system.safe_text import one_line

SEALING_S = 60
"""What an ending may take beyond --grace before a scheduler loses patience."""
LONGEST_CRONJOB = 52
"""A Job's name has eleven characters more, and 63 at most."""
_RENAME = "rename it, or reach it by a link with a plain name"
MOUNT = PurePosixPath("/harvest")


@dataclass(frozen=True, slots=True)
class Harvest:
    """What units are about. `command` starts the harvester; `config` is absolute; `key_env` is a name."""

    name: str
    command: Sequence[str]
    config: Path
    store: str
    grace_s: float
    openings: Sequence[Opening]
    key_env: str | None = None
    image: str = "harvester"

    @property
    def stop_s(self) -> int:
        """Seconds between the signal and the loss of patience."""
        return int(self.grace_s) + SEALING_S


def systemd(harvest: Harvest) -> dict[str, str]:
    """A service of Type=notify and the timer that starts it when an opening begins, or every hour.

    Raises:
        ConfigError: a path that its syntax can't hold.
    """
    folder = _whole(str(harvest.config.parent))
    if folder.endswith((" ", "\\")):  # WorkingDirectory= takes no quotes: the end of its line would be lost
        raise ConfigError("systemd can't be told a folder that ends so", place=repr(folder), remedy=_RENAME)
    events = [f"{_list(one)} *-*-* {one.starts_at}:00 {one.zone}" for one in harvest.openings] or ["hourly"]
    values = {
        "name": harvest.name,
        # A backslash at the end would take the next line in.
        "described": _plain(str(harvest.config)).replace("%", "%%").replace("\\", "\\\\"),
        "folder": folder.replace("%", "%%"),
        "command": " ".join([_systemd_program(harvest.command[0]), *map(_systemd_word, harvest.command[1:])]),
        "config": _systemd_word(str(harvest.config)),
        "stop_s": str(harvest.stop_s),
        "calendar": "\n".join(f"OnCalendar={event}" for event in events),
    }
    return {
        f"{harvest.name}.service": _filled("harvest.service", values),
        f"{harvest.name}.timer": _filled("harvest.timer", values),
    }


def cron(harvest: Harvest) -> dict[str, str]:
    """Lines for `crontab -e`, one an opening.

    Raises:
        ConfigError: a path that cron would change.
    """
    words = [_whole(word) for word in (*harvest.command, "run", str(harvest.config))]
    if odd := next((word for word in words if "\\" in word), ""):  # some daemons take \\\\ for \\, some don't
        raise ConfigError("cron can't be told a path with a backslash", place=odd, remedy=_RENAME)
    folder, command = shlex.quote(str(harvest.config.parent)), shlex.join(words)
    # In crontab(5) an unescaped % ends the command.
    act = f"cd {folder} && {command} >> harvest.log 2>&1".replace("%", "\\%")
    lines = [_filled("harvest.cron", {"described": _plain(str(harvest.config))}).rstrip()]
    if not harvest.openings:
        lines.append(f"17 * * * * {act}")
    zone = ""
    for one in harvest.openings:
        if one.zone != zone:
            zone = one.zone
            lines.append(f"CRON_TZ={zone}")
        lines.append(f"{_cron_event(one)} {act}")
    if zone:
        lines.append('CRON_TZ=""')  # what follows in the crontab goes by the machine's time again
    return {f"{harvest.name}.cron": "\n".join(lines) + "\n"}


def kubernetes(harvest: Harvest) -> dict[str, str]:
    """A CronJob an opening, or a Job where there are none; exit codes decide what is tried again.

    Raises:
        ConfigError: the store lies outside the folder that is mounted, or a name is too long or too odd.
    """
    store = PurePosixPath(harvest.store)
    if store.is_absolute() or ".." in store.parts:
        raise ConfigError(
            "must lie in the folder of the configuration",
            place="[store] path",
            remedy="that folder becomes the volume of the pod",
        )
    env = []
    if harvest.key_env:
        secret = {"name": f"{harvest.name}-teacher", "key": harvest.key_env}
        env = [{"name": harvest.key_env, "valueFrom": {"secretKeyRef": secret}}]
    pod = _filled(
        "harvest.pod.yaml",
        {
            "name": harvest.name,
            "stop_s": str(harvest.stop_s),
            "image": _yaml(harvest.image),
            "config": _yaml_argument(str(MOUNT / harvest.config.name)),
            "store": _yaml_argument(str(MOUNT / store)),
            "env": json.dumps(env),
        },
    )
    if not harvest.openings:
        job = textwrap.indent(pod.rstrip(), "  ")
        return {f"{harvest.name}.job.yaml": _filled("harvest.job.yaml", {"name": harvest.name, "job": job})}
    many = len(harvest.openings) > 1
    files = {}
    for number, one in enumerate(harvest.openings, start=1):
        name = f"{harvest.name}-{number}" if many else harvest.name
        if len(name) > LONGEST_CRONJOB:
            raise ConfigError(
                f"{name!r} is longer than the {LONGEST_CRONJOB} characters that a CronJob's name may have",
                place="--name",
                remedy="give a shorter one",
            )
        files[f"{name}.cronjob.yaml"] = _filled(
            "harvest.cronjob.yaml",
            {
                "name": name,
                "schedule": json.dumps(_cron_event(one)),
                "zone": json.dumps(one.zone),
                "job": textwrap.indent(pod.rstrip(), " " * 6),
            },
        )
    return files


def name_of(config: Path) -> str:
    """A name that is fit for units and for Kubernetes (RFC 1123), from the folder's name."""
    words = re.sub(r"[^a-z0-9]+", "-", config.resolve().parent.name.lower()).strip("-")[:40].strip("-")
    return f"harvest-{words}" if words else "harvest"


def _filled(template: str, values: Mapping[str, str]) -> str:
    text = resources.files("harvester_data").joinpath("units", template).read_text(encoding="utf-8")
    return Template(text).substitute(values)


def _list(opening: Opening) -> str:
    return ",".join(DAYS[day] for day in sorted(opening.days))


def _cron_event(opening: Opening) -> str:
    """Minute, hour and days of the week; crontab(5) begins the week with Sunday, 0."""
    days = (
        "*"
        if len(opening.days) == 7
        else ",".join(str(day) for day in sorted((d + 1) % 7 for d in opening.days))
    )
    return f"{opening.start % 60} {opening.start // 60} * * {days}"


def _plain(text: str) -> str:
    """Fit for a comment or a description: one line."""
    return " ".join(text.split())


def _whole(text: str) -> str:
    """The text, when a line of a unit, in UTF-8, on any screen, holds it as it is."""
    if one_line(text) != text:
        what = "a line break, or characters that are no text or can't be seen"
        raise ConfigError(f"a unit can't name a path with {what}", place=ascii(text), remedy=_RENAME)
    return text


def _yaml(text: str) -> str:
    """A double-quoted scalar. YAML joins no pair of surrogate escapes, so what isn't ASCII stays as it is."""
    return json.dumps(_whole(text), ensure_ascii=False)


def _yaml_argument(text: str) -> str:
    """Of a command, in a pod as in its probe: $$ is a dollar, $(NAME) a variable."""
    return _yaml(text.replace("$", "$$"))


def _systemd_program(text: str) -> str:
    """The first word of ExecStart: its path is taken as it is, but for what the program sees as its name."""
    if "${" in text or "$$" in text:
        raise ConfigError("systemd would change the program's name", place=text, remedy=_RENAME)
    return _systemd_word(text).replace("$$", "$")


def _systemd_word(text: str) -> str:
    """One word of ExecStart: specifiers and variables are taken literally."""
    escaped = _whole(text).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return escaped if re.fullmatch(r"[\w./:@=+,-]+", text) else f'"{escaped}"'
