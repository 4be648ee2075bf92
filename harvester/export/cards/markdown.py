"""Write the parts that Markdown cards of data sets and models share, with the Hub's YAML header.

Header keys: huggingface/hub-docs, datasetcard.md and modelcard.md. Values are JSON strings, which are valid
YAML.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from harvester.export.cards.facts import SPDX, DatasetFacts

NOT_LEGAL_ADVICE = "This is a reading of published terms on the days named, not legal advice."


def document(header: Mapping[str, object], body: Sequence[str]) -> str:
    """Return a card's text: the YAML header, then the lines of the body."""
    lines = ["---"]
    for key, value in header.items():
        if isinstance(value, list):
            lines += [f"{key}:", *[f"- {_quoted(item)}" for item in value]]
        else:
            lines.append(f"{key}: {_quoted(value)}")
    return "\n".join([*lines, "---", *body]).rstrip() + "\n"


def licence_keys(licence: str, dataset: DatasetFacts) -> dict[str, str]:
    """Return the licence keys of a header; for "other", a name and the link to the NOTICE too.

    If all terms records name one licence that the Hub knows, that is its id: the Hub refuses such an id as
    the name of another licence.
    """
    if licence != "other":
        return {"license": licence}
    known = {record.licence.lower() for record in dataset.records}
    if len(known) == 1 and (only := next(iter(known))) in SPDX and not dataset.duties:
        return {"license": only}
    names = "-and-".join(slug(record.licence.removeprefix("LicenseRef-")) for record in dataset.records[:3])
    return {"license": "other", "license_name": names or "teacher-terms", "license_link": "NOTICE"}


def mock_warning(dataset: DatasetFacts) -> list[str]:
    """Return the warning that answers are the mock teacher's; nothing where none is."""
    warning = "**Answers of the mock teacher: of no use outside tests.**"
    return [warning, ""] if dataset.is_mock else []


def teachers_section(dataset: DatasetFacts) -> list[str]:
    """Return the section on teachers, hosts, terms records and permissions."""
    lines = ["## Who taught", "", "| model | host |", "|---|---|"]
    lines += [f"| {cell(model)} | {cell(host)} |" for model, host in dataset.teachers]
    lines += ["", "Terms as read:", ""]
    for record in dataset.records:
        second_hand = "" if record.established == "primary" else "; a second-hand reading"
        lines.append(
            f"- `{cell(record.id)}` ({record.verdict}): {cell(record.gist)}. {cell(record.url)}, "
            f"seen {record.seen}{second_hand}"
        )
    permissions = dict.fromkeys(lineage.permission_sha256 for lineage in dataset.lineages)
    lines += [f"- recorded permission, SHA-256 `{cell(sha256)}`" for sha256 in permissions if sha256]
    return [*lines, "", NOT_LEGAL_ADVICE, ""]


def duties_section(dataset: DatasetFacts) -> list[str]:
    """Return the section on the duties that the terms impose; nothing where there are none."""
    if not dataset.duties:
        return []
    return ["## What is owed", "", *[f"- {cell(duty.replace(':', ': ', 1))}" for duty in dataset.duties], ""]


def curation_section(dataset: DatasetFacts) -> list[str]:
    """Return the section on how rows were chosen; nothing where it is not known."""
    if not dataset.curation:
        return []
    return ["## Curation", "", *[f"- {cell(line)}" for line in dataset.curation], ""]


def slug(text: str) -> str:
    """Return lower-case letters, digits, dots and dashes, the form the Hub requires of a `license_name`."""
    return re.sub(r"[^a-z0-9.-]+", "-", text.lower()).strip("-.") or "unnamed"


def cell(text: str) -> str:
    """Escape text so that it can't break out of a line or a table cell of Markdown."""
    return " ".join(text.split()).replace("|", "\\|").replace("`", "'").replace("<", "&lt;")


def _quoted(value: object) -> str:
    # JSON writes a character beyond the first plane as two escapes, which YAML reads as two characters.
    text = json.dumps(str(value), ensure_ascii=False)
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in text)
