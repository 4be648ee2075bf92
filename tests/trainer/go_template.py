"""Render the subset of Go's `text/template` that Ollama's Modelfiles use, and refuse anything else.

Written from the documentation of `text/template`, not from what `publish/modelfile.py` emits. Covered:
actions with trim markers, comments, `if`/`else if`/`else`/`end`, `range` with up to two variables,
variables (`:=`, `=`), fields of the dot, of `$` and of variables, string, integer and boolean literals,
parentheses, and the functions `and`, `or`, `not`, `eq`, `ne`, `len`, `index`, `slice`. `TemplateError`
refuses the rest: pipelines, `with`, `define`, `template`, `block`, `break`, `continue`, methods, other
functions, unknown fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

ACTION = re.compile(r"\{\{(-\s)?(.*?)(\s-)?\}\}", re.DOTALL)
TOKEN = re.compile(
    r'\s*(:=|=|,|\(|\)|"(?:[^"\\\n]|\\.)*"|-?\d+|[$.]?[A-Za-z_]\w*(?:\.\w+)*|\$(?:\.\w+)+|\$|\.)'
)
ESCAPES = {"n": "\n", "t": "\t", '"': '"', "\\": "\\"}
Node = tuple[Any, ...]


class TemplateError(ValueError):
    """The template is not well formed, or uses something that this interpreter does not know."""


def render(template: str, messages: Sequence[Mapping[str, str]]) -> str:
    """Return the prompt that Ollama makes: `.System` is the system prompt, `.Messages` all messages.

    Raises:
        TemplateError: a construct or a field outside the subset.
    """
    system = next((m["content"] for m in messages if m["role"] == "system"), "")
    listed = [{"Role": m["role"], "Content": m["content"]} for m in messages]
    return render_data(template, {"System": system, "Messages": listed})


def render_data(template: str, data: Any) -> str:
    """Return the template's text for `data`: dicts stand for structs, lists for slices."""
    parts = _lex(template)
    body, end, _ = _parse(parts)
    if end:
        raise TemplateError(f"unexpected {end!r}")
    return _run(body, data, [{"$": data}])


def _lex(template: str) -> list[tuple[str, Any]]:
    """Cut a template into ("text", str) and ("action", tokens), with trim markers applied."""
    parts: list[tuple[str, Any]] = []
    at, trim = 0, False
    for match in ACTION.finditer(template):
        text = template[at : match.start()]
        text = text.lstrip(" \t\r\n") if trim else text
        parts.append(("text", text.rstrip(" \t\r\n") if match[1] else text))
        code = match[2].strip()
        if not (code.startswith("/*") and code.endswith("*/")):
            parts.append(("action", _tokens(code)))
        at, trim = match.end(), bool(match[3])
    rest = template[at:]
    if "{{" in rest:
        raise TemplateError("unclosed action")
    parts.append(("text", rest.lstrip(" \t\r\n") if trim else rest))
    return parts


def _tokens(code: str) -> list[str]:
    tokens, at = [], 0
    while at < len(code):
        match = TOKEN.match(code, at)
        if match is None:
            raise TemplateError(f"can't read {code[at:]!r}")
        tokens.append(match[1])
        at = match.end()
    if not tokens:
        raise TemplateError("missing value for command")
    return tokens


def _parse(parts: list[tuple[str, Any]]) -> tuple[list[Node], str, list[str]]:
    """Consume parts up to an `end` or `else`; return the nodes, that keyword and its rest."""
    nodes: list[Node] = []
    while parts:
        kind, value = parts.pop(0)
        if kind == "text":
            nodes.append(("text", value))
        elif value[0] in ("end", "else"):
            return nodes, value[0], value[1:]
        elif value[0] == "if":
            nodes.append(_parse_if(value[1:], parts))
        elif value[0] == "range":
            nodes.append(_parse_range(value[1:], parts))
        elif len(value) > 2 and value[0].startswith("$") and value[1] in (":=", "="):
            nodes.append(("set", value[0], value[1], value[2:]))
        else:
            nodes.append(("print", value))
    return nodes, "", []


def _parse_if(test: list[str], parts: list[tuple[str, Any]]) -> Node:
    body, keyword, rest = _parse(parts)
    if keyword == "end":
        return ("if", test, body, [])
    if keyword == "else" and rest[:1] == ["if"]:
        return ("if", test, body, [_parse_if(rest[1:], parts)])
    if keyword != "else" or rest:
        raise TemplateError("`if` without `end`")
    other, keyword, _ = _parse(parts)
    if keyword != "end":
        raise TemplateError("`else` without `end`")
    return ("if", test, body, other)


def _parse_range(head: list[str], parts: list[tuple[str, Any]]) -> Node:
    names: list[str] = []
    if ":=" in head:
        at = head.index(":=")
        names, head = [name for name in head[:at] if name != ","], head[at + 1 :]
    if len(names) > 2 or not all(name.startswith("$") for name in names):
        raise TemplateError(f"range declares {names}")
    body, keyword, _ = _parse(parts)
    other: list[Node] = []
    if keyword == "else":
        other, keyword, _ = _parse(parts)
    if keyword != "end":
        raise TemplateError("`range` without `end`")
    return ("range", names, head, body, other)


def _run(nodes: list[Node], dot: Any, scopes: list[dict[str, Any]]) -> str:
    out = ""
    for node in nodes:
        if node[0] == "text":
            out += node[1]
        elif node[0] == "print":
            value = _value(node[1], dot, scopes)
            out += str(value).lower() if isinstance(value, bool) else str(value)
        elif node[0] == "set":
            value = _value(node[3], dot, scopes)
            scope = scopes[-1] if node[2] == ":=" else _scope_of(node[1], scopes)
            scope[node[1]] = value
        elif node[0] == "if":
            chosen = node[2] if _value(node[1], dot, scopes) else node[3]
            out += _run(chosen, dot, [*scopes, {}])
        else:
            _, names, head, body, other = node
            items = list(enumerate(_value(head, dot, scopes)))
            for number, item in items:
                values = (number, item) if len(names) == 2 else (item,)
                out += _run(body, item, [*scopes, dict(zip(names, values, strict=False))])
            out += "" if items else _run(other, dot, [*scopes, {}])
    return out


def _value(tokens: list[str], dot: Any, scopes: list[dict[str, Any]]) -> Any:
    """Evaluate one command: an operand, or a function and its operands."""
    operands, rest = _operands(tokens, dot, scopes)
    if rest:
        raise TemplateError(f"unexpected {rest[0]!r}")
    first, *others = operands
    if callable(first):
        try:
            return first(*others)
        except (TypeError, IndexError) as error:
            raise TemplateError(f"wrong arguments: {error}") from None
    if others:
        raise TemplateError("can't give arguments to a value")
    return first


def _operands(tokens: list[str], dot: Any, scopes: list[dict[str, Any]]) -> tuple[list[Any], list[str]]:
    values: list[Any] = []
    while tokens and tokens[0] != ")":
        token, tokens = tokens[0], tokens[1:]
        if token != "(":
            values.append(_operand(token, dot, scopes))
            continue
        close = _closing(tokens)
        values.append(_value(tokens[:close], dot, scopes))
        tokens = tokens[close + 1 :]
    if not values:
        raise TemplateError("missing value for command")
    return values, tokens


def _closing(tokens: list[str]) -> int:
    """Return the position of the parenthesis that closes one opened before `tokens`."""
    depth = 0
    for position, token in enumerate(tokens):
        depth += (token == "(") - (token == ")")
        if depth < 0:
            return position
    raise TemplateError("unclosed parenthesis")


def _operand(token: str, dot: Any, scopes: list[dict[str, Any]]) -> Any:
    if token.startswith('"'):
        return re.sub(r"\\(.)", lambda m: _escaped(m[1]), token[1:-1])
    if token.lstrip("-").isdigit():
        return int(token)
    if token in ("true", "false"):
        return token == "true"
    name, *fields = token.split(".")
    if name.startswith("$"):
        value = _scope_of(name, scopes)[name]
    elif name == "":
        value, fields = dot, [field for field in fields if field]
    elif name in FUNCTIONS and not fields:
        return FUNCTIONS[name]
    else:
        raise TemplateError(f"function {token!r} not defined")
    for field in fields:
        if not isinstance(value, Mapping) or field not in value:
            raise TemplateError(f"no field {field!r}")
        value = value[field]
    return value


def _escaped(letter: str) -> str:
    if letter not in ESCAPES:
        raise TemplateError(f"unknown escape \\{letter}")
    return ESCAPES[letter]


def _scope_of(name: str, scopes: list[dict[str, Any]]) -> dict[str, Any]:
    for scope in reversed(scopes):
        if name in scope:
            return scope
    raise TemplateError(f"undefined variable {name!r}")


def _and(*values: Any) -> Any:
    return next((value for value in values if not value), values[-1])


def _or(*values: Any) -> Any:
    return next((value for value in values if value), values[-1])


def _eq(first: Any, *others: Any) -> bool:
    if any(type(first) is not type(other) for other in others):
        raise TemplateError("incompatible types for comparison")
    return any(first == other for other in others)


def _slice(value: Any, start: int = 0, stop: int | None = None) -> Any:
    if not 0 <= start <= len(value):
        raise TemplateError(f"index out of range: {start}")
    return value[start:stop]


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "and": _and,
    "or": _or,
    "not": lambda value: not value,
    "eq": _eq,
    "ne": lambda first, second: not _eq(first, second),
    "len": len,
    "index": lambda value, *keys: _index(value, *keys),
    "slice": _slice,
}


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        value = value[key]
    return value
