"""Estimate the output tokens of an answer, to reserve no more of a token limit than most use. Pure."""

from __future__ import annotations

# The quantile that is tracked, and how far one answer moves the estimate, as a share of it.
QUANTILE = 0.95
STEP = 0.05


class OutputEstimate:
    """The number of tokens that 95 % of the answers stay below, followed as answers come.

    Attributes:
        tokens: None before the first answer.
    """

    def __init__(self) -> None:
        self.tokens: float | None = None

    def answered(self, tokens: int) -> None:
        """Move the estimate towards the 0.95 quantile, by stochastic approximation (Robbins and Monro, 1951).

        It rises by 0.95 steps for each answer above it and falls by 0.05 steps for each below.
        """
        if self.tokens is None:
            self.tokens = float(tokens)
        step = max(1.0, STEP * self.tokens)
        self.tokens += step * (QUANTILE if tokens > self.tokens else QUANTILE - 1)
