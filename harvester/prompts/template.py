"""Write the text of prompts with a template file: jinja2, sandboxed, where a missing field is an error."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harvester.errors import ConfigError, PromptError

if TYPE_CHECKING:
    from jinja2 import Template

# The largest template file that is read.
MOST_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class PromptTemplate:
    """A template, read and compiled.

    Attributes:
        name: of its file, for errors.
        sha256: of the file's bytes, in hexadecimal digits.
    """

    name: str
    sha256: str
    compiled: Template

    @classmethod
    def load(cls, path: Path) -> PromptTemplate:
        """Read a template. It can include no other file, so its hash stands for all of it.

        Raises:
            ConfigError: no regular file of at most 1 MiB, no UTF-8, or no template.
        """
        from jinja2 import StrictUndefined, TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        content = _read(path)
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined,
            finalize=_require_value,
            trim_blocks=True,
            lstrip_blocks=True,
            autoescape=False,
        )
        try:
            compiled = environment.from_string(content.decode())
        except UnicodeDecodeError as error:
            message = f"is not UTF-8: byte {error.start} can't be read"
            raise ConfigError(message, place=str(path), remedy="save it as UTF-8") from None
        except TemplateSyntaxError as error:
            raise ConfigError(
                f"is no jinja2 template: {error.message}",
                place=f"{path}:{error.lineno}",
                remedy="fields of a row stand in double braces: {{ question }}",
            ) from None
        return cls(path.name, hashlib.sha256(content).hexdigest(), compiled)

    def render(self, row: Mapping[str, Any], place: str) -> str:
        """Return the text for a row. Its fields are variables; `row` holds all of them, whatever their names.

        Raises:
            PromptError: the template needs a field that the row lacks, writes one that is null, fails, or
            writes no text.
        """
        from jinja2 import UndefinedError

        try:
            text = self.compiled.render({**row, "row": row})
        except UndefinedError as error:
            raise PromptError(
                f"template {self.name}: {error.message}",
                place=place,
                remedy="the row lacks the field; `{% if x is defined %}` allows for it",
            ) from None
        except _NullWrittenError:
            null = [repr(name) for name, value in row.items() if value is None]
            what = f"the field {null[0]}, which is null" if len(null) == 1 else "a value that is null"
            raise PromptError(
                f"template {self.name} writes {what} in this row",
                place=place,
                remedy="`{{ x or '' }}` writes nothing in its place; `{% if x is not none %}` asks for it",
            ) from None
        except Exception as error:  # noqa: BLE001 - an expression of the template fails as any Python does
            message = f"template {self.name} fails on this row: {type(error).__name__}: {error}"
            raise PromptError(
                message, place=place, remedy="change the template, or the row that it can't take"
            ) from None
        if not text.strip():
            raise PromptError(
                f"template {self.name} writes no text for this row",
                place=place,
                remedy="remove the row, or let the template write text for rows such as this one",
            )
        return text


class _NullWrittenError(Exception):
    """An expression whose value is written is null; jinja2 would write "None"."""


def _require_value(value: object) -> object:
    if value is None:
        raise _NullWrittenError
    return value


def _read(path: Path) -> bytes:
    try:
        if not path.is_file():
            why = "is no file" if path.exists() else "does not exist"
            raise ConfigError(
                f"the template {why}",
                place=str(path),
                remedy="[prompts] template is a file beside the configuration",
            )
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"the template can't be read: {error.strerror}",
            place=str(path),
            remedy="check the permissions of the file that [prompts] template names",
        ) from None
    if len(content) > MOST_BYTES:
        raise ConfigError(
            f"the template has more than {MOST_BYTES:,} bytes",
            place=str(path),
            remedy="[prompts] template is a jinja2 file; put long texts into fields of the rows",
        )
    return content
