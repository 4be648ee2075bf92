"""The gate: what recorded terms permit. Closed by default, without an override.

A record says what one layer (the weights, the service that hosts them, a router in between) allows; the
verdict is the worst of all layers that apply. Unknown, expired, changed or absent means no. Pure: records,
permissions and the day are passed in. A reading of published texts, not legal advice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any, Literal

from harvester.errors import TermsRefused
from harvester.system.hosts import host_of
from harvester.terms import layers
from harvester.terms.lineage import Fact, Lineage, disagreements, other_models
from harvester.terms.obligations import DerivedModel, unpaid
from harvester.terms.permissions import Permission, load_permissions
from harvester.terms.records import SEVERITY, Registry, TermsRecord, load_registry

__all__ = [
    "Permission",
    "Purpose",
    "Registry",
    "TermsRecord",
    "Use",
    "Verdict",
    "allows",
    "allows_training",
    "load_permissions",
    "load_registry",
]

Use = Literal["harvest", "seal", "train", "export"]
Purpose = Literal["train", "eval"]
FREE = frozenset({"permit", "duties"})
REMEDIES = (
    "choose a permitted teacher (`harvester terms list`), or record a permission you hold "
    '(`harvester terms record`), or collect for evaluation only ([run] purpose = "eval") where allowed'
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The gate's answer, with everything a refusal has to say.

    Attributes:
        status: worst of the layers: permit, duties, restrict or unknown, before any permission.
        reasons: why not, or nothing.
        body: fields the wire body has to carry (a router's), merged over the request's own.
        conditions: thresholds the operator has to judge. warnings: readings due for a review.
    """

    permitted: bool
    status: str
    record_ids: tuple[str, ...]
    duties: tuple[str, ...]
    reasons: tuple[str, ...]
    mock: bool = False
    permission_sha256: str = ""
    body: Mapping[str, Any] = field(default_factory=dict)
    conditions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    def summary(self) -> str:
        """One line."""
        ids = ", ".join(self.record_ids) or "no record"
        duties = f"; duties: {', '.join(self.duties)}" if self.duties else ""
        mock = " (rows are marked mock)" if self.mock else ""
        lent = f", by permission {self.permission_sha256[:12]}" if self.permission_sha256 else ""
        word = "permitted" if self.permitted else "not permitted"
        return f"{word}: {self.status} by {ids}{lent}{mock}{duties}"

    def require(self) -> None:
        """Do nothing when permitted.

        Raises:
            TermsRefused: exit 77; names record, gist, URL, day seen, and what can be done.
        """
        if not self.permitted:
            raise TermsRefused(
                "the recorded terms do not permit this use: " + "; ".join(self.reasons),
                place=", ".join(self.record_ids) or "terms",
                remedy=REMEDIES,
            )


def allows(  # noqa: PLR0913 - the facts a verdict depends on, all by name
    registry: Registry,
    *,
    host: str,
    model: str,
    declared: str,
    use: Use,
    purpose: Purpose,
    today: date,
    permissions: Sequence[Permission] = (),
    student_base: str = "",
) -> Verdict:
    """Whether this use of this teacher is permitted today.

    Args:
        host: name without port.
        declared: ids of records, comma-separated: the weights', and behind a router the host's too.
            Naming a record that speaks of another model or host is an error of its own, so that the
            mock's record makes no teacher a mock.
        permissions: only one that covers host, model and use lifts a restriction; duties stay.
        student_base: base of the student where it is known; some weights may teach their own line only.
    """
    found, reasons = layers.speaking(registry, host, model, declared, harvesting=use == "harvest")
    status, evaluation = layers.worst(found, use == "seal", today, student_base, reasons)
    lent = None
    if purpose == "eval" and use in {"train", "export"}:
        reasons.append("rows collected for evaluation are never trained on, nor exported for training")
        permitted = False
    else:
        permitted = status in FREE or (purpose == "eval" and status == "restrict" and evaluation)
        if not permitted:
            lent = next((p for p in permissions if p.covers(host, model, use, today)), None)
            permitted = lent is not None
    duties = [duty for r in found for duty in r.duties]
    duties += [f"same_line:{r.student_line}" for r in found if r.student_line]
    return Verdict(
        permitted,
        status,
        tuple(r.id for r in found),
        tuple(dict.fromkeys(duty for duty in duties if lent is None or not lent.frees_of(duty))),
        () if permitted else tuple(dict.fromkeys(reasons)),
        mock=any(r.mock for r in found),
        permission_sha256=lent.sha256 if lent else "",
        body=layers.wire_fields(found),
        conditions=tuple(f"{r.id}: {condition}" for r in found for condition in r.conditions),
        warnings=tuple(f"{r.id} was due for review on {r.good_until}" for r in found if r.is_stale(today)),
    )


def allows_training(  # noqa: PLR0913 - the facts a verdict depends on, all by name
    lineages: Sequence[Lineage],
    *,
    registry: Registry,
    today: date,
    student_base: str,
    student_name: str,
    student_licence: str | None = None,
    permissions: Sequence[Permission] = (),
    use: Use = "train",
    facts: Sequence[Fact] = (),
) -> Verdict:
    """Whether a student may learn from shards of these lineages, and be exported (`use="export"`).

    Each lineage is asked again under the records it names; duties are united and held against the
    student's base, name and licence. No lineage at all is no.

    Args:
        facts: what the rows say of themselves; see `provenance`.
    """
    asked = again(
        lineages,
        facts,
        registry=registry,
        today=today,
        student_base=student_base,
        permissions=permissions,
        use=use,
    )
    reasons = [reason for verdict in asked for reason in verdict.reasons if not verdict.permitted]
    duties = tuple(dict.fromkeys(duty for verdict in asked for duty in verdict.duties))
    student = DerivedModel(base=student_base, name=student_name, licence=student_licence)
    reasons += unpaid(duties, student)
    statuses = [v.status for v in asked] or ["unknown"]
    hashes = dict.fromkeys(v.permission_sha256 for v in asked if v.permission_sha256)
    return Verdict(
        not reasons,
        max(statuses, key=SEVERITY.index),
        tuple(dict.fromkeys(i for v in asked for i in v.record_ids)),
        duties,
        tuple(dict.fromkeys(reasons)),
        mock=any(v.mock for v in asked),
        permission_sha256=",".join(hashes),
        conditions=tuple(dict.fromkeys(c for v in asked for c in v.conditions)),
        warnings=tuple(dict.fromkeys(w for v in asked for w in v.warnings)),
    )


def again(lineages: Sequence[Lineage], facts: Sequence[Fact], **told: Any) -> list[Verdict]:
    """Every lineage asked again, and one verdict more where rows and lineages differ or nobody says a thing.

    Args:
        told: as for `allows_lineage`.
    """
    others = other_models(facts)
    asked = [
        allows_lineage(lineage, answering=others.get(lineage.run_id, ()), **told) for lineage in lineages
    ]
    reasons = disagreements(lineages, facts)
    if not lineages:
        reasons.append("there is no lineage, so nobody can show which terms applied")
    return [*asked, *([Verdict(False, "unknown", (), (), tuple(reasons))] if reasons else [])]


def allows_lineage(  # noqa: PLR0913 - the facts a verdict depends on, all by name
    lineage: Lineage,
    *,
    registry: Registry,
    today: date,
    permissions: Sequence[Permission],
    use: Use,
    student_base: str = "",
    answering: Sequence[str] = (),
) -> Verdict:
    """Whether rows of this lineage may be used so today, under the records they name themselves.

    A lineage that doesn't say record, host, model and purpose is no; so is one that leans on a permission
    that is not among `permissions`.

    Args:
        answering: names that answers gave as their model's, other than the one asked for: the same records
            have to speak for them.
    """
    verdicts = [
        _as_model(
            lineage,
            name,
            registry=registry,
            today=today,
            permissions=permissions,
            use=use,
            student_base=student_base,
        )
        for name in (lineage.model, *answering)
    ]
    first = verdicts[0]
    reasons = list(first.reasons)
    for name, verdict in zip(answering, verdicts[1:], strict=True):
        if not verdict.permitted:
            reasons += [f"asked for {lineage.model!r}, {name!r} answered: {r}" for r in verdict.reasons]
    return replace(
        first,
        permitted=all(verdict.permitted for verdict in verdicts),
        status=max((verdict.status for verdict in verdicts), key=SEVERITY.index),
        record_ids=tuple(dict.fromkeys(i for verdict in verdicts for i in verdict.record_ids)),
        duties=tuple(dict.fromkeys(duty for verdict in verdicts for duty in verdict.duties)),
        reasons=tuple(reasons),
    )


def _as_model(  # noqa: PLR0913 - as above
    lineage: Lineage,
    model: str,
    *,
    registry: Registry,
    today: date,
    permissions: Sequence[Permission],
    use: Use,
    student_base: str,
) -> Verdict:
    teacher = lineage.teacher_id or lineage.host or "an unknown teacher"
    absent = lineage.missing(("terms_id", "host", "model", "purpose"))
    if absent:
        why = f"rows of {teacher} carry no lineage ({', '.join(absent)} not said)"
        return Verdict(False, "unknown", (), (), (why,))
    leaned = lineage.permission_sha256
    verdict = allows(
        registry,
        host=host_of(lineage.host),
        model=model,
        declared=lineage.terms_id,
        use=use,
        purpose="train" if lineage.purpose == "train" else "eval",
        today=today,
        permissions=[p for p in permissions if leaned and p.sha256 == leaned],
        student_base=student_base,
    )
    reasons = list(verdict.reasons)
    if leaned and verdict.status not in FREE and not verdict.permission_sha256:
        reasons.append(
            f"rows of {teacher} lean on permission {leaned[:12]}, which is not here or not in force"
        )
    duties = dict.fromkeys((*verdict.duties, *lineage.duties))
    return replace(
        verdict,
        duties=tuple(duties),
        reasons=tuple(reasons),
        mock=verdict.mock or lineage.mock,
        body={},
    )
