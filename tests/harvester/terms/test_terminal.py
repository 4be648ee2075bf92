"""Answer `harvester terms new` and `terms record` at a terminal: wrong answers, Ctrl-D, Ctrl-C."""

from __future__ import annotations

import os
import pty
import select
import sys
import time
from pathlib import Path

import pytest

from harvester.terms import manage
from harvester.terms.permissions import load_permissions
from harvester.terms.records import load_registry

CTRL_C = b"\x03"
RECORD = {
    "layer": ("weight", "weights"),
    "model": ("", "mymodel-7b*"),
    "host": ("*",),
    "licence": ("MIT",),
    "url": ("https://licences.example/mit",),
    "read": ("maybe", "Yes"),
    "verdict": ("Permit", "permit"),
    "gist": ("", "everything is permitted"),
    "source": ("the text",),
    "id": ("My Model", "my-model"),
}
PERMISSION = {
    "id": ("A b", "grant-1"),
    "granted_by": ("", "The Teacher Inc."),
    "basis": ("hope", "contract"),
    "scope": ("training",),
    "host": ("*.example", "api.teacher.example"),
    "model": ("m-*",),
    "uses": ("harvest, resell", "harvest, train"),
    "evidence": ("folder 7",),
    "granted_on": ("soon", "2026-06-01"),
    "expires": ("",),
    "recorded_by": ("A. Operator",),
}


def at_a_terminal(folder: Path, verb: str, answers: list[bytes]) -> tuple[int, str]:
    """Run the command with a terminal; give each answer when a question waits. Returns exit code and text.

    A Ctrl-C is pressed again each second until the command ends: readline does not see one that comes
    between its prompt and its wait for a key.
    """
    child, terminal = pty.fork()
    if child == 0:
        command = [sys.executable, "-m", "harvester", "terms", verb, "--beside", str(folder)]
        os.execvp(command[0], command)
    shown, left, until = b"", list(answers), time.monotonic() + 240
    asked = 0
    while time.monotonic() < until:
        if not select.select([terminal], [], [], 1)[0]:
            if not left and answers[-1] == CTRL_C:
                os.write(terminal, CTRL_C)
            continue
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # the child is gone
            break
        while left and shown.count(b": ") - asked > 0 and shown.endswith(b": "):
            asked = shown.count(b": ")
            os.write(terminal, left.pop(0))
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), shown.decode()


@pytest.mark.parametrize(
    ("verb", "questions", "answers"),
    [("new", manage.RECORD_QUESTIONS, RECORD), ("record", manage.QUESTIONS, PERMISSION)],
)
def test_a_wrong_answer_is_asked_for_again(
    tmp_path: Path, verb: str, questions: tuple[tuple[str, str], ...], answers: dict[str, tuple[str, ...]]
) -> None:
    assert list(answers) == [name for name, _ in questions]
    lines = [f"{answer}\n".encode() for each in answers.values() for answer in each]
    code, text = at_a_terminal(tmp_path, verb, lines)
    assert code == 0, text
    for name, question in questions:
        assert text.count(question) == len(answers[name]), name
    if verb == "new":
        record = load_registry(tmp_path / "terms").find("my-model")
        assert record is not None
        assert record.verdict == "permit"
    else:
        assert [each.id for each in load_permissions(tmp_path / "permissions")] == ["grant-1"]


@pytest.mark.parametrize(
    ("answers", "exit_code", "words"),
    [
        ([b"weights\n", b"\x04"], 2, "nothing was written"),
        ([b"weights\n", CTRL_C], 130, ""),
        ([b"x\n"] * 9, 2, "'x' is none of weights, service"),
    ],
    ids=["the end of the input", "Ctrl-C", "never right"],
)
def test_questions_that_are_not_answered_write_nothing(
    tmp_path: Path, answers: list[bytes], exit_code: int, words: str
) -> None:
    code, text = at_a_terminal(tmp_path, "new", answers)
    assert (code, words in " ".join(text.split())) == (exit_code, True), text
    assert "Aborted" not in text
    assert list(tmp_path.iterdir()) == []
