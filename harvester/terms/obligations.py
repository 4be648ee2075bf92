"""Check the duties that teachers' terms impose on a student. No I/O.

A duty is one string, `kind` or `kind:value`, stored in the lineage of every row:

    same_line:LINE        the student's base must belong to that line of models
    name_prefix:WORD      the student's name must begin with the word
    card_licence:ID       the student's licence must be that one
    noncommercial         the student's licence must forbid commercial use
    display:SENTENCE      the card must show the sentence
    notice:SENTENCE       the NOTICE file must carry the sentence
    pass_terms:URL        the terms at that address are passed on with the student

The first four are checked here; the last three are met by the documents, which print them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from harvester.errors import ConfigError

# Lines of models whose licence lets outputs improve only the same line, by a pattern of the base's name.
# Llama 3.1 and later are other lines under another licence.
LINES = {
    "llama-2": re.compile(r"(?:^|[/_-])(?:code-?)?llama-?2-(?:7b|13b|70b)(?![0-9])"),
    "llama-3": re.compile(r"(?:^|[/_-])llama-?3-(?:8b|70b)(?![0-9])"),
}

_VALUED = {"same_line", "name_prefix", "card_licence", "display", "notice", "pass_terms"}
_BARE = {"noncommercial"}
_NONCOMMERCIAL = re.compile(r"(^cc-by-nc(-|$))|non-?commercial|-nc(-|$)|research")


@dataclass(frozen=True, slots=True, kw_only=True)
class DerivedModel:
    """The facts that duties are checked against: base model, name and licence (None: what duties force)."""

    base: str
    name: str
    licence: str | None = None


def require_known(duty: str, place: str) -> None:
    """Do nothing when this version can check the duty.

    Raises:
        ConfigError: it can't; ignoring the duty would break the terms.
    """
    kind, _, value = duty.partition(":")
    if kind in _BARE and not value:
        return
    if kind not in _VALUED or not value or (kind == "same_line" and value not in LINES):
        known = ", ".join(sorted(_BARE | _VALUED))
        raise ConfigError(f"unknown duty {duty!r}", place=place, remedy=f"known kinds: {known}")


def is_of_line(base: str, line: str) -> bool:
    """Return whether a base model's name belongs to a line of `LINES`; an unknown line has no members."""
    pattern = LINES.get(line)
    return pattern is not None and pattern.search(base.lower()) is not None


def unmet(duties: Sequence[str], student: DerivedModel) -> list[str]:
    """Return one sentence for each duty that this student does not meet; an unknown duty is never met."""
    return [reason for duty in duties if (reason := _reason_unmet(duty, student))]


def _reason_unmet(duty: str, student: DerivedModel) -> str:
    try:
        require_known(duty, "lineage")
    except ConfigError as error:
        return error.message
    kind, _, value = duty.partition(":")
    licence = (student.licence or "").lower()
    if kind == "same_line" and not is_of_line(student.base, value):
        return f"answers may only improve models of the line {value}; the base {student.base!r} is not one"
    if kind == "name_prefix" and not student.name.rsplit("/", 1)[-1].startswith(value):
        return f"the student's name must begin with {value!r}; {student.name!r} does not"
    if kind == "card_licence" and licence not in {"", value.lower()}:
        return f"the student's licence must be {value!r}, not {student.licence!r}"
    if kind == "noncommercial" and licence and not _NONCOMMERCIAL.search(licence):
        return f"answers are for non-commercial use; licence {student.licence!r} permits more"
    return ""


def duties_of_kind(duties: Sequence[str], kind: str) -> list[str]:
    """Return the values of the duties of one kind, in order, each once."""
    values = [duty.partition(":")[2] for duty in duties if duty.partition(":")[0] == kind]
    return list(dict.fromkeys(values))


def licence_of(duties: Sequence[str], preferred: str | None = None) -> str:
    """Return the licence id for a card: the operator's choice, else what the duties force.

    Two licences that must both be carried give "other"; the NOTICE names them.
    """
    if preferred:
        return preferred
    forced = duties_of_kind(duties, "card_licence")
    if len(forced) > 1 or (forced and "noncommercial" in duties):
        return "other"
    if forced:
        return forced[0]
    return "cc-by-nc-4.0" if "noncommercial" in duties else "other"
