"""Test the text of tokens, and the search for stop sequences, against the whole bytes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from harvester.mock_teacher.neural.pieces import StopSearch, text_pieces

PIECES = st.lists(
    st.sampled_from([b"a", b"ab", b"b", b"\xc3", b"\xa9", b"\xff", b"\xf0\x9f", b"\x98\x80", b""])
)
WORDS = st.lists(st.sampled_from(["a", "ab", "ba", "aab", "abab", "\u00e9"]), max_size=3)


@given(PIECES)
def test_the_pieces_join_to_the_decoded_whole(raw: list[bytes]) -> None:
    pieces = text_pieces(raw)
    assert len(pieces) == len(raw)
    assert "".join(pieces) == b"".join(raw).decode(errors="replace")


def test_a_split_character_is_in_its_last_piece_and_a_broken_one_repeats_nothing() -> None:
    assert text_pieces([b"a", b"\xc3", b"\xa9", b"b"]) == ["a", "", "\u00e9", "b"]
    assert text_pieces([b"\xff", b"a", b"b"]) == ["\ufffd", "a", "b"]


@given(PIECES, WORDS)
def test_a_stop_sequence_is_found_with_the_piece_that_completes_it(
    raw: list[bytes], words: list[str]
) -> None:
    search, whole = StopSearch(words), b""
    for data in raw:
        whole += data
        search.add(data)
        places = [at for word in words if (at := whole.find(word.encode())) >= 0]
        assert search.at == min(places, default=None)
        if search.at is not None:
            break
