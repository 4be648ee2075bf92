"""Validate status.json: keep each field that has its documented type, and leave the others out.

The file may have been edited, torn, or written by another release, and a reader must not fail on it. So a bad
value drops the field it stands in, not the file. Fields that are not declared here pass unchanged. The models
are strict: a bool is no number, a number is no text, and a number must be finite and within ±1e18.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import GenericAlias
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, WrapValidator, create_model
from pydantic_core import PydanticOmit

from harvester.observe.counters import Counters, Kind, Shown, Snapshot, declared

# A larger number is none that a run writes. The bound also refuses NaN and the infinities of Python's JSON.
FAR = 10**18

_Int = Annotated[int, Field(strict=True, gt=-FAR, lt=FAR)]
_Float = Annotated[float, Field(strict=True, gt=-FAR, lt=FAR, allow_inf_nan=False)]
Number = _Int | _Float
Text = Annotated[str, Field(strict=True)]


def _omitted_if_bad(value: Any, validate: Callable[[Any], Any]) -> Any:
    try:
        return validate(value)
    except ValidationError:
        raise PydanticOmit from None


# A member of an object that is left out when its value is bad.
_NumberOrOmitted = Annotated[Number, WrapValidator(_omitted_if_bad)]
_NullableOrOmitted = Annotated[Number | None, WrapValidator(_omitted_if_bad)]
_TextOrOmitted = Annotated[Text, WrapValidator(_omitted_if_bad)]

_TYPES: Mapping[Kind, Any] = {
    Kind.COUNTER: Number,
    Kind.GAUGE: Number,
    Kind.COUNTS: dict[str, _NumberOrOmitted],
    Kind.HISTOGRAM: list[Number],
    Kind.TEXT: Text,
}


class _Lenient(BaseModel):
    """An object of the status: undeclared members pass, bad members are left out."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())


def lenient_model(name: str, types: Mapping[str, Any]) -> type[_Lenient]:
    """Return a model whose fields may be absent, and are left out when their value is not of its type."""
    fields: dict[str, Any] = {
        field: (Annotated[type_, WrapValidator(_omitted_if_bad)], None) for field, type_ in types.items()
    }
    return create_model(name, __base__=_Lenient, **fields)


class Range(BaseModel):
    """An estimate; all three values must be there."""

    model_config = ConfigDict(extra="allow")

    low: Number
    likely: Number
    high: Number


class OpenRange(BaseModel):
    """An estimate whose values may be null; all three must be there."""

    model_config = ConfigDict(extra="allow")

    low: Number | None
    likely: Number | None
    high: Number | None


def _all(names: str, type_: Any) -> Iterable[tuple[str, Any]]:
    return ((name, type_) for name in names.split())


def canary_model(counters: type[Counters]) -> type[_Lenient]:
    """Return the model of `canary` in the status."""
    counted = {m.status: _TYPES[m.kind] for m in declared(counters).values() if Shown.CANARY in m.shown}
    return lenient_model(
        "CanaryStatus",
        dict(
            [
                *counted.items(),
                *_all("rounds changes", Number),
                *_all("asked_at distance", Number | None),
                *_all("said missed stopped", Text),
            ]
        ),
    )


def status_model(counters: type[Counters]) -> type[_Lenient]:
    """Return the model of status.json, with the fields of these counters."""
    other = lenient_model("OtherHarvest", dict([*_all("pid share priority", Number), *_all("config", Text)]))
    lease = lenient_model(
        "SharedLimit",
        dict([*_all("share", Number), *_all("endpoint", Text), ("others", GenericAlias(list, (other,)))]),
    )
    replica = lenient_model(
        "Replica",
        dict(
            [
                *_all("endpoint state why canary", Text),
                *_all("window in_flight answers answers_per_minute part weight put_aside taken_back", Number),
                *_all("latency_s unusable_share", Number | None),
            ]
        ),
    )
    limits = lenient_model("Limits", dict(_all("requests_per_minute tokens_per_minute", Number | None)))
    return lenient_model(
        "StatusFile",
        dict(
            [
                *((metric.status, _TYPES[metric.kind]) for metric in declared(counters).values()),
                *_all("state why run_id config model host", Text),
                *_all("updated_at started_at pid rows_total rows_left refused_share exit_code", Number),
                *_all("rss_bytes open_files tasks threads cpu_s loop_lag_s", Number),
                *_all("closes_at finish_by", Number | None),
                ("rates", dict[str, _NumberOrOmitted]),
                *_all("tokens_left eta_s cost_projected_microusd", Range | None),
                ("done_at", OpenRange | None),
                ("complaints", list[Text]),
                ("learned", list[Text]),
                ("shared", GenericAlias(list, (lease,))),
                ("replicas", GenericAlias(list, (replica,))),
                ("holds", dict[str, _TextOrOmitted]),
                ("limits", limits),
                ("budget", dict[str, _NullableOrOmitted]),
                ("budgets", dict[str, dict[str, _NullableOrOmitted]]),
                ("canary", canary_model(counters)),
                (
                    "mirror",
                    lenient_model(
                        "MirrorStatus",
                        dict(
                            [
                                *_all("shards mirrored failures", Number),
                                *_all("url message", Text),
                                *_all("at", Number | None),
                            ]
                        ),
                    ),
                ),
            ]
        ),
    )


StatusFile = status_model(Snapshot)


def validated_status(status: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a status that have their type, and those that are not declared."""
    return StatusFile.model_validate(dict(status)).model_dump(exclude_unset=True)
