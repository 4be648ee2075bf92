"""Test what a watching run reads from its folder at each check, and that it reports each fault once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from harvester.api.types import Request
from harvester.config.config import HarvestConfig
from harvester.prompts.feed import PromptFeed


class Looks:
    """An inbox of a folder; each call is one look at it."""

    def __init__(self, root: Path, *files: str) -> None:
        teacher = {"base_url": "http://127.0.0.1:1/v1", "model": "m"}
        config = HarvestConfig.model_validate({"teacher": teacher, "prompts": {"files": list(files)}})
        self.complaints: list[str] = []
        self._feed: Iterator[Request | None] = PromptFeed(
            config, root, lambda error: self.complaints.append(str(error))
        ).watched()

    def __call__(self) -> list[str]:
        """Texts of the requests of this look."""
        return [
            str(request.body["messages"][0]["content"]) for request in iter(lambda: next(self._feed), None)
        ]

    def settled(self) -> list[str]:
        """Those of the look that sees the last change, and of the next, which takes it."""
        return self() + self()


def test_a_path_that_is_no_file_is_reported_once_and_ends_nothing(tmp_path: Path) -> None:
    look = Looks(tmp_path, "*.jsonl", "more/*.jsonl")
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n')
    assert look() == ["one"]
    os.mkfifo(tmp_path / "b.jsonl")
    (tmp_path / "c.jsonl").mkdir()
    (tmp_path / "d.jsonl").symlink_to(tmp_path / "d.jsonl")
    (tmp_path / "e.jsonl").symlink_to("nowhere")
    (tmp_path / "more").write_text("a file where a folder was")
    (tmp_path / "f.jsonl").write_text('{"prompt": "two"}\n')
    assert look.settled() == ["two"]
    assert look() == []
    assert [complaint.partition(" is a ")[0] for complaint in look.complaints] == [f"{tmp_path}/b.jsonl:"]


def test_a_folder_that_cannot_be_looked_at_is_a_complaint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "one"}\n')
    look = Looks(tmp_path, "*.jsonl")
    assert look() == ["one"]
    glob = Path.glob

    def refuse(folder: Path, pattern: str) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "glob", refuse)
    assert look() + look() == []
    monkeypatch.setattr(Path, "glob", glob)
    (tmp_path / "b.jsonl").write_text('{"prompt": "two"}\n')
    assert look.settled() == ["two"]
    assert len(look.complaints) == 1
    assert "Permission denied" in look.complaints[0]


@pytest.mark.parametrize(("name", "head"), [("a.txt", ""), ("a.csv", "prompt,level\n")])
def test_half_a_line_of_text_is_no_prompt(tmp_path: Path, name: str, head: str) -> None:
    path = tmp_path / name
    path.write_text(head + "whole\nto")
    look = Looks(tmp_path, name)
    assert look() == ["whole"]
    assert look.complaints[-1].startswith(f"{name}:{2 + bool(head)}: the last line has no end yet")
    path.write_text(head + "whole\ntorn no more")
    assert look.settled() == []
    path.write_text(head + "whole\ntorn no more\n")
    assert look.settled() == ["torn no more"]


def test_a_line_whose_reference_changes_is_taken_again(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "one", "reference": "1"}\n{"prompt": "two"}\n')
    look = Looks(tmp_path, "a.jsonl")
    assert look() == ["one", "two"]
    path.write_text('{"prompt": "one", "reference": "one"}\n{"prompt": "two"}\n')
    assert look.settled() == ["one"]
    path.write_text('{"prompt": "one", "reference": "one"}\n{"prompt": "two", "tags": ["t"]}\n')
    assert look.settled() == ["two"]
    assert look.complaints == []
