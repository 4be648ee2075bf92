"""Test that lines are wrapped for a terminal, and for nothing else."""

from __future__ import annotations

import io
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.cli import main
from harvester.system.command_line.wrapped import for_terminal, wrapped

LINES = st.lists(st.text("ab,-:", min_size=1, max_size=30), min_size=1).map(" ".join)


@given(LINES, st.integers(0, 12), st.integers(60, 120))
def test_no_word_is_cut_lost_or_beyond_the_width(text: str, indent: int, width: int) -> None:
    line = " " * indent + "label     " + text
    parts = wrapped(line, width)
    assert " ".join(parts).split() == line.split()
    longest = max(map(len, text.split()))
    assert all(len(part) <= max(width, indent + 10 + longest) for part in parts)
    if len(line) > width:
        assert all(part.startswith(" " * (indent + 10)) for part in parts[1:])


def test_a_file_gets_each_line_as_it_is() -> None:
    assert for_terminal(["word " * 100], io.StringIO()) == ["word " * 100]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_of_80_columns_shows_tables_and_lines_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for words in (["terms", "list"], ["terms", "show", "qwen3-apache"], ["explain", "5"]):
        terminal = Terminal()
        with monkeypatch.context() as patch:
            patch.setattr("sys.argv", ["harvester", *words])
            patch.setattr("sys.stdout", terminal)
            with pytest.raises(SystemExit):
                main.main()
        lines = terminal.getvalue().splitlines()
        assert len(lines) > 5
        assert [line for line in lines if len(line) > 80 and not re.search(r"\S{50}", line)] == []
