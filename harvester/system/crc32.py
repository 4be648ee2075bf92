"""Find which byte changed, from how a CRC-32 differs. Pure.

The CRC-32 of zlib, gzip and Parquet: reflected, with the polynomial 0xEDB88320 (RFC 1952, section 8).
"""

from __future__ import annotations

from collections.abc import Iterator

_POLYNOMIAL = 0xEDB88320


def single_byte_changes(difference: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield the changes of one byte, each of which alone gives this difference of two CRC-32.

    A change of the byte at a distance d from the end gives its entry of the table, shifted by d zero bytes;
    the shift is undone a byte at a time.

    Args:
        difference: XOR of the two values.
        length: number of bytes.

    Yields:
        The distance of the byte from the last one, ascending, and the XOR of its two values.
    """
    state = difference
    for distance in range(length):
        change = _BYTE_OF.get(state)
        if change is not None:
            yield distance, change
        index = _INDEX_OF_TOP[state >> 24]
        state = (((state ^ _TABLE[index]) << 8) | index) & 0xFFFFFFFF


def _after_byte(state: int) -> int:
    for _ in range(8):
        state = (state >> 1) ^ (_POLYNOMIAL if state & 1 else 0)
    return state


_TABLE = [_after_byte(byte) for byte in range(256)]
_BYTE_OF = {value: byte for byte, value in enumerate(_TABLE) if byte}
_INDEX_OF_TOP = {value >> 24: byte for byte, value in enumerate(_TABLE)}
