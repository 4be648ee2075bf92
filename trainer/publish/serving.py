"""What a server needs so that it serves what was learned: template, stop tokens, and the exact commands.

Rank limits and refusals are vLLM's (`vllm/config/lora.py`, `vllm/lora/peft_helper.py`).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.data.chat_template import TEMPLATE_DATE, Renderer
from trainer.errors import StudentError
from trainer.publish import modelfile

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what --max-lora-rank takes; 16 unless told
_FIXED_CHOICES = (f'{{%- set date_string = "{TEMPLATE_DATE}" -%}}', "{%- set enable_thinking = false -%}")


@dataclass(frozen=True, slots=True)
class ServingCommands:
    """How to serve a student.

    Attributes:
        adapter: vLLM's command for base and adapter; empty where vLLM can't, and `why_merge` says why.
        merged: vLLM's command for the merged folder. ollama: Ollama's; both empty without such a folder.
        stops: texts whose arrival ends an answer.
        notes: what a server would do otherwise than was learned.
    """

    adapter: str
    why_merge: str
    merged: str
    ollama: str
    stops: tuple[str, ...]
    notes: tuple[str, ...]


def keeps_reasoning(config: TrainConfig, renderer: Renderer) -> bool:
    """Whether the student was taught to begin with reasoning where its template has the place."""
    return config.data.reasoning == "keep" and renderer.shape.reasoning is not None


def pinned_template(renderer: Renderer, *, thinking: bool) -> str:
    """The chat template with every choice made that a server would leave open (a date, a way of thinking).

    A server calls a template without the arguments that training gave; where that gives another prompt than
    was learned, the choice is written into the template itself.

    Raises:
        StudentError: no choice makes the template write the prompts that were learned.
    """
    original = str(renderer.tokenizer.chat_template)
    wanted = [modelfile.training_prompt(renderer, probe, thinks=thinking) for probe in PROBES]
    pins = ("", *_FIXED_CHOICES, "".join(_FIXED_CHOICES))
    try:
        for pin in pins:
            renderer.tokenizer.chat_template = pin + original
            if [_as_served(renderer, probe) for probe in PROBES] == wanted:
                return pin + original
    finally:
        renderer.tokenizer.chat_template = original
    raise StudentError(
        "a server would render other prompts than were learned: the template puts text before the answer",
        place="student.template",
        remedy='a template whose generation prompt ends in that text, or [data] reasoning = "keep"',
    )


def serving_template(config: TrainConfig, renderer: Renderer) -> tuple[str, str]:
    """The template to hand over, and "" or what is wrong with it: no reason to lose a finished training."""
    try:
        return pinned_template(renderer, thinking=keeps_reasoning(config, renderer)), ""
    except StudentError as error:
        return str(renderer.tokenizer.chat_template), error.message


PROBES: tuple[list[Mapping[str, Any]], ...] = (
    [{"role": "user", "content": "hi"}],
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho"},
        {"role": "user", "content": "and?"},
    ],
)


def _as_served(renderer: Renderer, messages: list[Mapping[str, Any]]) -> str:
    return str(renderer.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def eos_ids(base: Mapping[str, Any], stop_id: int) -> int | list[int]:
    """`generation_config.eos_token_id`: the template's end of turn first, then what the base had."""
    told = base.get("eos_token_id")
    others = told if isinstance(told, list) else [] if told is None else [told]
    every = list(dict.fromkeys([stop_id, *map(int, others)]))
    return every if len(every) > 1 else stop_id


def commands(config: TrainConfig, renderer: Renderer, merged: Path | None = None) -> ServingCommands:
    """The exact commands, for the adapter in `[out] path` and for a merged folder."""
    adapter = config.out_path / "adapter"
    stop = str(renderer.tokenizer.convert_ids_to_tokens(renderer.shape.stop_id))
    why = _why_vllm_needs_merge(config)
    rank = next((each for each in VLLM_RANKS if each >= config.lora.rank), 0)
    notes = [odd] if (odd := serving_template(config, renderer)[1]) else []
    if keeps_reasoning(config, renderer):
        notes.append("answers begin with reasoning: give vLLM the --reasoning-parser of the base's family")
    ollama = ""
    if merged is not None:
        if (merged / "Modelfile").is_file():
            ollama = _shell_line("ollama", "create", config.name, "-f", str(merged / "Modelfile"))
        else:
            notes.append("no Modelfile: the chat template does more than put text around turns")
    return ServingCommands(
        adapter=""
        if why
        else _shell_line(
            *("vllm", "serve", str(config.base), "--enable-lora", "--max-lora-rank", str(rank)),
            *("--lora-modules", f"{config.name}={adapter}"),
            *("--chat-template", str(adapter / "chat_template.jinja"), "--generation-config", str(adapter)),
        ),
        why_merge=why,
        merged=""
        if merged is None
        else _shell_line("vllm", "serve", str(merged), "--served-model-name", config.name),
        ollama=ollama,
        stops=(stop,),
        notes=tuple(notes),
    )


def describe(how: ServingCommands) -> list[str]:
    """The commands as lines to read and to paste."""
    said = [f"an answer ends at {', '.join(how.stops)}; generation_config.json says so"]
    if how.adapter:
        said += ["serve base and adapter:", f"  {how.adapter}"]
    elif how.why_merge:
        said.append(f"serve the merged folder: {how.why_merge}")
    for command in (how.merged, how.ollama):
        if command:
            said += [f"serve with {'Ollama' if command.startswith('ollama') else 'vLLM'}:", f"  {command}"]
    return [*said, *how.notes]


def _why_vllm_needs_merge(config: TrainConfig) -> str:
    if config.lora.dora:
        return "vLLM has no DoRA"
    if config.lora.rank > VLLM_RANKS[-1]:
        return f"vLLM takes ranks up to {VLLM_RANKS[-1]}"
    targets = () if isinstance(config.lora.target, str) else config.lora.target
    odd = [name for name in targets if name.split(".")[-1] in ("lm_head", "embed_tokens")]
    return f"vLLM has no adapter on {odd[0]}" if odd else ""


def _shell_line(*words: str) -> str:
    return " ".join(map(shlex.quote, words))
