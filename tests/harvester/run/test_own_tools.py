"""Send the tools of a prompt line with it, and follow them into store, export and training data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from harvester.mock_teacher.running import RunningMock
from harvester.store.reader import Corpus
from tests.journey.run_process import harvester, write_folder
from trainer.data.conversation import can_be_restored, conversation_of


def tool(name: str) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}


COMMON = '[{type = "function", function = {name = "common", parameters = {type = "object"}}}]'
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJDREVG"}}


def test_tools_and_images_of_a_line_are_sent_stored_exported_and_learned_or_left_out(
    tmp_path: Path, mock_teacher: Callable[..., RunningMock]
) -> None:
    path = write_folder(tmp_path, mock_teacher(accuracy=1.0).base_url, 0)
    config = path.read_text().replace("[sampling]\n", f"[sampling]\ntools = {COMMON}\n")
    path.write_text(config)
    ask = {"role": "user", "content": "What is 10 + 30?"}
    look = {"role": "user", "content": [{"type": "text", "text": "What is 10 + 30?"}, PICTURE]}
    rows = [
        {"id": "plain", "prompt": "What is 10 + 30?"},
        {"id": "own", "messages": [ask], "tools": [tool("add")], "tool_choice": "none", "level": 1},
        {"id": "other", "messages": [ask], "tools": [tool("sub")], "temperature": 0.5},
        {"id": "column", "prompt": "What is 11 + 30?", "tools": ["hammer", "saw"]},
        {"id": "picture", "messages": [look]},
    ]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    planned = json.loads(harvester("plan", path, "--json").stdout)
    assert (planned["rows"], planned["duplicates"]) == (5, 0)
    for words in ("a field 'temperature', which is not sent", "a field 'tools', which is not in the form"):
        assert any(words in note for note in planned["warnings"])
    assert harvester("run", path).returncode == 0
    samples = {sample.prompt_id: sample for sample in Corpus.open(tmp_path / "store").samples()}
    sent = {name: json.loads(sample.request_json) for name, sample in samples.items()}
    names = {name: body["tools"][0]["function"]["name"] for name, body in sent.items()}
    assert names == {"plain": "common", "own": "add", "other": "sub", "column": "common", "picture": "common"}
    assert {name for name, body in sent.items() if "tool_choice" in body} == {"own"}
    assert {body["temperature"] for body in sent.values()} == {0.0}
    assert samples["own"].metadata == {"level": 1}
    assert samples["column"].metadata == {"tools": ["hammer", "saw"]}
    # A second run sends nothing: the keys hold the tools, and no two rows share one.
    again = json.loads(harvester("plan", path, "--json").stdout)
    assert (again["cached"], again["duplicates"]) == (5, 0)
    # What the trainer reads: tools in the template's place, and no picture as text.
    assert [t["function"]["name"] for t in conversation_of(samples["own"]).tools] == ["add"]
    assert not can_be_restored(samples["picture"])
    exported = harvester("export", tmp_path / "store", tmp_path / "out", "--to", "openai")
    assert exported.returncode == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    by_tool = {line["tools"][0]["function"]["name"]: line for line in lines if line["messages"][0] == ask}
    assert by_tool["sub"]["tools"] == [tool("sub")]
    assert [line["messages"][0] for line in lines if line["messages"][0] == look] == [look]
    refused = harvester("export", tmp_path / "store", tmp_path / "flat", "--to", "messages")
    assert refused.returncode == 2
    assert "5 request_has_tools" in refused.stderr
