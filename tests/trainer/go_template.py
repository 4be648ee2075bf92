"""Just enough of Go's text/template to render what a Modelfile says, as Ollama would."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any


def render(template: str, messages: Sequence[dict[str, str]]) -> str:
    """The prompt Ollama makes: `.System` is the system prompt, `.Messages` all of them."""
    pieces = re.split(r"(\{\{.*?\}\})", template)
    tree, rest = _parse(pieces)
    assert not rest
    told = [m["content"] for m in messages if m["role"] == "system"]
    return _run(tree, {"System": told[0] if told else "", "Messages": messages, "last": False}, {})


def _parse(pieces: list[str]) -> tuple[list[Any], list[str]]:
    nodes: list[Any] = []
    while pieces:
        piece, pieces = pieces[0], pieces[1:]
        code = piece[2:-2].strip() if piece.startswith("{{") else None
        if code is None:
            nodes.append(piece)
        elif code.split()[0] in ("if", "range"):
            arms, test = [], code
            while True:
                body, pieces = _parse(pieces)
                arms.append((test, body))
                test, pieces = pieces[0][2:-2].strip(), pieces[1:]
                if test == "end":
                    break
            nodes.append(arms)
        elif code == "end" or code.startswith("else"):
            return nodes, [piece, *pieces]
        else:
            nodes.append((code,))
    return nodes, []


def _run(nodes: list[Any], root: dict[str, Any], dot: dict[str, Any]) -> str:
    out = ""
    for node in nodes:
        if isinstance(node, str):
            out += node
        elif isinstance(node, tuple):
            [code] = node
            if code == "$last := eq (len (slice $.Messages $i)) 1":
                root["last"] = dot["i"] == len(root["Messages"]) - 1
            else:
                out += {
                    ".Content": dot.get("content"),
                    ".System": root["System"],
                    "$.System": root["System"],
                }[code]
        elif node[0][0] == "range $i, $_ := .Messages":
            for i, message in enumerate(root["Messages"]):
                out += _run(node[0][1], root, {**message, "i": i})
        else:
            chosen = next((body for test, body in node if _true(test, root, dot)), [])
            out += _run(chosen, root, dot)
    return out


def _true(test: str, root: dict[str, Any], dot: dict[str, Any]) -> bool:
    test = test.removeprefix("else").strip().removeprefix("if ").strip()
    if test.startswith("eq .Role "):
        return dot["role"] == test.split('"')[1]
    return {
        "": True,
        ".System": bool(root["System"]),
        "$last": root["last"],
        "and $last $.System": root["last"] and bool(root["System"]),
    }[test]
