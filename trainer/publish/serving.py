"""Prepare what a server needs to serve a student: chat template, stop tokens, and the commands to paste.

`trainer.publish.server_checks` says what was checked for each server.
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
from trainer.model import weights
from trainer.publish.server_checks import VLLM_RANKS, adapter_obstacles


@dataclass(frozen=True, slots=True)
class ServingCommands:
    """Commands that serve a student.

    Attributes:
        adapter: vLLM's command for base and adapter; empty if vLLM can't serve this adapter.
        why_merge: why `adapter` is empty.
        merged: vLLM's command for the merged folder. ollama: Ollama's; both empty without such a folder.
        others: commands of SGLang, transformers and MLX for the merged folder, by the server's name.
        llama_cpp: commands that serve the GGUF files; without such files, that convert the folder with
            llama.cpp's own script and serve the result.
        stops: texts of the tokens that end an answer.
        notes: where a server would differ from what was learned.
    """

    adapter: str
    why_merge: str
    merged: str
    ollama: str
    others: Mapping[str, str]
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
    # Bases hold null or -1 there, too, where they mean none.
    ids = list(dict.fromkeys([stop_id, *(each for each in others if type(each) is int and each >= 0)]))
    return ids if len(ids) > 1 else stop_id


def other_stops(config: TrainConfig, renderer: Renderer) -> tuple[int, ...]:
    """Return the tokens beside the template's end of turn at which servers of the student end an answer."""
    stop = renderer.chat_shape.stop_id
    ids = eos_ids(weights.read_json(config.base / "generation_config.json"), stop)
    return tuple(each for each in ids if each != stop) if isinstance(ids, list) else ()


def commands(config: TrainConfig, renderer: Renderer, merged: Path | None = None) -> ServingCommands:
    """Return the commands for the adapter in `[out] path` and for a merged folder.

    Args:
        merged: the folder that `trainer export` wrote; None: there is none.
    """
    adapter = config.student_path
    stop = str(renderer.tokenizer.convert_ids_to_tokens(renderer.chat_shape.stop_id))
    why_merge = _why_vllm_needs_merge(config)
    rank = next((limit for limit in VLLM_RANKS if limit >= config.lora.rank), 0)
    notes = [problem] if (problem := serving_template(config, renderer)[1]) else []
    if keeps_reasoning(config, renderer):
        notes.append("answers begin with reasoning: give vLLM the --reasoning-parser of the base's family")
    if merged is not None and not (merged / "Modelfile").is_file():
        notes.append("no Modelfile: the chat template does more than put text around turns")
    return ServingCommands(
        adapter=""
        if why_merge
        else _shell_line(
            *("vllm", "serve", str(config.base), "--enable-lora", "--max-lora-rank", str(rank)),
            *("--lora-modules", f"{config.name}={adapter}"),
            *("--chat-template", str(adapter / "chat_template.jinja"), "--generation-config", str(adapter)),
            *_dtype_option(config.base),
        ),
        why_merge=why_merge,
        merged=""
        if merged is None
        else _shell_line(
            *("vllm", "serve", str(merged), "--served-model-name", config.name, *_dtype_option(merged))
        ),
        ollama="" if merged is None else _ollama(merged, config.name),
        others={} if merged is None else _others(merged, config.name),
        llama_cpp=() if merged is None else _llama_cpp(config, merged),
        stops=(stop,),
        notes=tuple(notes),
    )


def _dtype_option(folder: Path) -> tuple[str, ...]:
    """Return the option that keeps a folder in fp32; vLLM and SGLang make fp16 of it otherwise."""
    config = weights.read_json(folder / "config.json")
    is_float32 = (config.get("dtype") or config.get("torch_dtype")) == "float32"
    return ("--dtype", "float32") if is_float32 else ()


def _ollama(merged: Path, name: str) -> str:
    """Return Ollama's command for the first GGUF file, else for the folder; "" without a Modelfile."""
    kinds = [file["kind"] for file in _gguf_files(merged)]
    files = [merged / f"Modelfile.{kind}" for kind in kinds] + [merged / "Modelfile"]
    file = next((file for file in files if file.is_file()), None)
    return "" if file is None else _shell_line("ollama", "create", name, "-f", str(file))


def _others(merged: Path, name: str) -> dict[str, str]:
    sglang = ("python", "-m", "sglang.launch_server", "--model-path", str(merged))
    return {
        "SGLang": _shell_line(*sglang, "--served-model-name", name, *_dtype_option(merged)),
        "transformers": _shell_line("transformers", "serve", str(merged)),
        "MLX": _shell_line("mlx_lm.server", "--model", str(merged)),
    }


def describe(serving: ServingCommands) -> list[str]:
    """Format the commands as lines to read and to paste."""
    lines = [f"an answer ends at {', '.join(serving.stops)}; generation_config.json contains it"]
    if serving.adapter:
        lines += ["serve base and adapter:", f"  {serving.adapter}"]
    elif serving.why_merge:
        lines.append(f"serve the merged folder: {serving.why_merge}")
    for server, command in {"vLLM": serving.merged, **serving.others, "Ollama": serving.ollama}.items():
        if command:
            lines += [f"serve with {server}:", f"  {command}"]
    if serving.llama_cpp:
        lines += ["serve with llama.cpp:", *(f"  {command}" for command in serving.llama_cpp)]
    return [*lines, *serving.notes]


def _llama_cpp(config: TrainConfig, merged: Path) -> tuple[str, ...]:
    files = {file["kind"]: str(merged / file["file"]) for file in _gguf_files(merged)}
    adapter = files.pop("adapter", "")
    commands = [_shell_line("llama-server", "-m", file, "--jinja") for file in files.values()]
    if adapter:
        template = str(merged / "chat_template.jinja")
        line = ("llama-server", "-m", "BASE.gguf", "--lora", adapter, "--jinja")
        commands.append(_shell_line(*line, "--chat-template-file", template))
    if commands:
        return tuple(commands)
    file = f"{merged.parent / config.name}.gguf"
    return (
        _shell_line("python", "convert_hf_to_gguf.py", str(merged), "--outfile", file),
        _shell_line("llama-server", "-m", file, "--jinja"),
    )


def _gguf_files(merged: Path) -> list[Mapping[str, Any]]:
    files = weights.read_json(merged / "export.json").get("gguf", [])
    return files if isinstance(files, list) else []


def _why_vllm_needs_merge(config: TrainConfig) -> str:
    """Return why vLLM can't serve the adapter beside its base; "" if it can."""
    lora = config.lora
    if config.is_full:
        return "all weights were trained, so there is no adapter"
    if config.student.quantise != "none":
        return "the adapter belongs to a base in 4 bits, which the merged folder has the values of"
    settings = {
        "r": lora.rank,
        "target_modules": () if isinstance(lora.target, str) else lora.target,
        "use_dora": lora.dora,
        "trainable_token_indices": lora.trainable_tokens,
        "modules_to_save": lora.modules_to_save,
    }
    obstacle = adapter_obstacles(settings).get("vLLM")
    return f"vLLM {obstacle}" if obstacle else ""


def _shell_line(*words: str) -> str:
    return " ".join(map(shlex.quote, words))
