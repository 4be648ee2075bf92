"""Refuse keyword arguments that a public function does not have, in words and with the nearest name."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from difflib import get_close_matches
from typing import ParamSpec, TypeVar

from harvester.errors import UsageError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def with_known_options(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Let a function raise UsageError, instead of TypeError, for a keyword that it does not have."""
    known = [
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD
    ]

    @functools.wraps(function)
    def checked(*args: Parameters.args, **options: Parameters.kwargs) -> Result:
        for name in options:
            if name not in known:
                nearest = get_close_matches(name, known, 1)
                raise UsageError(
                    f"{function.__name__} has no option {name!r}",
                    place=name,
                    remedy=f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(known[1:])}",
                )
        return function(*args, **options)

    return checked
