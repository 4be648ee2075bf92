"""Check columns of a Parquet file that another program may have written: their types, and odd values.

What reads as the same Python values is taken: text as `large_string`, `string_view` or a dictionary, lists of
other kinds, integers of other widths, timestamps of other units, and columns of no type without any value.
"""

from __future__ import annotations

import json

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from harvester.store.shards.schema import SCHEMA

REMEDY = "write the columns as data/FORMAT.md lists them, or harvest into a store"

_KEY = r"^[0-9a-f]{64}$"
_LISTS = (
    *(pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list),
    *(pa.types.is_list_view, pa.types.is_large_list_view),
)

# By kind of the wanted type: kinds of types whose values are the same in Python.
_READ_ALIKE = (
    (pa.types.is_string, (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)),
    (pa.types.is_binary, (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view)),
    (pa.types.is_integer, (pa.types.is_integer,)),
    (pa.types.is_floating, (pa.types.is_floating, pa.types.is_integer)),
    (pa.types.is_timestamp, (pa.types.is_timestamp,)),
)


def unreadable_type(field: pa.Field) -> str:
    """Return what a column holds that can't be read as the one of its name in `SCHEMA`; empty if it can."""
    wanted = SCHEMA.field(field.name)
    if _reads_as(field.type, wanted.type, may_be_null=wanted.nullable):
        return ""
    return f"column {field.name} holds {field.type}, not {wanted.type}"


def _reads_as(found: pa.DataType, wanted: pa.DataType, *, may_be_null: bool) -> bool:
    if pa.types.is_dictionary(found):
        found = found.value_type
    if pa.types.is_null(found):
        return may_be_null
    if pa.types.is_list(wanted):
        is_list = any(is_kind(found) for is_kind in _LISTS)
        return is_list and _reads_as(found.value_type, wanted.value_type, may_be_null=True)
    if pa.types.is_struct(wanted):
        return pa.types.is_struct(found) and all(
            found.get_field_index(part.name) >= 0
            and _reads_as(found.field(part.name).type, part.type, may_be_null=part.nullable)
            for part in wanted
        )
    for is_wanted, kinds in _READ_ALIKE:
        if is_wanted(wanted):
            return any(is_kind(found) for is_kind in kinds)
    return bool(found == wanted)


def odd_values(batch: pa.RecordBatch) -> str:
    """Return what a column holds that no harvest writes, though its type is right; empty if nothing."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        wanted = SCHEMA.field(name).type
        if name == "key" and not pc.all(pc.match_substring_regex(_text(column), _KEY), min_count=0).as_py():
            return "column key holds other values than 64 lower-case hex digits"
        if name == "metadata_json" and not all(map(_is_object, column.to_pylist())):
            return "column metadata_json holds a text that is no JSON object"
        if name == "messages" and _has_empty_parts(column):
            return "column messages holds a message without a role"
        if pa.types.is_integer(wanted) and column.type != wanted and not _fits(column, wanted):
            return f"column {name} holds numbers that are no {wanted}"
    return ""


def as_written(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return the columns in the types of `SCHEMA`, for whoever reads their buffers and not Python values.

    Raises:
        pa.ArrowException: a value can't be converted.
    """
    fields = [SCHEMA.field(name) for name in batch.schema.names]
    columns = [
        column if column.type == field.type else _decoded(column).cast(field.type)
        for field, column in zip(fields, batch.columns, strict=True)
    ]
    return pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))


def _decoded(column: pa.Array) -> pa.Array:
    return column.dictionary_decode() if pa.types.is_dictionary(column.type) else column


def _text(column: pa.Array) -> pa.Array:
    text = _decoded(column)
    return text.cast(pa.string()) if pa.types.is_string_view(text.type) else text


def _is_object(text: str) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except ValueError:  # orjson knows neither NaN nor lone surrogates
        try:
            return isinstance(json.loads(text), dict)
        except (ValueError, RecursionError):
            return False


def _has_empty_parts(column: pa.Array) -> bool:
    messages = pc.list_flatten(column)
    return bool(messages.null_count or pc.struct_field(messages, "role").null_count)


def _fits(column: pa.Array, wanted: pa.DataType) -> bool:
    try:
        column.cast(wanted)
    except pa.ArrowInvalid:
        return False
    return True
