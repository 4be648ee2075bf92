"""Divide one limit among several harvests: max-min fairness with weights. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeVar

Name = TypeVar("Name")


@dataclass(frozen=True, slots=True)
class Want:
    """What one harvest wants of a limit.

    Attributes:
        weight: `[run] priority`.
        demand: share of the limit that it could use, infinity for all that it gets.
    """

    weight: float
    demand: float = math.inf


def divide(wants: Mapping[Name, Want]) -> dict[Name, float]:
    """Return the share of each harvest; together they are 1.

    Nobody gets more than it wants while another one wants more. What all of them leave is divided by weight,
    so that a demand that rises is not held back.
    """
    shares: dict[Name, float] = {}
    left, waiting = 1.0, dict(wants)
    while waiting:
        unit = left / sum(want.weight for want in waiting.values())
        content = [name for name, want in waiting.items() if want.demand <= unit * want.weight]
        if not content:
            shares |= {name: unit * want.weight for name, want in waiting.items()}
            return shares
        for name in content:
            shares[name] = waiting.pop(name).demand
            left = max(0.0, left - shares[name])
    weights = sum(want.weight for want in wants.values())
    return {name: share + left * wants[name].weight / weights for name, share in shares.items()}
