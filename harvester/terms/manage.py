"""List, show, check and review terms records, and record permissions. Returns text, prints nothing."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from harvester.errors import ConfigError, TermsRefused
from harvester.system.command_line.text_table import aligned
from harvester.terms.gate import Verdict
from harvester.terms.permissions import (
    BASES,
    PERMISSION_ID,
    USES,
    Permission,
    record_permission,
    require_person,
    toml_value,
)
from harvester.terms.records import GRACE, LAYERS, SEVERITY, Registry, TermsRecord, load_registry, parse

DISCLAIMER = "A reading of published texts, not legal advice; the operator decides."
REVIEW_EVERY = timedelta(days=182)


def state(record: TermsRecord, today: date) -> str:
    """Return a record's state: good, due (for review), expired, changed or superseded."""
    if record.superseded_by:
        return "superseded"
    if record.changed is not None:
        return "changed"
    if today > record.good_until + GRACE or (record.seen > today and not record.mock):
        return "expired"
    return "due" if record.is_stale(today) else "good"


def listed(registry: Registry, today: date, *, only_due: bool = False) -> list[dict[str, str]]:
    """Return one row for each record, by layer and id: verdict, established, days and state."""
    records = sorted(registry.records.values(), key=lambda r: (r.layer, r.id))
    rows = [
        {
            "id": r.id,
            "layer": r.layer,
            "verdict": r.verdict,
            "established": r.established,
            "seen": r.seen.isoformat(),
            "review_after": r.review_after.isoformat(),
            "state": state(r, today),
        }
        for r in records
    ]
    return [row for row in rows if not only_due or row["state"] not in {"good", "superseded"}]


def table(rows: Sequence[dict[str, str]]) -> list[str]:
    """Format rows as columns of 80 characters in all, with a header line and the disclaimer.

    The day on which the terms were seen makes way for the state of a record that is not good.
    """
    if not rows:
        return ["no records", DISCLAIMER]
    names = ("id", "layer", "verdict", "established")
    lines = [
        (*(row[name] for name in names), row["seen"] if row["state"] == "good" else row["state"])
        for row in rows
    ]
    columns = aligned([(*names, "seen"), *lines], left=range(len(names) + 1))
    return [*columns, "", DISCLAIMER]


def shown(registry: Registry, record_id: str, today: date) -> list[str]:
    """Format every field of a record.

    Raises:
        ConfigError: there is no record of that id; names similar ones.
    """
    record = find_record(registry, record_id)
    lines = [f"{record.id}: {record.verdict} ({state(record, today)})"]
    for field in fields(record):
        value = getattr(record, field.name)
        if field.name not in {"id", "verdict"} and value not in ("", (), None, False):
            text = ", ".join(value) if isinstance(value, tuple) else str(value)
            lines.append(f"  {field.name.ljust(14)} {text}")
    if record.established != "primary":
        lines.append("  This is a second-hand reading: read the text itself before you rely on it.")
    return [*lines, "", DISCLAIMER]


def record_json(record: TermsRecord, today: date) -> dict[str, Any]:
    """Return a record as JSON values: every field, and its state on that day."""
    values = {field.name: getattr(record, field.name) for field in fields(record)}
    return {**values, "state": state(record, today), "disclaimer": DISCLAIMER}


def find_record(registry: Registry, record_id: str) -> TermsRecord:
    """Return the record of that id.

    Raises:
        ConfigError: there is none; names similar ones.
    """
    record = registry.find(record_id)
    if record is None:
        near = sorted(name for name in registry.records if record_id and record_id.split("-")[0] in name)
        known = ", ".join(near) or "`harvester terms list` names all"
        raise ConfigError(f"no terms record {record_id!r}", place="terms", remedy=known)
    return record


def checked(verdict: Verdict) -> list[str]:
    """Format a verdict: the answer, duties, conditions, request fields, warnings, reasons."""
    lines = [verdict.summary()]
    lines += [f"  duty       {duty}" for duty in verdict.duties]
    lines += [f"  condition  {condition}" for condition in verdict.conditions]
    lines += [f"  request    {name} = {value}" for name, value in verdict.body.items()]
    lines += [
        f"  warning    {warning}; `harvester terms review` after reading" for warning in verdict.warnings
    ]
    lines += [f"  because    {reason}" for reason in verdict.reasons]
    return [*lines, "", DISCLAIMER]


def as_json(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as JSON values."""
    return {field.name: getattr(verdict, field.name) for field in fields(verdict)}


def reviewed(
    record: TermsRecord, outcome: Literal["unchanged", "changed"], today: date, *, isatty: bool
) -> TermsRecord:
    """Return the record after a person read the text again: good for half a year, or changed and so unknown.

    Raises:
        TermsRefused: there is no terminal; a script has read nothing.
    """
    if not isatty:
        raise TermsRefused(
            "a review is recorded by a person who read the text",
            place=record.id,
            remedy=f"read {record.url}, then run `harvester terms review {record.id}` at a terminal",
        )
    if outcome == "changed":
        return replace(record, changed=today)
    return replace(record, seen=today, review_after=today + REVIEW_EVERY, changed=None)


def record_toml(record: TermsRecord) -> str:
    """Return a record as TOML that parses back to an equal record."""
    lines = ["[[record]]"]
    for field in fields(record):
        value = getattr(record, field.name)
        if value not in ("", (), None, False):
            lines.append(f"{field.name} = {toml_value(value)}")
    return "\n".join(lines) + "\n"


def write_review(folder: Path, record: TermsRecord) -> Path:
    """Write a reviewed record to `folder/<id>.toml`, replacing an earlier review of it.

    Raises:
        ConfigError: the file holds other records.
    """
    path = folder / f"{record.id}.toml"
    if path.exists() and [r.id for r in parse(path.read_text(encoding="utf-8"), str(path))] != [record.id]:
        raise ConfigError(
            "holds other records, which a review would replace",
            place=str(path),
            remedy="move them to another file",
        )
    folder.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(f"# {DISCLAIMER}\n{record_toml(record)}", encoding="utf-8")
    aside.replace(path)
    return path


QUESTIONS = (
    ("id", "short name of this permission (small letters, digits, dashes)"),
    ("granted_by", "who granted it"),
    ("basis", f"on what basis ({', '.join(BASES)})"),
    ("scope", "what exactly was granted, in your words"),
    ("host", "host it is about (exact name)"),
    ("model", "model it is about (a pattern; * only if all are named)"),
    ("uses", f"uses, comma-separated ({', '.join(USES)})"),
    ("evidence", "where the signed text can be found"),
    ("granted_on", "granted on (YYYY-MM-DD)"),
    ("expires", "expires on (YYYY-MM-DD, empty: until withdrawn)"),
    ("recorded_by", "your name"),
)


def ask_permission(folder: Path, ask: Callable[[str], str], *, isatty: bool) -> Path:
    """Ask a person for the values of a permission and write it.

    Args:
        ask: shows a question and returns the answer.

    Raises:
        TermsRefused: there is no terminal; nothing is asked.
        ConfigError: an answer is not valid.
    """
    require_person(folder, isatty=isatty)
    answers: dict[str, Any] = {name: ask(question).strip() for name, question in QUESTIONS}
    answers["uses"] = tuple(each.strip() for each in answers["uses"].split(",") if each.strip()) or USES
    for name in ("granted_on", "expires"):
        try:
            answers[name] = (
                date.fromisoformat(answers[name]) if answers[name] or name == "granted_on" else None
            )
        except ValueError:
            raise ConfigError(
                f"{name}: {answers[name]!r} is not a day such as 2026-11-24",
                place="permission",
                remedy="answer again: `harvester terms record`",
            ) from None
    permission = Permission(**answers, recorded_on=datetime.now(UTC).date())
    return record_permission(folder, permission, isatty=isatty)


# Licences that say nothing about outputs and permit every use of the model.
OPEN_LICENCES = frozenset(
    {"Apache-2.0", "MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "CC0-1.0", "Unlicense"}
)

# Remedy of an answer that is not valid.
_NEW_AGAIN = "answer again: `harvester terms new`"

RECORD_QUESTIONS = (
    ("layer", f"what it is about: weights of a model, or a service that you run ({', '.join(LAYERS[:2])})"),
    ("model", "model names it covers, as patterns with commas (mymodel-7b*); * only for a service"),
    ("host", "host it covers (* for weights; the exact name for a service)"),
    ("licence", "licence, as an SPDX id where there is one (Apache-2.0, MIT, LicenseRef-...)"),
    ("url", "address of the licence's text"),
    ("read", "did you read that text yourself today? (yes or no)"),
    ("verdict", f"what it says of training on outputs ({', '.join(SEVERITY)})"),
    ("gist", "the clause in your words"),
    ("source", "what you read"),
    ("id", "a short name for the record (small letters, digits, dots, dashes)"),
)


# Answers out of a list, days, and what may be left empty; by the name of the question.
_CHOICES = {"layer": LAYERS[:2], "verdict": tuple(SEVERITY), "basis": BASES, "read": ("y", "yes", "n", "no")}
_DAYS = frozenset({"granted_on", "expires"})
_MAY_BE_EMPTY = frozenset({"host of a record", "uses", "expires"})
_RECORD_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")
_NAMES = {
    **{question: name for name, question in QUESTIONS},
    **{question: f"{name} of a record" for name, question in RECORD_QUESTIONS},
}


def problem_of(question: str, answer: str) -> str:
    """Return what is wrong with an answer by itself, so that the question can be asked again; "" for nothing.

    Args:
        question: as `ask_permission` and `ask_record` ask it.
    """
    full, answer = _NAMES[question], answer.strip()
    name = full.removesuffix(" of a record")
    if not answer:
        return "" if full in _MAY_BE_EMPTY else "an answer is needed"
    given = answer.lower() if name == "read" else answer
    if name in _CHOICES and given not in _CHOICES[name]:
        return f"{answer!r} is none of {', '.join(_CHOICES[name])}"
    if name == "uses" and (wrong := {each.strip() for each in answer.split(",")} - set(USES)):
        return f"{min(wrong)!r} is none of {', '.join(USES)}"
    if name == "id" and not (PERMISSION_ID if full == name else _RECORD_ID).fullmatch(answer):
        return f"{answer!r} is not a name of small letters, digits, dots and dashes"
    if full == "host" and any(sign in answer for sign in "*?["):
        return f"{answer!r} is a pattern, and one exact name is needed"
    if name in _DAYS:
        try:
            date.fromisoformat(answer)
        except ValueError:
            return f"{answer!r} is not a day such as 2026-11-24"
    return ""


def ask_record(
    folder: Path, ask: Callable[[str], str], *, isatty: bool, today: date | None = None
) -> tuple[Path, TermsRecord]:
    """Ask a person for the values of a terms record, write it to `folder/<id>.toml`, and return both.

    Args:
        ask: shows a question and returns the answer.
        today: the day of the reading; None for this one.

    Raises:
        TermsRefused: there is no terminal, or the record permits more than a shipped one of the same id.
        ConfigError: an answer is not valid, or the file exists.
    """
    if not isatty:
        raise TermsRefused(
            "a terms record is written by a person who knows the licence",
            place=str(folder),
            remedy="run `harvester terms new` at a terminal; data/terms/README.md describes the file",
        )
    answers = {name: ask(question).strip() for name, question in RECORD_QUESTIONS}
    is_read = answers.pop("read").lower() in {"y", "yes"}
    day = today or datetime.now(UTC).date()
    if answers["verdict"] == "permit" and not is_read and answers["licence"] not in OPEN_LICENCES:
        raise ConfigError(
            f"{answers['licence']!r} is no licence that is known to permit this: read its text first",
            place="licence",
            remedy=f"known are {', '.join(sorted(OPEN_LICENCES))}; or answer unknown, which stays closed",
        )
    patterns = [pattern.strip() for pattern in answers["model"].split(",") if pattern.strip()]
    text = "[[record]]\n" + "".join(
        f"{name} = {toml_value(value)}\n"
        for name, value in {
            **answers,
            "model": tuple(patterns),
            "host": answers["host"] or "*",
            "established": "primary" if is_read else "general",
            "seen": day,
            "review_after": day + REVIEW_EVERY,
        }.items()
    )
    path = folder / f"{answers['id']}.toml"
    try:
        (record,) = parse(text, "the answers")
    except ConfigError as error:
        raise ConfigError(error.message, place=error.place, remedy=_NEW_AGAIN) from None
    if not _RECORD_ID.fullmatch(record.id):
        raise ConfigError(
            f"{record.id!r} is not a name of small letters, digits, dots and dashes",
            place="id",
            remedy=_NEW_AGAIN,
        )
    if record.layer == "service" and any(sign in record.host[0] for sign in "*?["):
        raise ConfigError("a service has an exact host name, no pattern", place="host", remedy=_NEW_AGAIN)
    if path.exists() or load_registry(folder).find(record.id) is not None:
        raise ConfigError("there is a record of that id", place=str(path), remedy="give it an id of its own")
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(f"# {DISCLAIMER}\n{text}", encoding="utf-8")
    return path, record
