"""Read the fenced blocks of a document, and what a comment before a block says about testing it.

A comment stands on the line before the block, or one line above that:

    <!-- test: write my-run/curate.toml -->      the block is this file
    <!-- test: into my-run/harvest.toml -->      the TOML is merged into this file, and must be valid there
    <!-- test: exit 2 -->                        the last command ends with this code
    <!-- test: slow -->                          run by the slow tests only; also `long`
    <!-- test: parse, needs systemd -->          not run; checked for syntax, for this reason

    <!-- setup: cp -a "$ROOT/data/base" base -->  is run by bash, and shown nowhere

Blocks without a comment are run, in order, in one folder for each document: `console` (lines that begin with
`$ `), `python`, and `toml`, which is merged into my-run/harvest.toml.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r"^<!-- setup: (?P<setup>.+?) -->$|"
    r"(?:^<!-- test: (?P<what>[^>]+?) -->\n\n?)?^```(?P<language>[\w-]*)[^\n]*\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
# Languages of blocks that hold nothing to run: drawings, output, statements of a format, Sphinx directives.
SHOWN = frozenset({"", "text", "sql", "json"})


@dataclass(frozen=True, eq=False)
class Block:
    """A fenced block.

    Attributes:
        place: document and line, for messages.
        language: the word behind the fence.
        text: what it holds.
        action: "run", "write", "into", "exit", "slow", "long" or "parse".
        argument: of the action: a path, an exit code or a reason.
    """

    place: str
    language: str
    text: str
    action: str
    argument: str

    @property
    def commands(self) -> list[str]:
        """The commands of a console block; a line that ends with a backslash goes on."""
        joined = self.text.replace("\\\n", " ")
        return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


def blocks(path: Path, root: Path) -> list[Block]:
    """Return the blocks of a document that hold something to test."""
    text = path.read_text(encoding="utf-8")
    found = []
    for match in _BLOCK.finditer(text):
        if match["setup"]:
            found.append(Block(path.name, "setup", match["setup"], "run", ""))
            continue
        action, _, argument = (match["what"] or "run").replace(",", "", 1).partition(" ")
        line = text.count("\n", 0, match.start("language")) + 1
        place = f"{path.relative_to(root)}:{line}"
        if match["language"] not in SHOWN or match["what"]:
            found.append(Block(place, match["language"], match["text"], action, argument))
    return found
