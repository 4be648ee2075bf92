"""Spread the cases of a parametrised test over the default suite and the tests marked `slow`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def rest_is_slow(values: Iterable[Any], *, first: int) -> list[Any]:
    """Return the values as parameters; those after the `first` few carry `slow`.

    For cases that take one path through the code: the first show in `make test` that it works, and CI runs
    all of them.
    """
    return [
        pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=marks)
        for number, value in enumerate(values)
        for marks in [() if number < first else pytest.mark.slow]
    ]
