"""`data/FORMAT.md` lists what the code recognises in an answer."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from harvester.api import error_fields
from harvester.api.replies import logprobs, usage
from harvester.api.shapes import envelopes, finish, parts, thoughts, turn_marks
from harvester.api.shapes.finish import FINISH_WORDS, Finish

FORMAT = Path(__file__).parents[3] / "data" / "FORMAT.md"
BEGIN, END = "<!-- recognised: begin -->\n", "<!-- recognised: end -->\n"


def code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def words_of(finish: Finish) -> str:
    return code(word for word, kind in FINISH_WORDS.items() if kind is finish)


def rows() -> list[tuple[str, str]]:
    """What is recognised and where, in the order in which it is asked."""
    tags = (f"`{opening}` … `{closing}`" for opening, closing in thoughts.THINK_TAGS)
    return [
        ("envelopes of the whole answer", code(envelopes.ENVELOPES)),
        ("text of an answer without choices", code(envelopes.BARE_TEXT_MEMBERS)),
        ("members of the finish word", code(finish.FINISH_MEMBERS)),
        ("no finish word", code(sorted(finish.NO_WORDS))),
        ("finish words: complete", words_of(Finish.END)),
        ("finish words: a tool call", words_of(Finish.TOOLS)),
        ("finish words: `truncated`", words_of(Finish.CUT)),
        ("finish words: `filtered`", words_of(Finish.FILTER)),
        ("finish words: `refused`", words_of(Finish.REFUSAL)),
        ("finish words: a break, asked again", words_of(Finish.BROKEN)),
        ("parts with text", code(sorted(parts.TEXT_PARTS))),
        ("parts with reasoning", code(sorted(parts.REASONING_PARTS))),
        ("parts with a refusal", code(sorted(parts.REFUSAL_PARTS))),
        ("parts that are tool calls", code(sorted(parts.TOOL_PARTS))),
        ("parts without text", code(sorted(parts.SILENT_PARTS))),
        ("members of a part with its text", code(parts.TEXT_MEMBERS)),
        ("members of a part with its reasoning", code(parts.REASONING_TEXT_MEMBERS)),
        ("reasoning in a message", code(parts.REASONING_MEMBERS)),
        ("reasoning inside the text", ", ".join(tags)),
        ("marks of a chat template, taken off the end", code(turn_marks.END_MARKS)),
        ("and off the start", code(turn_marks.OPENING_MARKS)),
        ("log-probabilities, one for each token", code(logprobs.PER_TOKEN_MEMBERS)),
        ("token counts", code(usage.USAGE_MEMBERS)),
        ("input tokens", code(usage.INPUT_MEMBERS)),
        ("output tokens", code(usage.OUTPUT_MEMBERS)),
        ("cached tokens", code(usage.CACHED_MEMBERS)),
        ("reasoning tokens", code(usage.REASONING_MEMBERS)),
        ("total tokens", code(usage.TOTAL_MEMBERS)),
        ("errors: at the top, in a choice, in a message", code(error_fields.ERROR_MEMBERS)),
        ("errors: envelopes", code(("base_resp", "promptFeedback", *error_fields.ERROR_ENVELOPES))),
        ("errors: code", code(error_fields.CODE_MEMBERS)),
        ("errors: type", code(error_fields.TYPE_MEMBERS)),
        ("errors: words", code(error_fields.MESSAGE_MEMBERS)),
    ]


def table() -> str:
    lines = ["| what | recognised |", "|---|---|"]
    lines += [f"| {what} | {recognised.replace('|', chr(92) + '|')} |" for what, recognised in rows()]
    return "\n".join(lines) + "\n"


def test_the_format_lists_what_is_recognised() -> None:
    text = FORMAT.read_text(encoding="utf-8")
    written = text.partition(BEGIN)[2].partition(END)[0]
    assert written == table(), "write the table of this test between the marks of data/FORMAT.md"
