"""Test that a changed byte is found from the difference of two CRC-32, as zlib computes them."""

from __future__ import annotations

import zlib

from hypothesis import given
from hypothesis import strategies as st

from harvester.system.crc32 import single_byte_changes


@given(st.binary(min_size=1, max_size=300), st.data())
def test_exactly_the_change_of_one_byte_is_found(content: bytes, data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(content) - 1))
    change = data.draw(st.integers(1, 255))
    changed = bytearray(content)
    changed[place] ^= change
    difference = zlib.crc32(content) ^ zlib.crc32(changed)
    assert list(single_byte_changes(difference, len(content))) == [(len(content) - 1 - place, change)]
