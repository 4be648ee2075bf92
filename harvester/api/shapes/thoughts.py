"""Find reasoning between tags inside the text of an answer."""

from __future__ import annotations

import re
from collections.abc import Iterator

# Tags around reasoning inside the text: opening and closing.
THINK_TAGS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("[THINK]", "[/THINK]"),
    ("<seed:think>", "</seed:think>"),
    ("<mm:think>", "</mm:think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<unused94>thought", "<unused95>"),
    ("<|channel>thought", "<channel|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
)

_MARK = re.compile(
    "|".join(re.escape(tag) for pair in THINK_TAGS for tag in sorted(pair, key=len, reverse=True)),
    re.IGNORECASE,
)
_QUOTES = frozenset({('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("«", "»"), ("„", "“"), ("„", "”")})
_CLOSING = {opening.lower(): closing.lower() for opening, closing in THINK_TAGS}


def split_thoughts(text: str) -> tuple[str, str | None, bool]:
    """Take reasoning between tags out of an answer's text.

    Recognised are blocks at the start of the text or of a line, an opening tag without its closing one (the
    rest is reasoning: the answer was cut in it), and a closing tag without its opening one (what precedes is
    reasoning: the opening tag was part of the prompt). Tags in code or between quotes are text; but where
    nothing else ends a block, the only closing tag does, as reasoning may hold half a quote.

    Returns:
        The text without them, the reasoning (None for none), and whether no tag was left that may be either.
    """
    if _MARK.search(text) is None:
        return text, None, True
    blocks = _ThoughtBlocks(text)
    for match, is_literal in marks_in(text, _MARK):
        blocks.add(match, is_literal=is_literal)
    blocks.end()
    if not blocks.thoughts:
        return text, None, blocks.is_clear
    rest = "".join(part if number == 0 else part.lstrip() for number, part in enumerate(blocks.kept))
    thoughts = "\n\n".join(part.strip() for part in blocks.thoughts if part.strip())
    return rest.lstrip(), thoughts or None, blocks.is_clear


class _ThoughtBlocks:
    """The blocks of reasoning in a text, tag by tag.

    Attributes:
        kept: pieces of the text outside of blocks.
        thoughts: what is in the blocks.
        is_clear: whether no tag was left that may begin or end a block.
    """

    def __init__(self, text: str) -> None:
        self.kept: list[str] = []
        self.thoughts: list[str] = []
        self.is_clear = True
        self._text = text
        self._at = 0
        # Whether there is known to be more than white space after `_at`.
        self._has_text = False
        self._closing = ""
        self._literal_ends: list[re.Match[str]] = []

    def add(self, match: re.Match[str], *, is_literal: bool) -> None:
        """Add the next tag; a literal one is in code or between quotes."""
        mark = match.group().lower()
        if self._closing:
            if mark == self._closing and is_literal:
                self._literal_ends.append(match)
            elif mark == self._closing:
                self._close(match)
        elif is_literal:
            return
        elif mark in _CLOSING:
            self._open(match, _CLOSING[mark])
        elif self.is_clear and not self.thoughts and not self.kept:
            self._close(match)
        else:
            self.is_clear = False

    def end(self) -> None:
        """Add the rest of the text."""
        if self._closing and self._literal_ends:
            self.is_clear = self.is_clear and len(self._literal_ends) == 1
            self._close(self._literal_ends[0])
        (self.thoughts if self._closing else self.kept).append(self._text[self._at :])

    def _open(self, match: re.Match[str], closing: str) -> None:
        if not (self._begins_line(match.start()) or self._is_blank_before(match.start())):
            self.is_clear = False
            return
        self.kept.append(self._text[self._at : match.start()])
        self._at, self._closing, self._literal_ends, self._has_text = match.end(), closing, [], False

    def _begins_line(self, start: int) -> bool:
        """Whether a line begins at `start`, but for spaces and tabs. Looks at these only: tags are many."""
        while start > self._at and self._text[start - 1] in " \t":
            start -= 1
        return start > self._at and self._text[start - 1] == "\n"

    def _is_blank_before(self, start: int) -> bool:
        self._has_text = self._has_text or bool(self._text[self._at : start].strip())
        return not self._has_text

    def _close(self, match: re.Match[str]) -> None:
        self.thoughts.append(self._text[self._at : match.start()])
        self._at, self._closing, self._has_text = match.end(), "", False


def marks_in(text: str, pattern: re.Pattern[str]) -> Iterator[tuple[re.Match[str], bool]]:
    """Yield the matches in a text, and whether each is meant literally: in code, or between quotes."""
    fences, line_start, ticks, checked = 0, 0, 0, 0
    for match in pattern.finditer(text):
        start = match.start()
        fences += text.count("```", checked, start)
        newline = text.rfind("\n", checked, start)
        if newline >= 0:
            line_start, ticks = newline + 1, 0
        ticks += text.count("`", max(checked, line_start), start)
        checked = start
        is_quoted = (text[start - 1 : start], text[match.end() : match.end() + 1]) in _QUOTES
        yield match, fences % 2 == 1 or ticks % 2 == 1 or is_quoted
