"""A status.json as it was read: each field as data/FORMAT.md describes it, or left out. Pure.

The file is a view that anyone may have edited, torn or written by another release; whoever shows it must not
stumble over it. Fields that are not named here pass as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

_GONE = object()
_FAR = 1e18
"""Beyond it a number is none of ours; JSON knows NaN and infinities in Python only."""
Fit = Callable[[Any], Any]


def _number(value: Any) -> Any:
    is_one = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_one and -_FAR < value < _FAR else _GONE


def _text(value: Any) -> Any:
    return value if isinstance(value, str) else _GONE


def _or_null(fit: Fit) -> Fit:
    return lambda value: None if value is None else fit(value)


def _each(fit: Fit) -> Fit:
    """An object, of its members those that fit."""

    def members(value: Any) -> Any:
        if not isinstance(value, dict):
            return _GONE
        return {name: kept for name, one in value.items() if (kept := fit(one)) is not _GONE}

    return members


def _record(**fields: Fit) -> Fit:
    """An object whose named members fit; the others pass."""

    def members(value: Any) -> Any:
        return _GONE if not isinstance(value, dict) else _fitting(value, fields)

    return members


def _whole(*names: str, fit: Fit) -> Fit:
    """An object that has all of these members."""

    def members(value: Any) -> Any:
        found = _record(**dict.fromkeys(names, fit))(value)
        return found if found is not _GONE and set(names) <= found.keys() else _GONE

    return members


def _list(fit: Fit) -> Fit:
    def items(value: Any) -> Any:
        if not isinstance(value, list) or any(fit(one) is _GONE for one in value):
            return _GONE
        return value

    return items


def _fitting(value: Mapping[str, Any], fields: Mapping[str, Fit]) -> dict[str, Any]:
    fitted = {name: fields[name](one) if name in fields else one for name, one in value.items()}
    return {name: one for name, one in fitted.items() if one is not _GONE}


def _all(names: str, fit: Fit) -> Iterable[tuple[str, Fit]]:
    return ((name, fit) for name in names.split())


_RANGE = ("low", "likely", "high")
_CANARY = _record(
    **dict(
        [
            *_all("rounds changes requests_sent answers_stored possibly_billed cost_microusd", _number),
            *_all("asked_at distance", _or_null(_number)),
            *_all("said missed stopped", _text),
        ]
    )
)
FIELDS: dict[str, Fit] = dict(
    [
        *_all("state waiting run_id config model host", _text),
        *_all("updated_at started_at pid rows_total rows_left rows from_cache duplicates", _number),
        *_all("answers_stored dead requests_sent retries rate_limited refunded possibly_billed", _number),
        *_all("repeated_ids input_tokens output_tokens cost_microusd refused_share in_flight", _number),
        *_all("window latency_sum_s rss_bytes open_files tasks threads cpu_s loop_lag_s exit_code", _number),
        *_all("closes_at finish_by", _or_null(_number)),
        *_all("errors outcomes voices rates", _each(_number)),
        *_all("tokens_left eta_s cost_projected_microusd", _or_null(_whole(*_RANGE, fit=_number))),
        ("done_at", _or_null(_whole(*_RANGE, fit=_or_null(_number)))),
        *_all("latency_counts input_token_counts output_token_counts", _list(_number)),
        ("complaints", _list(_text)),
        ("holds", _each(_text)),
        ("limits", _record(**dict(_all("requests_per_minute tokens_per_minute", _or_null(_number))))),
        ("budget", _each(_or_null(_number))),
        ("canary", _CANARY),
    ]
)


def validated_status(told: Mapping[str, Any]) -> dict[str, Any]:
    """What of a status can be shown."""
    return _fitting(told, FIELDS)
