"""Put back the one bit of a journal row that changed, where its CRC-32 shows which one it was. Pure.

A CRC-32 has another value for each single bit that changes in up to 2**32 bits. So if exactly one bit of a
row changed, exactly one change makes its checksum right again. Where more changed, one of the n bits of a row
matches by chance with the probability n / 2**32: 2 in a million for a row of a kilobyte. Longer rows than
`MOST_BYTES` are not mended.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from harvester.store.journal.checksums import checksum, is_unchanged
from harvester.system.crc32 import single_byte_changes

MOST_BYTES = 64 * 1024
_INTEGER_BITS = 64


def mended_row(values: Sequence[Any], short: int, check: object) -> tuple[list[Any], int] | None:
    """Return the values and the checksum of a row before one bit of it changed; None where that is unknown.

    Args:
        values: as they are, in the order of `checksums.COVERED`.
        short: how many of the first belong to the JSON part of the checksum.
    """
    if not isinstance(check, int) or not all(isinstance(value, str | bytes) for value in values[short:]):
        return None
    if sum(len(value) for value in values if isinstance(value, str | bytes)) > MOST_BYTES:
        return None
    texts = [value.encode() if isinstance(value, str) else value for value in values[short:]]
    try:
        actual = checksum(values[:short], *texts)
    except (TypeError, ValueError):
        return None
    if (actual ^ check).bit_count() == 1:  # the checksum itself changed
        return list(values), actual
    matches = list(_with_one_bit_less(values, short, texts, actual ^ check))
    return (matches[0], check) if len(matches) == 1 else None


def _with_one_bit_less(
    values: Sequence[Any], short: int, texts: Sequence[bytes], difference: int
) -> Iterator[list[Any]]:
    """Yield every row that differs in one bit of one column and has the right checksum."""
    check = checksum(values[:short], *texts) ^ difference
    for column, value in enumerate(values[:short]):
        for other in _one_bit_apart(value):
            row = [*values[:column], other, *values[column + 1 :]]
            if is_unchanged(row, short, check):
                yield row
    for end_distance, change in single_byte_changes(difference, sum(map(len, texts))):
        if change.bit_count() > 1:
            continue
        place = sum(map(len, texts)) - 1 - end_distance
        row = list(values)
        for column, text in enumerate(texts, start=short):
            if place < len(text):
                changed = bytearray(text)
                changed[place] ^= change
                row[column] = _like(values[column], bytes(changed))
                break
            place -= len(text)
        if is_unchanged(row, short, check):
            yield row


def _one_bit_apart(value: Any) -> Iterator[Any]:
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int):
        for bit in range(_INTEGER_BITS):
            other = (value ^ (1 << bit)) & ((1 << _INTEGER_BITS) - 1)
            yield other - (1 << _INTEGER_BITS) if other >> (_INTEGER_BITS - 1) else other
    elif isinstance(value, str):
        text = value.encode()
        for place in range(len(text)):
            for bit in range(8):
                changed = bytearray(text)
                changed[place] ^= 1 << bit
                if (other_text := _like(value, bytes(changed))) is not None:
                    yield other_text


def _like(value: Any, data: bytes) -> Any:
    """Return the bytes as a value of the same type; None where they are no text."""
    if isinstance(value, bytes):
        return data
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
