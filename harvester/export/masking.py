"""Drop or mask rows that hold personal data or secrets, by patterns.

Patterns find what has a recognisable form: they find no names and no addresses of streets. A masked row loses
its raw body and its log-probabilities, which would show what was masked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from harvester.export.drops import Drop, Filter
from harvester.store.shards.schema import Sample

Action = Literal["drop", "mask"]
_TEXT_COLUMNS = ("completion", "reasoning", "refusal", "reference")
# Characters of the shortest password that is looked for; shorter ones are mostly words.
_LEAST_PASSWORD = 8
_JSON_COLUMNS = ("tool_calls_json", "metadata_json", "request_json")


def _always(_: str) -> bool:
    return True


def _luhn(text: str) -> bool:
    """Whether the digits of a card number have a right check digit."""
    digits = [int(digit) for digit in text if digit.isdigit()][::-1]
    odd, even = digits[::2], (divmod(2 * digit, 10) for digit in digits[1::2])
    return 13 <= len(digits) <= 19 and (sum(odd) + sum(tens + ones for tens, ones in even)) % 10 == 0


def _iban(text: str) -> bool:
    """Whether an account number has right check digits (ISO 13616, remainder 1 modulo 97)."""
    compact = "".join(text.split()).upper()
    moved = compact[4:] + compact[:4]
    return 15 <= len(compact) <= 34 and int("".join(str(int(letter, 36)) for letter in moved)) % 97 == 1


def _password(text: str) -> bool:
    """Whether what follows a name such as `password` is no word of a sentence and no code.

    In quotes after `password` everything is one. Otherwise it has a digit, or a sign inside, beside letters.
    """
    name, value = re.split(r"[\"']?\s*[:=]=?\s*", text, maxsplit=1)
    if value[0] in "\"'" and name.lower() not in {"token", "pwd"}:
        return True
    value = value.strip("\"'.,;:!?*")
    is_code = re.search(r"[()\[\]{}<>]|://", value) is not None
    is_counted = re.fullmatch(r"\d+-[A-Za-z]+", value) is not None  # as in "8-character"
    return (
        len(value) >= _LEAST_PASSWORD
        and not is_code
        and not is_counted
        and re.search(r"[A-Za-z]", value) is not None
        and re.search(r"\d|[@#$%^&!]", value) is not None
    )


@dataclass(frozen=True, slots=True)
class _Form:
    """A pattern, and a check of what it finds."""

    pattern: re.Pattern[str]
    is_real: Callable[[str], bool] = _always


PII: Mapping[str, _Form] = {
    "email": _Form(re.compile(r"\b[\w.+-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.)+[A-Za-z]{2,24}\b")),
    "iban": _Form(re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _iban),
    "card": _Form(re.compile(r"(?<!\d\.)(?<![^\w]\.)(?<!\A\.)\b\d(?:[ -]?\d){12,18}\b(?!\.\d)"), _luhn),
    "phone": _Form(re.compile(r"(?<![\w+])\+[1-9]\d{0,2}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d(?:[ .-]?\d){6,11}\b")),
    "us_ssn": _Form(re.compile(r"\b(?!000|666|9\d\d)\d{3}-(?!00)\d{2}-(?!0000)\d{4}\b")),
}
SECRETS: Mapping[str, _Form] = {
    "private_key": _Form(
        re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----.*?(?:-----END [A-Z ]*PRIVATE KEY-----|\Z)", re.DOTALL)
    ),
    "aws_key": _Form(re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b")),
    "github_token": _Form(re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{22,})\b")),
    "api_key": _Form(re.compile(r"\b(?:sk|pk|rk)[-_](?:[A-Za-z0-9]+[-_])*[A-Za-z0-9]{20,}\b")),
    "google_key": _Form(re.compile(r"\bAIza[A-Za-z0-9_-]{35}\b")),
    "slack_token": _Form(re.compile(r"\bxox[abprs]-[A-Za-z0-9-]{10,}\b")),
    "jwt": _Form(re.compile(r"\beyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}")),
    "password": _Form(
        re.compile(
            r"(?i)(?<![A-Za-z])(?:password|passwd|pwd|secret|api[_-]?key|auth[_-]?token|token)[\"']?\s*[:=]=?"
            r"(?:\s*[\"'][^\"'\s]{8,}[\"']|[ \t]*[^\s\"'`]{8,})"
        ),
        _password,
    ),
}


PRIVATE: Mapping[str, _Form] = {**PII, **SECRETS}


def without(forms: Mapping[str, _Form], reason: str, action: Action) -> Filter:
    """Build a filter that drops rows in which one of these forms occurs, or masks what it finds.

    Prompts, answers, reasoning, references and metadata are looked at.
    """

    def check(sample: Sample) -> Drop | Sample | None:
        changed: dict[str, Any] = {}
        for name in (*_TEXT_COLUMNS, *_JSON_COLUMNS):
            text = getattr(sample, name)
            masked = mask_json(text, forms) if text and name in _JSON_COLUMNS else mask(text or "", forms)
            if text and masked != text:
                changed[name] = masked
        messages = [
            {**message, "content": mask(message["content"], forms)}
            if isinstance(message.get("content"), str)
            else message
            for message in sample.messages
        ]
        if not changed and messages == sample.messages:
            return None
        if action == "drop":
            return Drop(reason, ", ".join(sorted(_kinds(sample, forms))))
        return replace(sample, **{**changed, "messages": messages, "raw": b"", "logprobs": None})

    return check


def mask(text: str, forms: Mapping[str, _Form]) -> str:
    """Replace what has one of these forms by its name in brackets, as in [EMAIL]."""
    for name, form in forms.items():
        if form.pattern.search(text):
            text = form.pattern.sub(_replacement(name, form), text)
    return text


def mask_json(text: str, forms: Mapping[str, _Form]) -> str:
    """Mask the texts of a JSON document, so that it stays one."""
    try:
        loaded = json.loads(text)
    except ValueError:
        return mask(text, forms)
    masked = _masked(loaded, forms)
    return text if masked == loaded else json.dumps(masked, ensure_ascii=False)


def _masked(value: Any, forms: Mapping[str, _Form]) -> Any:
    if isinstance(value, str):
        return mask(value, forms)
    if isinstance(value, dict):
        return {name: _masked(held, forms) for name, held in value.items()}
    if isinstance(value, list):
        return [_masked(held, forms) for held in value]
    return value


def _replacement(name: str, form: _Form) -> Callable[[re.Match[str]], str]:
    return lambda match: f"[{name.upper()}]" if form.is_real(match[0]) else match[0]


def _kinds(sample: Sample, forms: Mapping[str, _Form]) -> set[str]:
    texts = [sample.completion, sample.reasoning, sample.reference, sample.metadata_json, sample.request_json]
    texts += [str(message.get("content")) for message in sample.messages]
    return {
        name
        for name, form in forms.items()
        for text in texts
        if text and any(form.is_real(match[0]) for match in form.pattern.finditer(text))
    }
