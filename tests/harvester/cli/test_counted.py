"""Test that one of a thing is not called several."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from harvester.mock_teacher.running import RunningMock
from tests.journey.run_process import harvester, write_folder


def test_one_answer_is_not_called_answers(mock_teacher: Callable[..., RunningMock], tmp_path: Path) -> None:
    config = write_folder(tmp_path, mock_teacher(accuracy=1.0).base_url, 1)
    store = tmp_path / "store"
    shown = [
        harvester("run", config).stdout,
        *(harvester(verb, store).stdout for verb in ("status", "verify", "seal")),
        harvester("export", store, tmp_path / "out").stdout,
    ]
    for text in shown:
        assert not re.search(r"\b1 (answers|requests|rows|shards|findings|files)\b", text), text
    assert "1 request sent, 1 answer stored" in shown[0]
