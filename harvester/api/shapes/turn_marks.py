"""Take the marks of a chat template off an answer that a server forgot to take off. Pure."""

from __future__ import annotations

import re

from harvester.api.shapes.thoughts import marks_in

# Ends of a turn.
END_MARKS = (
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end|>",
    "<|return|>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|END_OF_TURN_TOKEN|>",
    "<end_of_turn>",
    "<turn|>",
    "<｜end▁of▁sentence｜>",
    "[|endofturn|]",
    "</s>",
    "<eos>",
)
# Beginnings of the answer's own turn.
OPENING_MARKS = (
    "<|im_start|>assistant",
    "<|start_header_id|>assistant<|end_header_id|>",
    "<start_of_turn>model",
    "<|turn>model",
    "<|start|>assistant",
    "<|channel|>final<|message|>",
    "[|assistant|]",
)

# How every mark begins.
_ANY = re.compile(r"<\||<｜|</s>|<e(?:os>|nd_of_turn>)|<start_of_turn>|<turn\|>|\[\|")
# A mark at the end lies within so many characters, with white space around it.
_LONGEST_END = 100
# So many are taken off one end; more are no slip of a server.
_MOST_MARKS = 8
_AT_END = re.compile(rf"(?:\s*[\r\n]\s*|(?<!\s))(?:{'|'.join(map(re.escape, END_MARKS))})\s*\Z")
_AT_START = re.compile(rf"\s*(?:{'|'.join(map(re.escape, OPENING_MARKS))})\s*")
# HTML that `</s>` ends.
_STRUCK = re.compile(r"<s(?:>|\s)", re.IGNORECASE)
_ROLES = "(?:user|assistant|system|developer|tool|model|analysis|final|commentary)"
# The beginning of a further turn: the model went on as if it were asked again.
_NEXT_TURN = re.compile(
    rf"(?:<\|im_start\|>|<\|start_header_id\|>|<start_of_turn>|<\|turn>|<\|start\|>|<\|channel\|>){_ROLES}\b"
)


def without_marks(text: str) -> tuple[str, bool]:
    """Return an answer without the marks around it, and whether no mark of a further turn is left in it.

    A mark after a space is text: a sentence may end with the name of one. So are marks in code and quotes.
    """
    if ("<" not in text and "[|" not in text) or _ANY.search(text) is None:  # nearly all answers
        return text, True
    start, end = 0, len(text)
    for _ in range(_MOST_MARKS):
        if opening := _AT_START.match(text, start):
            start = opening.end()
    for _ in range(_MOST_MARKS):
        ending = _AT_END.search(text, max(start, end - _LONGEST_END), end)
        if ending is None:
            break
        end = ending.start()
    if text.endswith("</s>", 0, len(text.rstrip())) and (
        _STRUCK.search(text) is not None or text.find("</s>", start, end) >= 0
    ):
        end = len(text)  # HTML: struck through
    text = text[start:end]
    return text, _is_literal(text)


def _is_literal(text: str) -> bool:
    """Whether all beginnings of turns in a text are in code or between quotes."""
    return all(is_literal for _, is_literal in marks_in(text, _NEXT_TURN))
