"""Prepare what a server needs to serve a student: chat template, stop tokens, and the commands to paste.

The limits on adapters are vLLM's (`vllm/config/lora.py`, `vllm/lora/peft_helper.py`).
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.data.chat_template import Renderer
from trainer.data.published_template import keeps_reasoning, serving_template

# Values that vLLM's --max-lora-rank accepts; its default is 16.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@dataclass(frozen=True, slots=True)
class ServingCommands:
    """Commands that serve a student.

    Attributes:
        adapter: vLLM's command for base and adapter; empty if vLLM can't serve this adapter.
        why_merge: why `adapter` is empty.
        merged: vLLM's command for the merged folder. ollama: Ollama's; both empty without such a folder.
        llama_cpp: commands that convert the merged folder with llama.cpp's own script, and serve the file.
        stops: texts of the tokens that end an answer.
        notes: where a server would differ from what was learned.
    """

    adapter: str
    why_merge: str
    merged: str
    ollama: str
    llama_cpp: tuple[str, ...]
    stops: tuple[str, ...]
    notes: tuple[str, ...]


def eos_ids(base: Mapping[str, Any], stop_id: int) -> int | list[int]:
    """Return `generation_config.eos_token_id`: the template's end of turn first, then the base's ids.

    Args:
        base: generation_config.json of the base.
    """
    base_eos = base.get("eos_token_id")
    others = base_eos if isinstance(base_eos, list) else [] if base_eos is None else [base_eos]
    ids = list(dict.fromkeys([stop_id, *map(int, others)]))
    return ids if len(ids) > 1 else stop_id


def commands(config: TrainConfig, renderer: Renderer, merged: Path | None = None) -> ServingCommands:
    """Return the commands for the adapter in `[out] path` and for a merged folder.

    Args:
        merged: the folder that `trainer export` wrote; None: there is none.
    """
    adapter = config.out_path / "adapter"
    stop = str(renderer.tokenizer.convert_ids_to_tokens(renderer.chat_shape.stop_id))
    why_merge = _why_vllm_needs_merge(config)
    rank = next((limit for limit in VLLM_RANKS if limit >= config.lora.rank), 0)
    notes = [problem] if (problem := serving_template(config, renderer)[1]) else []
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
        if why_merge
        else _shell_line(
            *("vllm", "serve", str(config.base), "--enable-lora", "--max-lora-rank", str(rank)),
            *("--lora-modules", f"{config.name}={adapter}"),
            *("--chat-template", str(adapter / "chat_template.jinja"), "--generation-config", str(adapter)),
        ),
        why_merge=why_merge,
        merged=""
        if merged is None
        else _shell_line("vllm", "serve", str(merged), "--served-model-name", config.name),
        ollama=ollama,
        llama_cpp=() if merged is None else _llama_cpp(merged, config.name),
        stops=(stop,),
        notes=tuple(notes),
    )


def describe(serving: ServingCommands) -> list[str]:
    """Format the commands as lines to read and to paste."""
    lines = [f"an answer ends at {', '.join(serving.stops)}; generation_config.json contains it"]
    if serving.adapter:
        lines += ["serve base and adapter:", f"  {serving.adapter}"]
    elif serving.why_merge:
        lines.append(f"serve the merged folder: {serving.why_merge}")
    for command in (serving.merged, serving.ollama):
        if command:
            lines += [f"serve with {'Ollama' if command.startswith('ollama') else 'vLLM'}:", f"  {command}"]
    if serving.llama_cpp:
        lines += ["serve with llama.cpp:", *(f"  {command}" for command in serving.llama_cpp)]
    return [*lines, *serving.notes]


def _llama_cpp(merged: Path, name: str) -> tuple[str, ...]:
    file = f"{merged.parent / name}.gguf"
    return (
        _shell_line("python", "convert_hf_to_gguf.py", str(merged), "--outfile", file),
        _shell_line("llama-server", "-m", file, "--jinja"),
    )


def _why_vllm_needs_merge(config: TrainConfig) -> str:
    if config.lora.dora:
        return "vLLM does not support DoRA"
    if config.lora.trainable_tokens:
        return "vLLM does not support adapters with rows of tokens"
    if config.lora.rank > VLLM_RANKS[-1]:
        return f"vLLM supports ranks up to {VLLM_RANKS[-1]}"
    targets = () if isinstance(config.lora.target, str) else config.lora.target
    unsupported = [name for name in targets if name.split(".")[-1] in ("lm_head", "embed_tokens")]
    return f"vLLM does not support adapters on {unsupported[0]}" if unsupported else ""


def _shell_line(*words: str) -> str:
    return " ".join(map(shlex.quote, words))
