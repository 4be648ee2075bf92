"""Compare an answer with its reference. Pure functions that take linear time.

A comparison that finds no reference it can use returns None: the answer can't be verified.
"""

from __future__ import annotations

import re
import unicodedata
from decimal import Decimal, InvalidOperation

_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)?(?:\.[0-9]+)?(?:[eE][-+]?[0-9]{1,4})?")
_STARTS_NUMBER = re.compile(r"[-+]?\.?[0-9]")
_SPACE = re.compile(r"\s+")
# Code points: Thai and Lao; Burmese; Khmer; kana and CJK; CJK of plane 2 and 3.
_SCRIPTS_WITHOUT_SPACES = (
    (0x0E00, 0x0EFF),
    (0x1000, 0x109F),
    (0x1780, 0x17FF),
    (0x3040, 0x30FF),
    (0x3400, 0x9FFF),
    (0xF900, 0xFAFF),
    (0x20000, 0x3FFFF),
)
# Longest number that is read, in characters.
_LONGEST_NUMBER = 400


def is_exact(answer: str, reference: str) -> bool:
    """Whether both are equal but for white space around them."""
    return answer.strip() == reference.strip()


def normalise(text: str) -> str:
    """Return a text in NFKC, with case folded, white space collapsed, and no punctuation around it."""
    # Folding takes some letters apart, such as a Turkish capital I with its dot.
    composed = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    folded = _SPACE.sub(" ", composed).strip()
    start, end = 0, len(folded)
    while start < end and _is_around(folded[start]):
        start += 1
    while end > start and _is_around(folded[end - 1]):
        end -= 1
    return folded[start:end]


def _is_around(character: str) -> bool:
    return character.isspace() or character in ".,;:!?\"'`*()[]{}<>«»„“”‚‘’"


def is_normalised_equal(answer: str, reference: str) -> bool:
    """Whether both are equal once normalised. Two texts without a letter are compared as they are."""
    ours, theirs = normalise(answer), normalise(reference)
    return ours == theirs if theirs else is_exact(answer, reference)


def contains_reference(answer: str, reference: str) -> bool | None:
    """Whether the normalised reference occurs in the normalised answer as whole words.

    "The capital of Ghana is Accra." contains "accra"; "13.12" and "-12" don't contain "12". An answer that
    denies the reference, or lists several, contains it too: use it where answers are short sentences.

    Returns:
        None: the reference has no letter or digit.
    """
    whole, part = normalise(answer), normalise(reference)
    if not any(character.isalnum() for character in part):
        return None
    at = whole.find(part)
    while at >= 0:
        if not _goes_on_before(whole, at) and not _goes_on_after(whole, at + len(part)):
            return True
        at = whole.find(part, at + 1)
    return False


def _goes_on_before(text: str, at: int) -> bool:
    """Whether a word or number goes on to the left of a place; a minus sign belongs to its number."""
    if not at:
        return False
    before, first = text[at - 1], text[at]
    if before.isdigit() or not first.isdigit():
        return _is_one_word(before, first)
    is_inside_number = before in ".," and at > 1 and text[at - 2].isdigit()
    is_sign = before == "-" and (at == 1 or not text[at - 2].isalnum())
    return is_inside_number or is_sign or _is_one_word(before, first)


def _goes_on_after(text: str, at: int) -> bool:
    if at >= len(text):
        return False
    last, after = text[at - 1], text[at]
    is_inside_number = last.isdigit() and after in ".," and at + 1 < len(text) and text[at + 1].isdigit()
    return is_inside_number or _is_one_word(last, after)


def _is_one_word(left: str, right: str) -> bool:
    """Whether two neighbouring characters belong to one word. Scripts without spaces have no word borders."""
    return left.isalnum() and right.isalnum() and not (has_no_spaces(left) or has_no_spaces(right))


def has_no_spaces(character: str) -> bool:
    """Whether a character belongs to a script that writes no spaces between words (CJK, kana, Thai, ...)."""
    code = ord(character)
    return any(first <= code <= last for first, last in _SCRIPTS_WITHOUT_SPACES)


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text; None if there is none. `1,234.5` and `6e-3` are numbers."""
    found = None
    at = 0
    while (start := _STARTS_NUMBER.search(text, at)) is not None:
        match = _NUMBER.match(text, start.start())
        assert match is not None
        at = max(match.end(), start.end())
        digits = match.group()
        # A hyphen between two characters of a word or number is no sign: 2020-11-29.
        if digits[0] in "+-" and start.start() and text[start.start() - 1].isalnum():
            digits = digits[1:]
        if len(digits) <= _LONGEST_NUMBER:
            try:
                found = Decimal(digits.replace(",", ""))
            except InvalidOperation:
                continue
    return found


def is_number_near(answer: str, reference: str, tolerance: float, relative: float) -> bool | None:
    """Whether the last numbers of both differ by no more than the tolerance; None: the reference has none."""
    expected, given = last_number(reference), last_number(answer)
    if expected is None:
        return None
    if given is None:
        return False
    allowed = max(Decimal(tolerance), Decimal(relative) * abs(expected))
    return abs(given - expected) <= allowed


def chosen_letter(text: str, choices: str) -> str | None:
    """Return the letter that an answer to a multiple choice names; None if that is not clear.

    It is the last one after "answer is" or "answer:", else the letter that the text is, begins with, as
    "B. ..." and "(B) ...", or ends with, else the only one in brackets.
    """
    letter = f"([{choices}])"
    named = re.findall(rf"(?i:answer)\s{{0,9}}(?i:is)?\s{{0,9}}:?[\s*]{{0,9}}\(?{letter}(?![\w'])", text)
    if named:
        return str(named[-1])
    whole = text.strip().strip("*").strip()
    begins = re.match(rf"\(?{letter}(?:[).:,]|\s*$)", whole)
    if begins:
        return begins.group(1)
    ends = re.search(rf"(?:^|[\s(*]){letter}\)?\.?$", whole[-5:])
    if ends:
        return ends.group(1)
    bracketed = set(re.findall(rf"\({letter}\)", text))
    return bracketed.pop() if len(bracketed) == 1 else None


def is_choice(answer: str, reference: str, choices: str) -> bool | None:
    """Whether an answer names the reference's letter; None: the reference names none."""
    expected = chosen_letter(reference, choices)
    return None if expected is None else chosen_letter(answer, choices) == expected
