"""`.env` beside the configuration: variables for this run only. The environment always wins over it.

Values stay here: they are put neither into the process's environment, which child processes inherit, nor into
an error message.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from dotenv.parser import parse_stream

from harvester.errors import ConfigError

DOTENV_NAME = ".env"


def variables(folder: Path) -> Mapping[str, str]:
    """The environment, and below it what `folder/.env` sets. Nothing is expanded or run.

    Raises:
        ConfigError: the file can't be read, or a line of it is no `NAME=value`; never shows the line.
    """
    path = folder / DOTENV_NAME
    try:
        with path.open(encoding="utf-8") as file:
            found = list(parse_stream(file))
    except FileNotFoundError:
        return dict(os.environ)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("can't be read as UTF-8 text", place=str(path), remedy=_remedy(error)) from None
    for one in found:
        if one.error:
            raise ConfigError(
                "not a line such as NAME=value",
                place=f"{path}:{one.original.line}",
                remedy="quote values with spaces; # begins a comment",
            )
    told = {one.key: one.value for one in found if one.key is not None and one.value is not None}
    return {**told, **os.environ}


def _remedy(error: Exception) -> str:
    return f"{error.strerror}" if isinstance(error, OSError) and error.strerror else "save it as UTF-8"
