"""Fill the templates of data/units, and quote values for the files of schedulers.

Their syntax: YAML flow scalars (every JSON string is one), and lines that hold no line break.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import resources
from string import Template

from harvester.errors import ConfigError
from harvester.system.safe_text import one_line

RENAME = "rename it, or use a link with a plain name"


def fill(template: str, values: Mapping[str, str]) -> str:
    """Return a template of data/units with its values."""
    text = resources.files("harvester_data").joinpath("units", template).read_text(encoding="utf-8")
    return Template(text).substitute(values)


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
