"""Normalise texts for comparison, and cut them into words and shingles. Pure."""

from __future__ import annotations

import functools
import re
import unicodedata

# Characters of a shingle: of most scripts, and of scripts without spaces, where a character says more.
SHINGLE = 5
SHINGLE_WITHOUT_SPACES = 3

# Scripts written without spaces between words: Thai, Lao, Burmese, Khmer, Han, kana, and their extensions.
# Korean has spaces.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u2e80-\ua4cf\uf900-\ufaff\U00020000-\U0003ffff"
_IN_UNSPACED = f"[{_UNSPACED}]"
# A word: a run of letters and digits; a character alone where the script has no spaces.
_WORD = rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w)+"
_SPACED_WORD = rf"[{_UNSPACED}]|[^\s{_UNSPACED}]+"
_ASCII_WORD = re.compile(r"\w+", re.ASCII)
_NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
_OF_LENGTH = {
    length: re.compile(f".{{{length}}}", re.DOTALL).findall for length in (SHINGLE, SHINGLE_WITHOUT_SPACES)
}


@functools.cache
def _compiled(pattern: str) -> re.Pattern[str]:
    """Compile a pattern when it is first needed: those above take 7 ms of every start."""
    return re.compile(pattern)


def normalised(text: str) -> str:
    """Fold Unicode form (NFKC), case and white space; texts that a reader can't tell apart become equal."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.casefold().split())


def words_of(text: str) -> list[str]:
    """Split a normalised text into words, without punctuation.

    A character of a script without spaces, such as Chinese or Thai, is a word.
    """
    return (_ASCII_WORD if text.isascii() else _compiled(_WORD)).findall(text)


def spaced_words(text: str) -> list[str]:
    """Split a text at white space, without removing punctuation.

    A character of a script without spaces is a word.
    """
    return _compiled(_SPACED_WORD).findall(text)


def numbers_in(text: str) -> tuple[str, ...]:
    """Return the numbers of a text, in order. Texts that differ in one are never near duplicates."""
    return tuple(_NUMBER.findall(text))


def shingles_of(text: str) -> list[str]:
    """Return all runs of a few characters in a normalised text, with repetitions; a shorter text is one run.

    Runs are short where at least half of the characters belong to a script without spaces.
    """
    length = SHINGLE
    if not text.isascii() and 2 * len(_compiled(_IN_UNSPACED).findall(text)) >= len(text):
        length = SHINGLE_WITHOUT_SPACES
    if len(text) <= length:
        return [text]
    find = _OF_LENGTH[length]
    shingles: list[str] = []
    for start in range(length):
        shingles += find(text, start)
    return shingles
