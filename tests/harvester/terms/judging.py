"""Ask the terms gate with records, day and permissions passed one by one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from typing import Any

from harvester.terms import gate
from harvester.terms.lineage import Lineage
from harvester.terms.obligations import DerivedModel
from harvester.terms.permissions import Permission
from harvester.terms.records import Registry


def judge(
    registry: Registry, *, today: date, permissions: Sequence[Permission] = (), **question: Any
) -> gate.Verdict:
    """Return the verdict on one teacher and use."""
    return gate.allows(gate.RecordedTerms(registry, today, tuple(permissions)), **question)


def judge_training(
    lineages: Sequence[Lineage],
    *,
    registry: Registry,
    today: date,
    permissions: Sequence[Permission] = (),
    student: DerivedModel,
    **question: Any,
) -> gate.Verdict:
    """Return the verdict on a student that learns from rows of these lineages."""
    terms = gate.RecordedTerms(registry, today, tuple(permissions))
    return gate.allows_training(terms, lineages, student=student, **question)
