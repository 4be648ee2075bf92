"""The gate: what a teacher's recorded terms permit. Closed by default, without an override.

A record says what one layer (the weights, the service that hosts them, a router in between) allows; the
verdict is the worst of all layers that apply. Unknown, expired or absent means no. Everything but
`load_registry` is pure: the day is passed in. This is a reading of published texts, not legal advice.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date, timedelta
from fnmatch import fnmatchcase
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from harvester.errors import ConfigError, TermsRefused

Use = Literal["harvest", "seal", "train", "export"]
Purpose = Literal["train", "eval"]
SEVERITY = ("permit", "duties", "restrict", "unknown")
LAYERS = ("weights", "service", "router")
GRACE = timedelta(days=90)
LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TermsRecord:
    """One layer's terms, as read on a day.

    Attributes:
        host, model: shell-style patterns of what the record speaks about.
        established: primary (text read), third_party (someone's account), general (common knowledge).
        evaluation: whether answers may be used to evaluate models, where training is restricted.
        review_after: from this day the record is stale; 90 days later it counts as unknown.
    """

    id: str
    layer: str
    host: str
    model: str
    verdict: str
    gist: str
    url: str
    licence: str
    seen: date
    established: str
    duties: tuple[str, ...] = ()
    effective: date | None = None
    review_after: date | None = None
    evaluation: bool = False
    mock: bool = False

    def speaks_of(self, host: str, model: str) -> bool:
        """Whether this record is about that model at that host."""
        return fnmatchcase(host.lower(), self.host.lower()) and fnmatchcase(model.lower(), self.model.lower())

    def in_force(self, today: date) -> bool:
        """Not yet long past its review."""
        return self.review_after is None or today <= self.review_after + GRACE


@dataclass(frozen=True, slots=True)
class Registry:
    """All records, by id; a user's folder overlays the shipped ones."""

    records: Mapping[str, TermsRecord]

    def find(self, record_id: str) -> TermsRecord | None:
        """The record of that id."""
        return self.records.get(record_id)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The gate's answer, with everything a refusal has to say."""

    permitted: bool
    status: str
    record_ids: tuple[str, ...]
    duties: tuple[str, ...]
    reasons: tuple[str, ...]
    mock: bool = False
    permission_sha256: str = ""

    def summary(self) -> str:
        """One line."""
        ids = ", ".join(self.record_ids) or "no record"
        duties = f"; duties: {', '.join(self.duties)}" if self.duties else ""
        mock = " (rows are marked mock)" if self.mock else ""
        return f"{'permitted' if self.permitted else 'not permitted'}: {self.status} by {ids}{mock}{duties}"

    def require(self) -> None:
        """Do nothing when permitted.

        Raises:
            TermsRefused: exit 77; names record, gist, URL, day seen, and what can be done.
        """
        if not self.permitted:
            raise TermsRefused(
                "the recorded terms do not permit this use: " + "; ".join(self.reasons),
                place=", ".join(self.record_ids) or "terms",
                remedy="choose a permitted teacher (`harvester terms list`), or record terms you have read "
                "in a folder `terms` beside the configuration",
            )


def load_registry(*overlays: Path) -> Registry:
    """Shipped records, overlaid by the TOML files of the user's folders (a missing folder is empty).

    Raises:
        ConfigError: a file that is no registry; names it.
    """
    records: dict[str, TermsRecord] = {}
    shipped = files("harvester_data").joinpath("terms")
    sources = [
        (item.name, item.read_text(encoding="utf-8"))
        for item in shipped.iterdir()
        if item.name.endswith(".toml")
    ]
    for folder in overlays:
        sources += [(str(path), path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.toml"))]
    for name, text in sources:  # shipped first, so that a user's record replaces one of the same id
        records.update({record.id: record for record in _parse(text, name)})
    return Registry(records)


def _parse(text: str, place: str) -> Iterable[TermsRecord]:
    known = {f.name for f in fields(TermsRecord)}
    try:
        rows = tomllib.loads(text)["record"]
    except (tomllib.TOMLDecodeError, KeyError) as error:
        raise ConfigError(f"is no terms registry: {error}", place=place) from None
    for row in rows:
        where = f"{place}: record {row.get('id', '?')!r}"
        if set(row) - known:
            raise ConfigError(f"unknown fields {sorted(set(row) - known)}", place=where)
        try:
            record = TermsRecord(**{**row, "duties": tuple(row.get("duties", ()))})
        except TypeError as error:
            raise ConfigError(str(error).replace("TermsRecord.__init__() ", ""), place=where) from None
        if record.verdict not in SEVERITY or record.layer not in LAYERS:
            raise ConfigError(f"verdict {record.verdict!r} or layer {record.layer!r} is unknown", place=where)
        yield record


def allows(  # noqa: PLR0913 - the facts a verdict depends on, all by name
    registry: Registry,
    *,
    host: str,
    model: str,
    declared: str,
    use: Use,
    purpose: Purpose,
    today: date,
) -> Verdict:
    """Whether this use of this teacher is permitted today.

    `declared` names the record of the weights (several ids: comma-separated); records of services and
    routers apply by themselves when their patterns speak of host and model. An id that speaks of another
    host or model does not count: naming the mock's record does not make a teacher the mock.
    """
    found: dict[str, TermsRecord] = {}
    reasons: list[str] = []
    for name in filter(None, (part.strip() for part in declared.split(","))):
        record = registry.find(name)
        if record is None:
            reasons.append(f"there is no terms record {name!r}")
        elif not record.speaks_of(host, model):
            reasons.append(
                f"record {name!r} speaks of {record.model} at {record.host}, not of {model} at {host}"
            )
        else:
            found[name] = record
    for record in registry.records.values():
        if record.layer != "weights" and record.speaks_of(host, model):
            found[record.id] = record
    if not found and not reasons:
        where = "weights served on this machine" if host in LOOPBACK else f"{model} at {host}"
        reasons.append(f"no terms record is declared for {where}")
    status = "unknown" if reasons else _worst(found.values(), today, reasons)
    permitted = _permits(status, found.values(), use, purpose)
    if not permitted:
        reasons += [
            f"{r.id}: {r.gist} ({r.url}, seen {r.seen})" for r in found.values() if r.verdict != "permit"
        ]
        if not reasons:
            reasons.append("rows collected for evaluation can't be trained on or exported")
    duties = tuple(dict.fromkeys(duty for record in found.values() for duty in record.duties))
    mock = any(record.mock for record in found.values())
    return Verdict(permitted, status, tuple(found), duties, tuple(reasons), mock)


def _worst(records: Iterable[TermsRecord], today: date, reasons: list[str]) -> str:
    worst = 0
    for record in records:
        if not record.in_force(today):
            reasons.append(f"{record.id} was to be reviewed by {record.review_after}; read the terms again")
            worst = SEVERITY.index("unknown")
        worst = max(worst, SEVERITY.index(record.verdict))
    return SEVERITY[worst]


def _permits(status: str, records: Iterable[TermsRecord], use: Use, purpose: Purpose) -> bool:
    if purpose == "eval":
        if use not in {"harvest", "seal"}:
            return False
        return status in {"permit", "duties"} or (
            status == "restrict" and all(r.evaluation or r.verdict in {"permit", "duties"} for r in records)
        )
    return status in {"permit", "duties"}


def allows_training(lineages: Sequence[Mapping[str, Any]], *, registry: Registry, today: date) -> Verdict:
    """Whether a student may learn from shards of these lineages: each is asked again; none at all is no."""
    reasons: list[str] = []
    ids: dict[str, None] = {}
    duties: dict[str, None] = {}
    mock = False
    for lineage in lineages:
        if not lineage.get("terms_id"):
            reasons.append("a shard carries no lineage, so nobody can show which terms applied")
            continue
        host = str(lineage.get("host", "")).rsplit(":", 1)[0]
        verdict = allows(
            registry, host=host, model=str(lineage.get("model", "")), declared=str(lineage["terms_id"]),
            use="train", purpose="eval" if lineage.get("purpose") == "eval" else "train", today=today,
        )  # fmt: skip
        ids.update(dict.fromkeys(verdict.record_ids))
        duties.update(dict.fromkeys((*verdict.duties, *lineage.get("duties", ()))))
        mock = mock or verdict.mock
        if not verdict.permitted:
            reasons += verdict.reasons
    status = "permit" if not reasons else "restrict"
    return Verdict(not reasons, status, tuple(ids), tuple(duties), tuple(dict.fromkeys(reasons)), mock)
