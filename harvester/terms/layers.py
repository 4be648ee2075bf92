"""Find the terms records that apply to a teacher, and the most restrictive of them.

There are three layers: the weights, the service that hosts them, and a router that forwards requests. A layer
without a record is unknown. No I/O.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from datetime import date
from typing import Any

from harvester.system.hosts import LOOPBACK, plain_host, printable
from harvester.terms.obligations import is_of_line
from harvester.terms.records import SEVERITY, Registry, TermsRecord


def applying_records(
    registry: Registry, host: str, model: str, declared: str, *, harvesting: bool
) -> tuple[list[TermsRecord], list[str]]:
    """Return the records that apply to this teacher, and reasons for what is missing or wrongly declared.

    Args:
        declared: ids of records, comma-separated.
        harvesting: a superseded record may no longer be declared; rows kept from before may name it.
    """
    records: dict[str, TermsRecord] = {}
    reasons: list[str] = []
    shown = printable(model)
    matching = [r for r in registry.records.values() if not r.mock and r.applies_to_model(model)]
    current = [r for r in matching if not r.superseded_by]
    is_routed = any(r.layer == "router" and r.applies_to_host(host) for r in matching)
    for name in filter(None, (part.strip() for part in declared.split(","))):
        record = registry.find(name)
        if record is None:
            near = difflib.get_close_matches(name, registry.records, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            reasons.append(f"there is no terms record {name!r}{hint}")
        elif not record.applies_to_model(model) or not (
            record.applies_to_host(host) or (is_routed and record.provider)
        ):
            scope = f"{', '.join(record.model)} at {', '.join(record.host)}"
            reasons.append(f"record {name!r} applies to {scope}, not to {shown} at {host}")
        else:
            records[name] = record
            if record.superseded_by and harvesting:
                reasons.append(f"record {name!r} was superseded by {record.superseded_by!r}")
    # What matches counts whether or not it was declared: omitting a layer never improves a verdict.
    declared_layers = {record.layer for record in records.values()} if not harvesting else set()
    records.update({r.id: r for r in current if r.applies_to_host(host) and r.layer not in declared_layers})
    known = [
        record.id for record in current if record.layer == "weights" and not record.unexplained_words(model)
    ]
    return list(records.values()), reasons + _missing(list(records.values()), declared, host, model, known)


def _missing(
    records: Sequence[TermsRecord], declared: str, host: str, model: str, known: Sequence[str]
) -> list[str]:
    """Say which layers lack a record. `known` are ids of records of the weights that could be declared."""
    if any(r.mock and not r.unexplained_words(model) for r in records):
        return []
    names = {part.strip() for part in declared.split(",")}
    shown = printable(model)
    services = [r for r in records if r.layer == "service"]
    is_routed = any(r.layer == "router" for r in records)
    is_here = plain_host(host) in LOOPBACK
    # A server on this machine says nothing about the model it runs: its weights need a record all the same.
    covered = not is_routed and not is_here and any(r.covers_weights for r in services)
    reasons = []
    declared_weights = [r for r in records if r.layer == "weights" and r.id in names]
    if not covered and not declared_weights:
        where = "on this machine" if is_here else f"at {host}"
        way = (
            f"`[teacher] terms = {known[0]!r}` declares it"
            if known
            else "none is known; `harvester terms new` writes one"
        )
        reasons.append(f"no terms record is declared for the weights of {shown} {where} ({way})")
    elif not covered and all(r.opens_training and r.unexplained_words(model) for r in declared_weights):
        words = ", ".join(declared_weights[0].unexplained_words(model))
        reasons.append(
            f"{model!r} may be a derivative: record {declared_weights[0].id!r} does not explain {words!r}; "
            "a derivative has terms of its own, to be recorded under its own name"
        )
    if not is_here and not services:
        what = f"the service behind {host}: declare its record too" if is_routed else f"the service at {host}"
        way = "" if is_routed else ": your own server needs one of layer `service` (`harvester terms new`)"
        reasons.append(f"no terms record applies to {what}{way}")
    return reasons


def worst(
    records: Sequence[TermsRecord], sealing: bool, today: date, student_base: str, reasons: list[str]
) -> tuple[str, bool]:
    """Return the status of the worst layer, and whether every restricting layer permits evaluation.

    Args:
        sealing: ignore expiry, because sealing only moves rows that were paid for under the terms.
        reasons: the reasons so far; any makes the status unknown, and further ones are appended.
    """
    worst_level = SEVERITY.index("unknown") if reasons else 0
    evaluation = True
    for record in records:
        level = SEVERITY.index(record.verdict)
        if record.verdict == "restrict" and is_of_line(student_base, record.student_line):
            level = SEVERITY.index("duties")
        if not sealing and not record.in_force(today):
            reasons.append(_outdated(record, today))
            level = SEVERITY.index("unknown")
        if level >= SEVERITY.index("restrict"):
            reasons.append(record.citation())
            evaluation = evaluation and record.evaluation
        worst_level = max(worst_level, level)
    return SEVERITY[worst_level], evaluation


def _outdated(record: TermsRecord, today: date) -> str:
    why = f"due for review on {record.good_until}"
    if record.changed:
        why = f"changed on {record.changed}"
    elif record.seen > today:
        why = f"this machine's clock says {today}"
    return f"{record.id}: its reading of {record.seen} no longer counts ({why}); {record.url}"


def body_fields(records: Sequence[TermsRecord]) -> dict[str, Any]:
    """Return fields for the request body: behind a router, only distillable models of the declared hosts."""
    if not any(r.layer == "router" for r in records):
        return {}
    providers = [r.provider for r in records if r.provider]
    return {"provider": {"enforce_distillable_text": True, "allow_fallbacks": False, "only": providers}}
