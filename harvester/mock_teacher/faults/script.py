"""Read fault scripts, decide which request gets which fault, and count the faults that fired.

A script is a TOML or JSON file with a list `fault`; each entry names an `action` (see `actions`), its
options, and the conditions, all of which must hold. The first rule that matches a request acts.

    [[fault]]
    action = "status"
    status = 503
    every = 10          # each tenth admitted request
    times = 5           # at most five firings

Conditions: `nth` (ordinal or list of them), `every`, `first` (ordinals 1..k), `after` (ordinals > k),
`prompt` (substring of the last user message), `attempt` (how often this very body has been admitted,
1 = first; number or list), `probability` with `seed`, `times`, `n_above` (requests for more choices than
this), `on` ("chat", "models", or a route of the Batch API: "upload", "create", "list", "retrieve", "cancel",
"content"). Ordinals count the admitted requests of that route from 1; a request refused by key, body or limit
has none.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harvester.errors import ConfigError
from harvester.mock_teacher.faults.actions import ACTIONS, Action, Stage, option_fault

CHAT, MODELS = "chat", "models"
BATCH_ROUTES = ("upload", "create", "list", "retrieve", "cancel", "content")
# Most firings that are listed for each rule; all are counted.
MAX_ORDINALS = 10_000
# Remedy of a rule with a wrong value.
_RULE = "correct this key of the rule, as in nth = [1, 3], probability = 0.1, delay_s = 2"
_CONDITIONS = (
    *("nth", "every", "first", "after", "prompt", "attempt", "probability", "seed", "times", "n_above", "on"),
)
_ALWAYS_ALLOWED = ("name", "action", "billed", "delay_s", *_CONDITIONS)


@dataclass(frozen=True, slots=True)
class Rule:
    """One entry of a script. None or empty means that the condition is not set.

    `delay_s` delays the reply by that many seconds, with any action.
    """

    action: str
    name: str = ""
    nth: tuple[int, ...] = ()
    every: int | None = None
    first: int | None = None
    after: int | None = None
    prompt: str | None = None
    attempt: tuple[int, ...] = ()
    probability: float | None = None
    seed: int = 0
    times: int | None = None
    n_above: int = 0
    on: str = CHAT
    billed: bool | None = None
    delay_s: float = 0.0
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> Action:
        """Return the properties of the action."""
        return ACTIONS[self.action]

    @property
    def is_billed(self) -> bool:
        """Return whether a reply changed by this rule is charged."""
        return self.kind.billed if self.billed is None else self.billed


def read_rule(row: Mapping[str, Any], place: str) -> Rule:
    """Turn one entry of a script into a rule.

    Raises:
        ConfigError: unknown action or key, or a value of the wrong kind.
    """
    action = row.get("action")
    if action not in ACTIONS:
        raise ConfigError(
            f"unknown fault action {action!r}", place=place, remedy=_suggest(str(action), ACTIONS)
        )
    allowed = {*_ALWAYS_ALLOWED, *ACTIONS[action].options}
    for key in row:
        if key not in allowed:
            raise ConfigError(f"{action} has no option {key!r}", place=place, remedy=_suggest(key, allowed))
    options = {key: row[key] for key in ACTIONS[action].options if key in row}
    wrong = option_fault(action, options) or _condition_fault(row, ACTIONS[action])
    if wrong:
        raise ConfigError(wrong, place=place, remedy=_RULE)
    values = {key: row[key] for key in _ALWAYS_ALLOWED if key in row}
    for key in ("nth", "attempt"):
        values[key] = _ordinals(row.get(key, []), key, place)
    return Rule(**values, options=options)


def _condition_fault(row: Mapping[str, Any], action: Action) -> str | None:
    for key in ("every", "first", "after", "seed", "times", "n_above"):
        if key in row and (not isinstance(row[key], int) or isinstance(row[key], bool)):
            return f"{key} must be a whole number"
    for key in ("probability", "delay_s"):
        if key in row and (not isinstance(row[key], int | float) or row[key] < 0):
            return f"{key} must be a number from 0 up"
    if row.get("every", 1) < 1:
        return "every must be at least 1"
    on = row.get("on", CHAT)
    if on not in (CHAT, MODELS, *BATCH_ROUTES):
        return f"on must be one of {', '.join((CHAT, MODELS, *BATCH_ROUTES))}"
    if on != CHAT and action.stage in (Stage.ANSWER, Stage.STREAM):
        return f"on = {on!r} has no answer or stream to spoil"
    return None


def _ordinals(value: Any, key: str, place: str) -> tuple[int, ...]:
    numbers = value if isinstance(value, list | tuple) else [value]
    if not all(isinstance(number, int) and not isinstance(number, bool) and number > 0 for number in numbers):
        raise ConfigError(f"{key} must be a number from 1 up, or a list of them", place=place, remedy=_RULE)
    return tuple(numbers)


def _suggest(word: str, known: Sequence[str] | Mapping[str, Any] | set[str]) -> str:
    close = difflib.get_close_matches(word, list(known), 1)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(known))}"


def read_rules(rows: Sequence[Mapping[str, Any]], place: str = "faults") -> tuple[Rule, ...]:
    """Turn a list of entries into rules; see `read_rule`."""
    return tuple(read_rule(row, f"{place}: fault {at}") for at, row in enumerate(rows, start=1))


def load_script(file: Path) -> tuple[Rule, ...]:
    """Read a fault script (`.toml`, anything else is JSON).

    Raises:
        ConfigError: the file can't be read or parsed, or a rule is wrong.
    """
    if file.exists() and not file.is_file():
        raise ConfigError(
            "the fault script is no regular file", place=str(file), remedy="name a .toml or .json file"
        )
    try:
        text = file.read_text(encoding="utf-8")
        content = tomllib.loads(text) if file.suffix == ".toml" else json.loads(text)
    except OSError as error:
        message = f"can't read the fault script: {error.strerror}"
        raise ConfigError(message, place=str(file), remedy="check path and permissions") from error
    except ValueError as error:
        message = f"can't parse the fault script: {error}"
        raise ConfigError(message, place=str(file), remedy="a script is TOML (.toml) or JSON") from error
    rows = content.get("fault") if isinstance(content, dict) else content
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ConfigError(
            "a fault script is a list named 'fault'", place=str(file), remedy="write [[fault]] tables"
        )
    return read_rules(rows, str(file))


class Script:
    """The rules in order, and their counts: `fired` and `ordinals` show that and when they fired."""

    def __init__(self, rules: Sequence[Rule]) -> None:
        self._rules = [(rule, rule.name or f"{at}:{rule.action}") for at, rule in enumerate(rules, start=1)]
        self._attempts: Counter[bytes] = Counter()
        self._count_attempts = any(rule.attempt or rule.probability is not None for rule in rules)
        self.fired: Counter[str] = Counter({name: 0 for _, name in self._rules})
        self.ordinals: dict[str, list[int]] = {name: [] for _, name in self._rules}

    def match(
        self,
        ordinal: int,
        *,
        on: str = CHAT,
        text: str = "",
        body: bytes = b"",
        stream: bool = False,
        choices: int = 1,
    ) -> tuple[Rule, str] | None:
        """Return the rule for this request and its name, and count the firing; None if no rule matches."""
        if not self._rules:
            return None
        attempt = 1
        if self._count_attempts and body:
            self._attempts[body] += 1
            attempt = self._attempts[body]
        for rule, name in self._rules:
            if rule.on != on or (rule.kind.stage is Stage.STREAM and not stream):
                continue
            if choices <= rule.n_above:
                continue
            if rule.times is not None and self.fired[name] >= rule.times:
                continue
            if _by_ordinal(rule, ordinal) and _by_body(rule, text, body or b"%d" % ordinal, attempt):
                self.fired[name] += 1
                if len(self.ordinals[name]) < MAX_ORDINALS:
                    self.ordinals[name].append(ordinal)
                return rule, name
        return None


def _by_ordinal(rule: Rule, ordinal: int) -> bool:
    return (
        (not rule.nth or ordinal in rule.nth)
        and (rule.every is None or ordinal % rule.every == 0)
        and (rule.first is None or ordinal <= rule.first)
        and (rule.after is None or ordinal > rule.after)
    )


def _by_body(rule: Rule, text: str, body: bytes, attempt: int) -> bool:
    if rule.prompt is not None and rule.prompt not in text:
        return False
    if rule.attempt and attempt not in rule.attempt:
        return False
    if rule.probability is None:
        return True
    # By body and attempt, not by ordinal: the order in which requests happen to arrive decides nothing.
    chance = hashlib.sha256(f"{rule.seed}\0{attempt}\0".encode() + body).digest()
    return int.from_bytes(chance[:8]) / 2.0**64 < rule.probability
