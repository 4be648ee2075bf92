"""The layers between a question and its answer, and the worst of them: records that speak of one teacher.

Weights, the service that hosts them, a router that forwards. A layer nobody recorded is unknown. Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

from harvester.duties import is_of_line
from harvester.registry import LOOPBACK, SEVERITY, Registry, TermsRecord


def speaking(
    registry: Registry, host: str, model: str, declared: str, *, harvesting: bool
) -> tuple[list[TermsRecord], list[str]]:
    """Records that speak of this teacher, and what is missing or misdeclared."""
    found: dict[str, TermsRecord] = {}
    reasons: list[str] = []
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
            reasons.append(f"record {name!r} speaks of {spoken}, not of {model} at {host}")
        else:
            found[name] = record
            if record.superseded_by and harvesting:
                reasons.append(f"record {name!r} was superseded by {record.superseded_by!r}")
    # What matches counts whether or not it was declared: leaving a layer unsaid never improves a verdict.
    told = {r.layer for r in found.values()} if not harvesting else set()
    found.update({r.id: r for r in current if r.speaks_of_host(host) and r.layer not in told})
    return list(found.values()), reasons + _missing(list(found.values()), declared, host, model)


def _missing(found: Sequence[TermsRecord], declared: str, host: str, model: str) -> list[str]:
    if any(r.mock for r in found):
        return []
    names = {part.strip() for part in declared.split(",")}
    services = [r for r in found if r.layer == "service"]
    is_routed = any(r.layer == "router" for r in found)
    covered = not is_routed and any(r.covers_weights for r in services)
    reasons = []
    if not covered and not any(r.layer == "weights" and r.id in names for r in found):
        where = "on this machine" if host in LOOPBACK else f"at {host}"
        reasons.append(f"no terms record is declared for the weights of {model} {where}")
    if host not in LOOPBACK and not services:
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
            reasons.append(_outdated(record))
            level = SEVERITY.index("unknown")
        if level >= SEVERITY.index("restrict"):
            reasons.append(record.cited())
            evaluation = evaluation and record.evaluation
        lowest = max(lowest, level)
    return SEVERITY[lowest], evaluation


def _outdated(record: TermsRecord) -> str:
    due = f"due for review on {record.review_after}"
    why = f"changed on {record.changed}" if record.changed else due
    return f"{record.id}: its reading of {record.seen} is no longer good ({why}); {record.url}"


def wire_fields(found: Sequence[TermsRecord]) -> dict[str, Any]:
    """What the request body has to carry: behind a router, distillable models of the declared hosts only."""
    if not any(r.layer == "router" for r in found):
        return {}
    providers = [r.provider for r in found if r.provider]
    return {"provider": {"enforce_distillable_text": True, "allow_fallbacks": False, "only": providers}}
