"""Fill the templates of data/units, and name and quote what stands in the files of schedulers.

Their syntax: YAML flow scalars (every JSON string is one), and lines that hold no line break.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from string import Template

from harvester.errors import ConfigError, UsageError
from harvester.system.safe_text import one_line

RENAME = "rename it, or use a link with a plain name"


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return a template of data/units with its values."""
    text = resources.files("harvester_data").joinpath("units", template).read_text(encoding="utf-8")
    return Template(text).substitute(values)


def name_of(file: Path, prefix: str) -> str:
    """Return a name for units and for Kubernetes (RFC 1123), made from the name of the file's folder."""
    words = re.sub(r"[^a-z0-9]+", "-", file.resolve().parent.name.lower()).strip("-")[:40].strip("-")
    return f"{prefix}-{words}" if words else prefix


def require_name(name: str, what: str) -> None:
    """Refuse a name that Kubernetes or systemd would not take.

    Args:
        what: what has the name, for the message.

    Raises:
        UsageError: names it.
    """
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,50}[a-z0-9])?", name):
        raise UsageError(
            f"{name!r} can't be the name of a {what}", remedy="use lower case letters, digits and dashes"
        )


def command_of(program: str) -> list[str]:
    """Return the command that starts a program of this installation: its script, or its module."""
    script = shutil.which(program, path=str(Path(sys.executable).parent))
    return [script] if script else [sys.executable, "-m", program]


def plain(text: str) -> str:
    """Return the text as one line, for a comment or a description."""
    return " ".join(text.split())


def checked(text: str) -> str:
    """Return `text` if it can be a part of one visible line of UTF-8.

    Raises:
        ConfigError: it can't.
    """
    if one_line(text) != text:
        what = "a line break, or invisible or invalid characters"
        raise ConfigError(f"a unit can't hold a path with {what}", place=ascii(text), remedy=RENAME)
    return text


def yaml_text(text: str) -> str:
    """Return a double-quoted scalar. Non-ASCII text is not escaped, as YAML does not join surrogates."""
    return json.dumps(checked(text), ensure_ascii=False)


def yaml_argument(text: str) -> str:
    """Return a word of a pod's command, where $$ means a dollar sign and $(NAME) a variable."""
    return yaml_text(text.replace("$", "$$"))
