"""Write the reference pages from the code they describe: keys, codes, columns, Python names, commands.

Each function returns one page as Markdown. `PAGES` names them all.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import typing
from collections.abc import Callable, Iterator
from importlib.resources import files
from types import ModuleType
from typing import Any

import click
import pyarrow as pa
import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo

import harvester
import harvester.errors
import trainer
import trainer.errors
from harvester.cli import explain, main
from harvester.config import provider_presets
from harvester.config.config import HarvestConfig
from harvester.mock_teacher.__main__ import parser as mock_parser
from harvester.store.shards.schema import COLUMNS
from harvester.system.command_line.remedies import EXIT_CODES, TRAINER_CODES
from harvester.terms.records import load_registry
from trainer.cli import main as cli
from trainer.reference import descriptions

# Errors that have the exit code of the command which failed.
HAVE_ANOTHERS_CODE = {trainer.errors.HarvestFailed.code, trainer.errors.CommandFailed.code}


def harvest_toml() -> str:
    """Return the keys of harvest.toml, one table for each of its tables."""
    parts = [
        "# harvest.toml",
        "The tables and keys of the file that `harvester plan`, `run` and `judge` read. Relative paths start from "
        "its folder. An unknown key is an error that names the nearest known one. `harvester init DIR` writes a file to "
        "start from; `harvester config schema` prints the JSON Schema for editors. `[verify]`, `[decontaminate]`, "
        "`[score]`, `[accept]` and `[batch]`, and the keys of curate.toml and judge.toml, are explained in [the "
        "configuration of curation](../../harvester/CONFIG.md), those of train.toml in [the configuration of "
        "training](../../trainer/CONFIG.md).",
    ]
    for name, section in _sections(HarvestConfig, ""):
        parts += [f"## `[{name}]`", _first_paragraphs(section), _key_table(section)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _sections(model: type[BaseModel], path: str) -> Iterator[tuple[str, type[BaseModel]]]:
    for key, field in model.model_fields.items():
        for inner in dict.fromkeys(_models(field.annotation)):
            is_by_name = typing.get_origin(field.annotation) is dict
            name = f"{path}{key}.TASK" if is_by_name else f"{path}{key}"
            if name.startswith("budget.") and name != "budget.run":
                continue  # `[budget.store]`, `.day` and `.month` have the keys of `[budget.run]`
            yield name, inner
            yield from _sections(inner, f"{name}.")


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from _models(inner)


def _first_paragraphs(described: Any) -> str:
    """Return a docstring up to its first section."""
    text = inspect.cleandoc(described.__doc__ or "")
    return re.split(r"\n\n?(?:Args|Attributes|Returns|Raises|Yields|Example):", text)[0].strip()


def _key_table(section: type[BaseModel]) -> str:
    texts = descriptions(section)
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for name, field in section.model_fields.items():
        if any(_models(field.annotation)) and name not in texts:
            continue  # a table of its own, described there
        lines.append(f"| `{field.alias or name}` | {_default(field)} | {_cell(texts[name])} |")
    return "\n".join(lines) if len(lines) > 2 else ""


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "–"
    if isinstance(value, BaseModel | provider_presets.AppliedPreset):
        return "none"
    return f"`{json.dumps(value, default=str)}`"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def exit_codes() -> str:
    """Return the exit codes, with the errors that lead to each."""
    classes = {**explain.error_classes(), **_trainer_errors()}
    lines = [
        "# Exit codes",
        "",
        "Both programs end with these codes. `harvester explain CODE` says what to do about each.",
        "",
        "| exit code | meaning | errors |",
        "|---|---|---|",
    ]
    for number, meaning in EXIT_CODES.items():
        known = 130 if number == 143 else number
        codes = [code for code, error in classes.items() if _ends_a_run(error) and error.exit_code == known]
        lines.append(
            f"| {number} | {meaning} | {', '.join(_error_link(code) for code in sorted(codes)) or '–'} |"
        )
    left = {error.exit_code for error in classes.values() if _ends_a_run(error)} - set(EXIT_CODES)
    if left:
        raise ValueError(f"exit codes without a meaning: {left}")
    return "\n".join(lines) + "\n"


def _ends_a_run(error: type[harvester.errors.HarvesterError]) -> bool:
    """Whether a command ends with the exit code of the class, and not with that of another command that failed."""
    is_attempt = issubclass(error, harvester.errors.TeacherError)
    return error.code not in HAVE_ANOTHERS_CODE and (
        not is_attempt or error.code in {"teacher", "teacher_refused"}
    )


def _error_link(code: str) -> str:
    return f"[`{code}`](errors.md#{code})"


def _trainer_errors() -> dict[str, type[harvester.errors.HarvesterError]]:
    """Return the errors that only the trainer has, by code."""
    return {
        error.code: error
        for error in vars(trainer.errors).values()
        if isinstance(error, type)
        and issubclass(error, harvester.errors.HarvesterError)
        and error.__module__ == "trainer.errors"
    }


def error_codes() -> str:
    """Return every error code: meaning, what is done about it, remedy."""
    parts = [
        "# Error codes",
        "The codes in `error[CODE]`, of both programs, and in dead_letters.jsonl. `harvester explain CODE` prints the same.",
    ]
    for code, each in explain.all_explanations().items():
        ends = "the run continues" if each.exit_code is None else f"exit code {each.exit_code}"
        if code in HAVE_ANOTHERS_CODE:
            ends = "exit code: that of the command that failed"
        if code == next(iter(TRAINER_CODES)):
            parts.append("## Errors of the trainer\n\nOnly `trainer` ends with these codes.")
        again = {
            None: "",
            True: " A further attempt would fail again.",
            False: " A further attempt may succeed.",
        }
        parts += [
            f"{'###' if code in TRAINER_CODES else '##'} {code}",
            f"{each.meaning}{again[each.is_permanent]} ({ends})",
            f"What we do\n: {each.done}",
            f"Remedy\n: {each.remedy}",
        ]
    return "\n\n".join(parts) + "\n"


def columns() -> str:
    """Return the columns of a shard."""
    lines = [
        "# Columns of the corpus",
        "",
        "The columns of the Parquet files in `store/shards`, in their order. [The format of a store]"
        "(../../data/FORMAT.md) says more, also for readers in other languages.",
        "",
        "| column | Arrow type | may be null | content |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| `{name}` | `{_kind(kind)}` | {'yes' if nullable else 'no'} | {_cell(meaning)} |"
        for name, kind, nullable, meaning in COLUMNS
    ]
    return "\n".join(lines) + "\n"


def _kind(kind: pa.DataType) -> str:
    """Return the name of an Arrow type, with the names of a struct's fields and without their types."""
    if pa.types.is_list(kind):
        return f"list<{_kind(kind.value_type)}>"
    if pa.types.is_struct(kind):
        return f"struct<{', '.join(field.name for field in kind)}>"
    return str(kind)


def presets() -> str:
    """Return the provider presets."""
    lines = [
        "# Provider presets",
        "",
        '`[teacher] preset = "NAME"` fills in what the table `[teacher]` leaves out.',
        "",
        "| preset | address | example model | terms record | key variable |",
        "|---|---|---|---|---|",
    ]
    for path in sorted(files("harvester_data").joinpath("teachers").iterdir(), key=lambda path: path.name):
        if path.name.endswith(".toml"):
            row = provider_presets.fill({"preset": path.name.removesuffix(".toml")})
            cells = [str(row.get(key) or "–") for key in ("base_url", "model", "terms", "api_key_env")]
            name = path.name.removesuffix(".toml")
            lines.append(f"| `{name}` | " + " | ".join("–" if c == "–" else f"`{c}`" for c in cells) + " |")
    return "\n".join(lines) + "\n"


def terms_records() -> str:
    """Return the shipped terms records."""
    lines = [
        "# Terms records",
        "",
        "Our reading of the terms of teachers, each with its source and the day of reading; not legal advice. "
        "`harvester terms show ID` prints a record. [How to write one](../../data/terms/README.md).",
        "",
        "| record | layer | verdict | seen | review after |",
        "|---|---|---|---|---|",
    ]
    for record in load_registry().records.values():
        cells = (f"`{record.id}`", record.layer, record.verdict, record.seen, record.review_after)
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def python_api() -> str:
    """Return the public names of both packages, from their signatures and docstrings."""
    parts = [
        "# Python API",
        "These names are public; [what stays the same](../../README.md#from-python) says what that means. All other "
        "modules are private.",
    ]
    for module in (harvester, trainer):
        parts.append(f"## {module.__name__}")
        names = [name for name in module.__all__ if not name.startswith("__")]
        names.sort(key=lambda name: isinstance(getattr(module, name), type))  # functions first
        parts += [_python_name(module, name) for name in names]
    parts += ["## Errors", _error_tree(harvester.errors), _error_tree(trainer.errors)]
    return "\n\n".join(parts) + "\n"


def _error_tree(module: ModuleType) -> str:
    return f"`{module.__name__}`:\n\n```text\n{inspect.cleandoc(module.__doc__ or '').partition(chr(10) * 2)[2]}\n```"


def _python_name(module: ModuleType, name: str) -> str:
    value = getattr(module, name)
    title = f"### {module.__name__}.{name}"
    if not isinstance(value, type) and not callable(value):
        return f"{title}\n\n`{value!r}`"
    if not isinstance(value, type):
        return f"{title}\n\n{_signature(f'{module.__name__}.{name}', value)}\n\n{_docstring(value)}"
    parts = [title, _docstring(value)]
    if dataclasses.is_dataclass(value):
        rows = [f"| `{each.name}` | `{_annotation(each.type)}` |" for each in dataclasses.fields(value)]
        parts.append("| field | type |\n|---|---|\n" + "\n".join(rows))
    for member_name, member in vars(value).items():
        if member_name.startswith("_") or not callable(getattr(member, "fget", member)):
            continue
        if isinstance(member, property):
            parts.append(f"**`{member_name}`**\n: {_first_paragraphs(member)}")
        elif inspect.isfunction(member):
            parts.append(f"{_signature(member_name, member)}\n\n{_docstring(member)}")
    return "\n\n".join(parts)


def _annotation(annotation: Any) -> str:
    return str(annotation).replace("|", "\\|")


def _signature(name: str, function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    shown = [str(parameter) for parameter in signature.parameters.values() if parameter.name != "self"]
    star = [index for index, p in enumerate(signature.parameters.values()) if p.kind is p.KEYWORD_ONLY]
    if star:
        shown.insert(star[0] - (len(signature.parameters) - len(shown)), "*")
    returned = (
        "" if signature.return_annotation is inspect.Signature.empty else f" -> {signature.return_annotation}"
    )
    one_line = f"{name}({', '.join(shown)}){returned}"
    several = "".join(f"    {each},\n" for each in shown)
    text = one_line if len(one_line) < 90 else f"{name}(\n{several}){returned}"
    return f"```python\n{text}\n```"


def _docstring(described: Any) -> str:
    """Turn a docstring with Google's sections into Markdown."""
    text = inspect.cleandoc(described.__doc__ or "")
    pieces = re.split(r"^(Args|Attributes|Returns|Raises|Yields):\n", text, flags=re.MULTILINE)
    parts = [pieces[0].strip()]
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        section, _, rest = body.partition("\n\n")
        if title in ("Returns", "Yields"):
            parts.append(f"**{title}:** {' '.join(section.split())}")
        else:
            parts += [f"**{title}:**", _entries(section)]
        parts.append(inspect.cleandoc(rest))
    return "\n\n".join(part for part in parts if part)


def _entries(section: str) -> str:
    entries: list[str] = []
    for line in inspect.cleandoc(section).splitlines():
        if match := re.match(r"([\w, .]+): (.*)", line):
            names = ", ".join(f"`{name.strip()}`" for name in match[1].split(","))
            entries.append(f"- {names}: {match[2]}")
        elif entries:
            entries[-1] += f" {line.strip()}"
        else:
            entries.append(line)
    return "\n".join(entries)


def harvester_commands() -> str:
    """Return the commands of `harvester`, with their options."""
    return _commands("harvester", typer.main.get_command(main.app))


def trainer_commands() -> str:
    """Return the commands of `trainer`, with their options."""
    return _commands("trainer", typer.main.get_command(cli.app))


def _commands(program: str, app: click.Command) -> str:
    variable = "RUN_MAX_USD=5" if program == "harvester" else "TRAIN_PROCESSES=2"
    parts = [
        f"# {program}: commands",
        " ".join((app.help or "").split()),
        f"An option can also be set by a variable named after program, command and option, as in `{program.upper()}_"
        f"{variable}`. A flag wins.",
    ]
    for path, command in _walk((program,), app):
        title = " ".join(path)
        parts.append(f"## {title}")
        if path == ("harvester", "mock-teacher"):
            text = mock_parser("harvester mock-teacher").format_help()
            parts += [" ".join((command.help or "").split()), f"```text\n{text}```"]
            continue
        context = click.Context(command, info_name=title)
        usage = re.sub(r"\{([A-Z_]+)\}", r"\1", command.get_usage(context).removeprefix("Usage: "))
        help_text = inspect.cleandoc(command.help or "").replace("\\[", "[").replace("\b\n", "")
        body, _, example = help_text.partition("Example: ")
        example = example or (command.epilog or "").removeprefix("Example: ")
        parts += [body.strip(), f"```text\n{usage}\n```"]
        parts.append(_parameter_table(command))
        if example.strip():
            parts.append(f"Example:\n\n```text\n{example.strip()}\n```")
    return "\n\n".join(part for part in parts if part) + "\n"


def _walk(path: tuple[str, ...], command: click.Command) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    inner = getattr(command, "commands", None)
    if inner is None:
        yield path, command
        return
    for name, each in inner.items():
        yield from _walk((*path, name), each)


def _parameter_table(command: click.Command) -> str:
    lines = ["| argument or option | meaning |", "|---|---|"]
    for parameter in command.params:
        if isinstance(parameter, click.Argument) or parameter.param_type_name == "argument":
            shown = f"`{parameter.metavar or (parameter.name or '').upper()}`"
            text = getattr(parameter, "help", "")
        else:
            names = ", ".join(f"`{name}`" for name in (*parameter.opts, *parameter.secondary_opts))
            shown, text = names, getattr(parameter, "help", "")
            default = parameter.default
            if default not in (None, False, [], ()) and not callable(default):
                text = f"{text or ''} (default: `{getattr(default, 'value', default)}`)"
        lines.append(f"| {shown} | {_cell((text or '–').replace(chr(92) + '[', '['))} |")
    return "\n".join(lines) if len(lines) > 2 else ""


# Page -> what writes it. The names of pages have the place of this file's folder.
PAGES: dict[str, Callable[[], str]] = {
    "reference/harvest-toml.md": harvest_toml,
    "reference/exit-codes.md": exit_codes,
    "reference/errors.md": error_codes,
    "reference/columns.md": columns,
    "reference/presets.md": presets,
    "reference/terms-records.md": terms_records,
    "reference/python.md": python_api,
    "reference/harvester-commands.md": harvester_commands,
    "reference/trainer-commands.md": trainer_commands,
}


def write_all() -> dict[str, str]:
    """Return every generated page by its name."""
    return {name: make() for name, make in PAGES.items()}
