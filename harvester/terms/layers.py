"""The layers between a question and its answer, and the worst of them: records that speak of one teacher.

Weights, the service that hosts them, a router that forwards. A layer nobody recorded is unknown. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

from harvester.system.hosts import LOOPBACK, plain_host, printable
from harvester.terms.obligations import is_of_line
from harvester.terms.records import SEVERITY, Registry, TermsRecord


def speaking(
    registry: Registry, host: str, model: str, declared: str, *, harvesting: bool
) -> tuple[list[TermsRecord], list[str]]:
    """Records that speak of this teacher, and what is missing or misdeclared."""
    found: dict[str, TermsRecord] = {}
    reasons: list[str] = []
    shown = printable(model)
    matching = [r for r in registry.records.values() if not r.mock and r.speaks_of_model(model)]
    current = [r for r in matching if not r.superseded_by]
    is_routed = any(r.layer == "router" and r.speaks_of_host(host) for r in matching)
    for name in filter(None, (part.strip() for part in declared.split(","))):
        record = registry.find(name)
        if record is None:
            reasons.append(f"there is no terms record {name!r}")
        elif not record.speaks_of_model(model) or not (
            record.speaks_of_host(host) or (is_routed and record.provider)
        ):
            spoken = f"{', '.join(record.model)} at {', '.join(record.host)}"
            reasons.append(f"record {name!r} speaks of {spoken}, not of {shown} at {host}")
        else:
            found[name] = record
            if record.superseded_by and harvesting:
                reasons.append(f"record {name!r} was superseded by {record.superseded_by!r}")
    # What matches counts whether or not it was declared: leaving a layer unsaid never improves a verdict.
    told = {r.layer for r in found.values()} if not harvesting else set()
    found.update({r.id: r for r in current if r.speaks_of_host(host) and r.layer not in told})
    return list(found.values()), reasons + _missing(list(found.values()), declared, host, model)


def _missing(found: Sequence[TermsRecord], declared: str, host: str, model: str) -> list[str]:
    if any(r.mock and not r.strange_in(model) for r in found):
        return []
    names = {part.strip() for part in declared.split(",")}
    shown = printable(model)
    services = [r for r in found if r.layer == "service"]
    is_routed = any(r.layer == "router" for r in found)
    is_here = plain_host(host) in LOOPBACK
    # Who runs a server on this machine made no model by that: its weights are asked for all the same.
    covered = not is_routed and not is_here and any(r.covers_weights for r in services)
    reasons = []
    declared_weights = [r for r in found if r.layer == "weights" and r.id in names]
    if not covered and not declared_weights:
        where = "on this machine" if is_here else f"at {host}"
        reasons.append(f"no terms record is declared for the weights of {shown} {where}")
    elif not covered and all(r.opens_training and r.strange_in(model) for r in declared_weights):
        words = ", ".join(declared_weights[0].strange_in(model))
        reasons.append(
            f"{model!r} may be a derivative: record {declared_weights[0].id!r} does not explain {words!r}; "
            "derivatives carry terms of their own, to be recorded under their own name"
        )
    if not is_here and not services:
        what = f"the service behind {host}: declare its record too" if is_routed else f"the service at {host}"
        reasons.append(f"no terms record speaks for {what}")
    return reasons


def worst(
    found: Sequence[TermsRecord], sealing: bool, today: date, student_base: str, reasons: list[str]
) -> tuple[str, bool]:
    """Status of the worst layer, and whether every restricting layer leaves evaluation open."""
    lowest = SEVERITY.index("unknown") if reasons else 0
    evaluation = True
    for record in found:
        level = SEVERITY.index(record.verdict)
        if record.verdict == "restrict" and is_of_line(student_base, record.student_line):
            level = SEVERITY.index("duties")
        if not sealing and not record.in_force(today):  # sealing moves rows that were paid for under it
            reasons.append(_outdated(record, today))
            level = SEVERITY.index("unknown")
        if level >= SEVERITY.index("restrict"):
            reasons.append(record.cited())
            evaluation = evaluation and record.evaluation
        lowest = max(lowest, level)
    return SEVERITY[lowest], evaluation


def _outdated(record: TermsRecord, today: date) -> str:
    why = f"due for review on {record.good_until}"
    if record.changed:
        why = f"changed on {record.changed}"
    elif record.seen > today:
        why = f"this machine's clock says {today}"
    return f"{record.id}: its reading of {record.seen} is no longer good ({why}); {record.url}"


def wire_fields(found: Sequence[TermsRecord]) -> dict[str, Any]:
    """What the request body has to carry: behind a router, distillable models of the declared hosts only."""
    if not any(r.layer == "router" for r in found):
        return {}
    providers = [r.provider for r in found if r.provider]
    return {"provider": {"enforce_distillable_text": True, "allow_fallbacks": False, "only": providers}}
