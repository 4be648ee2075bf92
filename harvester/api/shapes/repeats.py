"""Take out what a stream sends twice: all text so far, each delta, or everything again at its end. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

# Fewest pieces, and letters of a whole text, from which chance can't explain the repetition.
FEWEST_PIECES = 3
FEWEST_CHARS = 12


def without_repeats(pieces: Sequence[str], *, ends: int = 1) -> tuple[list[str], bool]:
    """Return the pieces of a text without what repeats earlier ones, and whether it is clear what does.

    A few short pieces that look like it may be text: all are returned, and it is not clear. Two equal ones
    are text: many tokenizers take digits one by one.

    Args:
        ends: how many chunks gave a finish reason. Several of them, and pieces that all come twice, are those
            of a gateway that sends everything twice.
    """
    given = [piece for piece in pieces if piece]
    if len(given) < 2:
        return given, True
    if given[::2] == given[1::2]:
        once = given[::2]
        is_long = is_beyond_chance("".join(once))
        if ends > 1 and is_long:
            return without_repeats(once)
        if ends > 1 or (is_long and len(once) >= FEWEST_PIECES):
            return given, False
    if _grow(given):
        growing = [given[0], *(later for earlier, later in pairwise(given) if later != earlier)]
        if len(growing) > 1 and growing[-2].strip():
            is_clear = len(growing) >= FEWEST_PIECES and _is_varied(growing[-1])
            return (growing[-1:] if is_clear else given), is_clear
    *before, last = given
    if len(before) > 1 and last.strip() and last == "".join(before):
        is_clear = len(before) >= FEWEST_PIECES and len(last) >= FEWEST_CHARS and _is_varied(last)
        return (before if is_clear else given), is_clear
    return given, True


def is_beyond_chance(text: str) -> bool:
    """Whether a text is too long, and too varied, to be sent in equal pairs by chance."""
    return len(text) >= FEWEST_CHARS and _is_varied(text)


def _grow(pieces: Sequence[str]) -> bool:
    """Whether each piece begins with the one before it."""
    return all(later.startswith(earlier) for earlier, later in pairwise(pieces))


def _is_varied(text: str) -> bool:
    """Whether a text is more than one or two characters again and again."""
    return len(set(text)) > 2
