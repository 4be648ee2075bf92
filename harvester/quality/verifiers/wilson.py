"""Compute the interval of a share from counts."""

from __future__ import annotations

import math

# Quantile of the normal distribution for intervals of 95 %.
Z95 = 1.959964


def wilson_limits(right: float, count: int) -> tuple[float, float]:
    """Return the limits of the 95 % score interval of `right` out of `count` (Wilson 1927), 0 to 1.

    It is valid for shares of 0 and 1 too; of nothing it is all from 0 to 1. `right` may have halves.
    """
    if count == 0:
        return 0.0, 1.0
    p, n = right / count, float(count)
    middle = (p + Z95 * Z95 / (2 * n)) / (1 + Z95 * Z95 / n)
    half = Z95 / (1 + Z95 * Z95 / n) * math.sqrt(p * (1 - p) / n + Z95 * Z95 / (4 * n * n))
    return min(p, max(0.0, middle - half)), max(p, min(1.0, middle + half))
