"""Turn a chat template into Ollama's Modelfile, for servers that do not run Jinja.

The text around each turn is found by rendering marked conversations and verified by rendering others. A
template that does more than put text around turns gets no Modelfile instead of a wrong one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from trainer.data.chat_template import Renderer
from trainer.errors import StudentError

_MARKS = tuple(f"\ue0f0turn{number}\ue0f1" for number in range(4))
Message = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class TurnTemplate:
    """Text around each turn.

    Attributes:
        bos: text of the token at the very start, "" for none; llama.cpp puts it there by itself.
        head: before the first turn where there is no system prompt.
        system: around a system prompt; `place` says whether it stands first or in the last question.
        user, assistant: around a question and around an answer.
        asked: after the last question; the student goes on from there.
    """

    bos: str
    head: str
    system: tuple[str, str]
    place: Literal["first", "last question", "nowhere"]
    user: tuple[str, str]
    assistant: tuple[str, str]
    asked: str

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt of these messages; what `modelfile` says in Go."""
        told = [m["content"] for m in messages if m["role"] == "system"]
        rest = [m for m in messages if m["role"] != "system"]
        text = self.bos
        text += self.system[0] + told[0] + self.system[1] if told and self.place == "first" else self.head
        for number, message in enumerate(rest):
            last = number == len(rest) - 1
            before, after = self.user if message["role"] == "user" else self.assistant
            if last and told and self.place == "last question":
                before += self.system[0] + told[0] + self.system[1]
            text += before + message["content"] + after + (self.asked if last else "")
        return text

    def modelfile(self, stop: str) -> str | None:
        """Ollama's Modelfile beside the weights; None where Go's or Ollama's own marks are in the text."""
        first = last = ""
        if self.place == "first":
            first = "{{ if .System }}" + "{{ .System }}".join(self.system)
            first += ("{{ else }}" + self.head if self.head else "") + "{{ end }}"
        elif self.place == "last question":
            last = "{{ if and $last $.System }}" + "{{ $.System }}".join(self.system) + "{{ end }}"
        user = self.user[0] + last + "{{ .Content }}" + self.user[1]
        user += "{{ if $last }}" + self.asked + "{{ end }}" if self.asked else ""
        body = (
            (first or self.head)
            + "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            + '{{ if eq .Role "user" }}'
            + user
            + '{{ else if eq .Role "assistant" }}'
            + "{{ .Content }}".join(self.assistant)
            + "{{ end }}{{ end }}"
        )
        parts = (self.head, *self.system, *self.user, *self.assistant, self.asked, stop)
        if any(mark in part for part in parts for mark in ("{{", "}}", '"')):
            return None
        return f'FROM .\nTEMPLATE """{body}"""\nPARAMETER stop "{stop}"\n'


def infer_turn_template(renderer: Renderer, *, thinks: bool = False) -> TurnTemplate | None:
    """The turns of a renderer's template; None where it does more than put text around turns."""
    try:
        found = _infer(renderer, thinks)
        probes = _probes(system=found.place != "nowhere")
        proved = all(
            found.render(probe) == training_prompt(renderer, probe, thinks=thinks) for probe in probes
        )
    except (StudentError, ValueError):
        return None
    return found if proved else None


def training_prompt(renderer: Renderer, messages: Sequence[Message], *, thinks: bool) -> str:
    """The prompt as it was learned: with the template's scaffold, unless the student thinks first."""
    return renderer.prompt_text(messages) + ("" if thinks else renderer.shape.scaffold)


def _probes(*, system: bool) -> list[list[Message]]:
    def chat(*texts: str) -> list[Message]:
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]

    told = {"role": "system", "content": "Be brief."}
    plain = [chat("hi"), chat("hi", "ho", "say it\nagain"), chat("a", "b", "c", "d", "e")]
    return [*plain, *([told, *probe] for probe in (plain if system else []))]


def _infer(renderer: Renderer, thinks: bool) -> TurnTemplate:
    bos = renderer.tokenizer.bos_token or ""
    one, two, three, four = _MARKS
    talk: list[Message] = [
        {"role": "user", "content": one},
        {"role": "assistant", "content": two},
        {"role": "user", "content": three},
    ]
    begin, between, again, end = _split_at(training_prompt(renderer, talk, thinks=thinks), one, two, three)
    bos = bos if begin.startswith(bos) else ""
    begin = begin[len(bos) :]
    opening = _common_prefix(begin[::-1], again[::-1])[::-1]
    closing = _common_prefix(between, end)
    head, after = begin[: len(begin) - len(opening)], again[: len(again) - len(opening)]
    user, assistant = (opening, closing), (between[len(closing) :], after)
    asked = end[len(closing) :]
    base = TurnTemplate(bos, head, ("", ""), "nowhere", user, assistant, asked)
    try:
        told = training_prompt(renderer, [{"role": "system", "content": four}, talk[0]], thinks=thinks)
    except StudentError:
        return base
    before, then, _ = _split_at(told[len(bos) :], four, one)
    if then.endswith(opening):
        around = (before, then[: len(then) - len(opening)])
        return TurnTemplate(bos, base.head, around, "first", user, assistant, asked)
    if before == begin:
        return TurnTemplate(bos, base.head, ("", then), "last question", user, assistant, asked)
    return base


def _common_prefix(one: str, two: str) -> str:
    length = next(
        (i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two))
    )
    return one[:length]


def _split_at(text: str, *marks: str) -> list[str]:
    parts = []
    for mark in marks:
        part, found, text = text.partition(mark)
        if not found:
            raise ValueError("the template drops a turn")
        parts.append(part)
    return [*parts, text]
