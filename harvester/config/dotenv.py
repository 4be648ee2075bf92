"""Read `.env` beside the configuration: variables for this run only. The environment always wins.

Values are never put into the process's environment, which child processes inherit, nor into an error message.
"""

from __future__ import annotations

import io
import os
from collections.abc import Mapping
from pathlib import Path

from dotenv.parser import parse_stream

from harvester.errors import ConfigError
from harvester.system import own_files

DOTENV_NAME = ".env"
# A larger file is no list of variables.
MAX_BYTES = 16 << 20


def variables(folder: Path) -> Mapping[str, str]:
    """Return the environment, and what `folder/.env` sets where it does not. Nothing is expanded or run.

    Raises:
        ConfigError: the file can't be read, or a line is not `NAME=value`; the line is never shown.
    """
    path = folder / DOTENV_NAME
    try:
        text = own_files.read_bytes(path, MAX_BYTES, follows_links=True).decode("utf-8")
        bindings = list(parse_stream(io.StringIO(text)))
    except FileNotFoundError:
        return dict(os.environ)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("can't be read as UTF-8 text", place=str(path), remedy=_remedy(error)) from None
    for binding in bindings:
        if binding.error:
            raise ConfigError(
                "not a line such as NAME=value",
                place=f"{path}:{binding.original.line}",
                remedy="quote values with spaces; # begins a comment",
            )
    values = {b.key: b.value for b in bindings if b.key is not None and b.value is not None}
    return {**values, **os.environ}


def _remedy(error: Exception) -> str:
    return f"{error.strerror}" if isinstance(error, OSError) and error.strerror else "save it as UTF-8"
