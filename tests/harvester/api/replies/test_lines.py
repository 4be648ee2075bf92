"""Splitting a body into lines gives the lines that `bytes.splitlines` gives."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.api.replies import lines

_TEXTS = st.lists(st.sampled_from([b"\n", b"\r", b"\r\n", b"a", b"data: x", b"\x0b", b"\x85"]), max_size=40)


@given(parts=_TEXTS, piece=st.integers(1, 12))
def test_lines_are_those_of_splitlines_wherever_a_piece_ends(parts: list[bytes], piece: int) -> None:
    raw = b"".join(parts)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "PIECE", piece)
        assert list(lines.split_lines(raw)) == raw.splitlines()


def test_a_large_body_is_split_in_pieces() -> None:
    raw = b":x\n" * lines.PIECE
    tracemalloc.start()
    try:
        assert sum(1 for _ in lines.split_lines(raw)) == lines.PIECE
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 6 << 20  # bytes; all lines at once take 11 MiB
