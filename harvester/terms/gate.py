"""Decide whether recorded terms permit a use of a teacher's answers.

A record says what one layer allows: the weights, the service that hosts them, or a router in between. The
verdict is the worst of all layers that apply. Unknown, expired, changed or absent terms mean no, and nothing
overrides that. Only `RecordedTerms.load` does I/O. A reading of published texts, not legal advice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any, Literal

from harvester.errors import TermsRefused
from harvester.system.command_line.shell_words import shell_word
from harvester.system.hosts import host_of
from harvester.system.safe_text import visible
from harvester.terms import layers
from harvester.terms.lineage import Fact, Lineage, disagreements, other_models, providers_not_allowed
from harvester.terms.obligations import DerivedModel, unmet
from harvester.terms.permissions import Permission, load_permissions, toml_value
from harvester.terms.places import places, terms_folders
from harvester.terms.records import SEVERITY, Registry, TermsRecord, load_registry

__all__ = [
    "Permission",
    "Purpose",
    "RecordedTerms",
    "Registry",
    "TermsRecord",
    "Use",
    "Verdict",
    "allows",
    "allows_lineage",
    "allows_training",
    "judge_lineages",
    "load_permissions",
    "load_registry",
]

Use = Literal["harvest", "seal", "train", "export"]
Purpose = Literal["train", "eval"]

# Statuses that need no permission.
PERMITTED_STATUSES = frozenset({"permit", "duties"})
REMEDIES = (
    "choose a permitted teacher (`harvester terms list`), or write a record of a model or server of your own "
    "into terms/ beside the configuration (`harvester terms new` asks for its licence), or record a "
    "permission you hold (`harvester terms record`), or collect for evaluation only "
    '([run] purpose = "eval") where allowed'
)


@dataclass(frozen=True, slots=True)
class RecordedTerms:
    """Everything a verdict is based on: terms records, recorded permissions, and the day."""

    registry: Registry
    today: date
    permissions: tuple[Permission, ...] = ()
    looked_in: tuple[str, ...] = ()

    @classmethod
    def load(cls, *folders: Path) -> RecordedTerms:
        """Read what counts today for a configuration, a store or a corpus in these folders.

        In each of their `places`, `terms` overlays the shipped records and `permissions` holds permissions.

        Raises:
            ConfigError: a file of either folder can't be used; names it.
            TermsRefused: a record permits more than the shipped one that it replaces.
        """
        existing = places(*folders)
        permissions = [
            permission for each in existing for permission in load_permissions(each / "permissions")
        ]
        return cls(
            load_registry(*terms_folders(*folders)),
            datetime.now(UTC).date(),
            tuple(dict.fromkeys(permissions)),
            tuple(map(str, terms_folders(*folders))),
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a use is permitted, and everything that a refusal has to say.

    Attributes:
        status: worst of the layers: permit, duties, restrict or unknown, before any permission.
        reasons: why it is not permitted; empty when it is.
        body: fields that the request body must carry (a router's); they replace the request's own.
        conditions: thresholds that the operator has to judge. warnings: readings due for a review.
        refused_rows: columns and values of the rows for which alone it is not permitted: without the answers
            of another model, or of a provider that the router was not restricted to, it is.
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
    looked_in: tuple[str, ...] = ()
    refused_rows: tuple[tuple[str, str], ...] = ()

    def summary(self) -> str:
        """Return the verdict in one line."""
        ids = ", ".join(self.record_ids) or "no record"
        duties = f"; duties: {', '.join(self.duties)}" if self.duties else ""
        mock = " (rows are marked mock)" if self.mock else ""
        permission = f", by permission {self.permission_sha256[:12]}" if self.permission_sha256 else ""
        word = "permitted" if self.permitted else "not permitted"
        why = f" ({self.reasons[0]})" if self.reasons else ""
        return f"{word}: {self.status} by {ids}{permission}{mock}{duties}{why}"

    def remedy(self) -> str:
        """Return every way to a permitted use, and every place where own records were looked for."""
        note = f"; own records were looked for in {', '.join(self.looked_in)}" if self.looked_in else ""
        without = f"; or {removal(self.refused_rows)}" if self.refused_rows else ""
        return f"{REMEDIES}{note}{without}"

    @classmethod
    def of_all(cls, verdicts: Sequence[Verdict]) -> Verdict | None:
        """Return one verdict with what all refusals among these say; None if there is none."""
        refused = [verdict for verdict in verdicts if not verdict.permitted]
        if not refused:
            return None
        return replace(
            refused[0],
            record_ids=tuple(dict.fromkeys(i for verdict in refused for i in verdict.record_ids)),
            reasons=tuple(dict.fromkeys(reason for verdict in refused for reason in verdict.reasons)),
            refused_rows=_rows_of_all(refused),
        )

    def require(self) -> None:
        """Do nothing when the use is permitted.

        Raises:
            TermsRefused: exit 77; names records, gist, URL, day seen, and what can be done.
        """
        if not self.permitted:
            raise TermsRefused(
                "the recorded terms do not permit this use: " + "; ".join(self.reasons),
                place=", ".join(self.record_ids) or "terms",
                remedy=self.remedy(),
            )


def _rows_of_all(refused: Sequence[Verdict]) -> tuple[tuple[str, str], ...]:
    """Return the rows without which none of these would be refused; () if that takes more."""
    if not all(verdict.refused_rows for verdict in refused):
        return ()
    return tuple(dict.fromkeys(rows for verdict in refused for rows in verdict.refused_rows))


def removal(rows: Sequence[tuple[str, str]]) -> str:
    """Return how these rows are removed from a store, by one command for each column.

    The values come from a teacher: they are quoted for TOML and for a shell.
    """
    commands = []
    for column in dict.fromkeys(column for column, _ in rows):
        condition = f"{column} = {toml_value([value for name, value in rows if name == column])}"
        typed = "".join(c if visible(c) == c else f"\\U{ord(c):08x}" for c in condition)
        commands.append(f"`harvester purge STORE --where {shell_word(typed)}`")
    return f"remove these answers for good: {' and '.join(commands)}"


def allows(  # noqa: PLR0913 - the facts that a verdict depends on, all by name
    terms: RecordedTerms,
    *,
    host: str,
    model: str,
    declared: str,
    use: Use,
    purpose: Purpose,
    student_base: str = "",
) -> Verdict:
    """Judge one use of one teacher.

    Args:
        terms: a permission among them counts only if it covers host, model and use; duties remain.
        host: name without port.
        declared: ids of terms records, comma-separated: of the weights, and behind a router of the host too.
            Declaring a record of another model or host is an error of its own, so that declaring the mock's
            record makes no teacher a mock.
        student_base: base of the student where it is known; some weights may train only their own line.
    """
    records, reasons = layers.applying_records(
        terms.registry, host, model, declared, harvesting=use == "harvest"
    )
    status, evaluation = layers.worst(records, use == "seal", terms.today, student_base, reasons)
    permission = None
    if purpose == "eval" and use in {"train", "export"}:
        reasons.append("rows collected for evaluation are never trained on, nor exported for training")
        permitted = False
    else:
        permitted = status in PERMITTED_STATUSES or (
            purpose == "eval" and status == "restrict" and evaluation
        )
        if not permitted:
            permission = next((p for p in terms.permissions if p.covers(host, model, use, terms.today)), None)
            permitted = permission is not None
    duties = [duty for record in records for duty in record.duties]
    duties += [f"same_line:{record.student_line}" for record in records if record.student_line]
    if permission is not None:
        duties = [duty for duty in duties if not permission.lifts_duty(duty)]
    return Verdict(
        permitted,
        status,
        tuple(record.id for record in records),
        tuple(dict.fromkeys(duties)),
        () if permitted else tuple(dict.fromkeys(reasons)),
        mock=any(record.mock for record in records),
        permission_sha256=permission.sha256 if permission else "",
        body=layers.body_fields(records),
        conditions=tuple(
            f"{record.id}: {condition}" for record in records for condition in record.conditions
        ),
        warnings=tuple(
            f"{record.id} was due for review on {record.good_until}"
            for record in records
            if record.is_stale(terms.today)
        ),
        looked_in=terms.looked_in,
    )


def allows_training(
    terms: RecordedTerms,
    lineages: Sequence[Lineage],
    *,
    student: DerivedModel,
    use: Use = "train",
    facts: Sequence[Fact] = (),
) -> Verdict:
    """Judge whether a student may learn from rows of these lineages, or be exported (`use="export"`).

    Each lineage is judged again under the records it names. Their duties are united and compared with the
    student's base, name and licence. Without any lineage the answer is no.

    Args:
        facts: what the rows say of themselves; see `lineage`.
    """
    verdicts = judge_lineages(terms, lineages, facts, use=use, student_base=student.base)
    reasons = [reason for verdict in verdicts for reason in verdict.reasons if not verdict.permitted]
    duties = tuple(dict.fromkeys(duty for verdict in verdicts for duty in verdict.duties))
    unmet_duties = unmet(duties, student)
    reasons += unmet_duties
    refused = [verdict for verdict in verdicts if not verdict.permitted]
    statuses = [verdict.status for verdict in verdicts] or ["unknown"]
    permissions = dict.fromkeys(v.permission_sha256 for v in verdicts if v.permission_sha256)
    return Verdict(
        not reasons,
        max(statuses, key=SEVERITY.index),
        tuple(dict.fromkeys(record_id for verdict in verdicts for record_id in verdict.record_ids)),
        duties,
        tuple(dict.fromkeys(reasons)),
        mock=any(verdict.mock for verdict in verdicts),
        permission_sha256=",".join(permissions),
        conditions=tuple(dict.fromkeys(c for verdict in verdicts for c in verdict.conditions)),
        warnings=tuple(dict.fromkeys(w for verdict in verdicts for w in verdict.warnings)),
        looked_in=terms.looked_in,
        refused_rows=() if unmet_duties else _rows_of_all(refused),
    )


def judge_lineages(
    terms: RecordedTerms,
    lineages: Sequence[Lineage],
    facts: Sequence[Fact],
    *,
    use: Use,
    student_base: str = "",
) -> list[Verdict]:
    """Judge every lineage again; one more verdict refuses rows that disagree with them, or have none."""
    answered_by = other_models(facts)
    verdicts = [
        allows_lineage(
            terms,
            lineage,
            use=use,
            student_base=student_base,
            answered_by=answered_by.get(lineage.run_id, ()),
        )
        for lineage in lineages
    ]
    reasons = disagreements(lineages, facts)
    if not lineages:
        reasons.append("there is no lineage, so nobody can show which terms applied")
    if reasons:
        providers = providers_not_allowed(lineages, facts)
        others = [fact for fact in facts if fact.get("provider") not in providers]
        is_due_to_them = bool(lineages) and not disagreements(lineages, others)
        rows = tuple(("provider", name) for name in providers) if is_due_to_them else ()
        verdicts.append(Verdict(False, "unknown", (), (), tuple(reasons), refused_rows=rows))
    return verdicts


def allows_lineage(
    terms: RecordedTerms,
    lineage: Lineage,
    *,
    use: Use,
    student_base: str = "",
    answered_by: Sequence[str] = (),
) -> Verdict:
    """Judge whether rows of this lineage may be used so today, under the records they name themselves.

    A lineage without record, host, model or purpose is refused, and so is one that relies on a permission
    that is not among `terms.permissions`.

    Args:
        answered_by: models that answers named as their own, other than the one asked for. The same records
            have to apply to them.
    """
    verdicts = [
        _judge_as_model(terms, lineage, name, use=use, student_base=student_base)
        for name in (lineage.model, *answered_by)
    ]
    first = verdicts[0]
    reasons = list(first.reasons)
    for name, verdict in zip(answered_by, verdicts[1:], strict=True):
        if not verdict.permitted:
            reasons += [f"asked for {lineage.model!r}, {name!r} answered: {r}" for r in verdict.reasons]
    return replace(
        first,
        permitted=all(verdict.permitted for verdict in verdicts),
        status=max((verdict.status for verdict in verdicts), key=SEVERITY.index),
        record_ids=tuple(dict.fromkeys(i for verdict in verdicts for i in verdict.record_ids)),
        duties=tuple(dict.fromkeys(duty for verdict in verdicts for duty in verdict.duties)),
        reasons=tuple(reasons),
        refused_rows=tuple(
            ("response_model", name)
            for name, verdict in zip(answered_by, verdicts[1:], strict=True)
            if first.permitted and not verdict.permitted
        ),
    )


def _judge_as_model(
    terms: RecordedTerms, lineage: Lineage, model: str, *, use: Use, student_base: str
) -> Verdict:
    teacher = lineage.teacher_id or lineage.host or "an unknown teacher"
    missing = lineage.missing(("terms_id", "host", "model", "purpose"))
    if missing:
        reason = f"rows of {teacher} carry no lineage ({', '.join(missing)} missing)"
        return Verdict(False, "unknown", (), (), (reason,))
    sha256 = lineage.permission_sha256
    permissions = tuple(p for p in terms.permissions if sha256 and p.sha256 == sha256)
    verdict = allows(
        replace(terms, permissions=permissions),
        host=host_of(lineage.host),
        model=model,
        declared=lineage.terms_id,
        use=use,
        purpose="train" if lineage.purpose == "train" else "eval",
        student_base=student_base,
    )
    reasons = list(verdict.reasons)
    if sha256 and verdict.status not in PERMITTED_STATUSES and not verdict.permission_sha256:
        reasons.append(
            f"rows of {teacher} rely on permission {sha256[:12]}, which is missing or not in force"
        )
    return replace(
        verdict,
        duties=tuple(dict.fromkeys((*verdict.duties, *lineage.duties))),
        reasons=tuple(reasons),
        mock=verdict.mock or lineage.mock,
        body={},
    )
