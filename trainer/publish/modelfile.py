"""Translate a chat template into Ollama's Modelfile, for servers that do not run Jinja.

The text around each turn is read off a rendered conversation whose messages are unique marks, and verified
by rendering other conversations both ways. If a template does more than put text around turns, no Modelfile
is written, because it would render other prompts than were learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from trainer.data.chat_template import Renderer
from trainer.data.conversation import Message
from trainer.errors import StudentError
from trainer.publish import modelfile_grammar

# Contents of the probing messages: private-use characters, which no template contains, trims or splits.
_MARKS = tuple(f"\ue0f0turn{number}\ue0f1" for number in range(4))

# Settings of generation_config.json that Ollama has, by its own name for them.
_SAMPLING = {"temperature": "temperature", "top_p": "top_p", "top_k": "top_k", "min_p": "min_p"}
# Tokens of Ollama's context window without `num_ctx`: longer prompts lose their beginning without a word.
_OLLAMA_CONTEXT = 4096


def ollama_parameters(
    generation: Mapping[str, Any], *, context: int = 0, longest: int = 0
) -> dict[str, float]:
    """Return the parameters that let Ollama answer as transformers does with this generation_config.json.

    Ollama's own defaults change answers: a temperature of 0.8 and, in many versions, a repeat penalty of 1.1.

    Args:
        generation: content of generation_config.json. Without `do_sample` transformers answers greedily.
        context: tokens that the student can read; 0: not known.
        longest: tokens of the longest row that may have been learned.
    """
    parameters: dict[str, float] = {"repeat_penalty": float(generation.get("repetition_penalty") or 1)}
    if generation.get("do_sample"):
        given = {ollama: generation.get(name) for name, ollama in _SAMPLING.items()}
        parameters |= {name: value for name, value in given.items() if value is not None}
    else:
        parameters["temperature"] = 0
    if longest > _OLLAMA_CONTEXT:
        parameters["num_ctx"] = min(longest, context or longest)
    return parameters


@dataclass(frozen=True, slots=True)
class TurnTemplate:
    """The text that a chat template puts around each turn, as (before, after) pairs.

    Attributes:
        bos: text of the BOS token at the start of the prompt if the tokenizer adds that token by itself, so
            that llama.cpp does so too; else "": the text stays in `head` or in the first turn.
        head: text before the first turn of a conversation without a system prompt.
        system: text around a system prompt.
        system_position: whether a system prompt stands before all turns or inside the last user turn.
        user, assistant: text around a user's turn and around an assistant's turn.
        generation_prompt: text after the last user turn, which the student continues.
    """

    bos: str
    head: str
    system: tuple[str, str]
    system_position: Literal["first", "last question", "nowhere"]
    user: tuple[str, str]
    assistant: tuple[str, str]
    generation_prompt: str

    def render(self, messages: Sequence[Message]) -> str:
        """Render a prompt as Ollama would from `modelfile`; only the first system message is used."""
        system = [self.system[0] + m["content"] + self.system[1] for m in messages if m["role"] == "system"]
        turns = [m for m in messages if m["role"] != "system"]
        text = self.bos + (system[0] if system and self.system_position == "first" else self.head)
        for number, message in enumerate(turns):
            is_last = number == len(turns) - 1
            before, after = self.user if message["role"] == "user" else self.assistant
            if is_last and system and self.system_position == "last question":
                before += system[0]
            text += before + message["content"] + after + (self.generation_prompt if is_last else "")
        return text

    def modelfile(
        self, stop: str, *, source: str = ".", parameters: Mapping[str, float] | None = None
    ) -> str | None:
        """Return the Modelfile's text; None if Ollama would read something else than was meant.

        That is so if the turns contain syntax of Go templates or of Modelfiles, or invisible characters.

        Args:
            stop: text of the token that ends an answer.
            source: the folder of the weights or a GGUF file, relative to the Modelfile.
            parameters: from `ollama_parameters`.
        """
        first = last = ""
        if self.system_position == "first":
            first = "{{ if .System }}" + "{{ .System }}".join(self.system)
            first += ("{{ else }}" + self.head if self.head else "") + "{{ end }}"
        elif self.system_position == "last question":
            last = "{{ if and $last $.System }}" + "{{ $.System }}".join(self.system) + "{{ end }}"
        user = self.user[0] + last + "{{ .Content }}" + self.user[1]
        user += "{{ if $last }}" + self.generation_prompt + "{{ end }}" if self.generation_prompt else ""
        body = (
            (first or self.head)
            + "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            + '{{ if eq .Role "user" }}'
            + user
            + '{{ else if eq .Role "assistant" }}'
            + "{{ .Content }}".join(self.assistant)
            + "{{ end }}{{ end }}"
        )
        parts = (self.head, *self.system, *self.user, *self.assistant, self.generation_prompt, stop)
        if any(mark in part for part in parts for mark in ("{{", "}}", '"')):
            return None
        wanted = [("from", source), ("template", body), ("stop", stop)]
        wanted += [(name, f"{value:g}") for name, value in (parameters or {}).items()]
        text = f'FROM {source}\nTEMPLATE """{body}"""\nPARAMETER stop "{stop}"\n'
        text += "".join(f"PARAMETER {name} {value}\n" for name, value in wanted[3:])
        try:
            is_read_as_meant = modelfile_grammar.parse(text) == wanted
        except ValueError:
            return None
        return text if is_read_as_meant else None


def infer_turn_template(renderer: Renderer, *, thinks: bool = False) -> TurnTemplate | None:
    """Find the text around each turn; None if the template does more than put text around turns.

    Args:
        thinks: whether the student was taught to begin its answers with reasoning.
    """
    try:
        turns = _infer(renderer, thinks)
        probes = _probes(system=turns.system_position != "nowhere")
        is_equal = all(
            turns.render(probe) == renderer.learned_prompt(probe, thinks=thinks) for probe in probes
        )
    except (StudentError, ValueError):
        return None
    return turns if is_equal else None


def _probes(*, system: bool) -> list[list[Message]]:
    def chat(*texts: str) -> list[Message]:
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]

    system_message = {"role": "system", "content": "Be brief."}
    plain = [chat("hi"), chat("hi", "ho", "say it\nagain"), chat("a", "b", "c", "d", "e")]
    return [*plain, *([system_message, *probe] for probe in (plain if system else []))]


def _infer(renderer: Renderer, thinks: bool) -> TurnTemplate:
    bos = renderer.tokenizer.bos_token or ""
    question, answer, follow_up, instruction = _MARKS
    conversation: list[Message] = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": follow_up},
    ]
    prompt = renderer.learned_prompt(conversation, thinks=thinks)
    begin, between, again, end = _split_at(prompt, question, answer, follow_up)
    if not begin.startswith(bos) or bos in again:  # a token that begins every turn belongs to the turns
        bos = ""
    begin = begin[len(bos) :]
    opening = _common_prefix(begin[::-1], again[::-1])[::-1]
    closing = _common_prefix(between, end)
    head, after = begin[: len(begin) - len(opening)], again[: len(again) - len(opening)]
    user, assistant = (opening, closing), (between[len(closing) :], after)
    generation_prompt = end[len(closing) :]
    added, written = (bos, "") if renderer.adds_bos else ("", bos)
    turns = TurnTemplate(added, written + head, ("", ""), "nowhere", user, assistant, generation_prompt)
    system_message = {"role": "system", "content": instruction}
    try:
        prompt = renderer.learned_prompt([system_message, conversation[0]], thinks=thinks)
    except StudentError:
        return turns
    before, then, _ = _split_at(prompt[len(bos) :], instruction, question)
    if then.endswith(opening):
        around = (written + before, then[: len(then) - len(opening)])
        return replace(turns, system=around, system_position="first")
    if before == begin:
        return replace(turns, system=("", then), system_position="last question")
    return turns


def _common_prefix(first: str, second: str) -> str:
    pairs = enumerate(zip(first, second, strict=False))
    return first[: next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))]


def _split_at(text: str, *marks: str) -> list[str]:
    parts = []
    for mark in marks:
        part, match, text = text.partition(mark)
        if not match:
            raise ValueError("the template drops a turn")
        parts.append(part)
    return [*parts, text]
