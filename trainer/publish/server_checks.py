"""Check what vLLM, SGLang, `transformers serve`, PEFT and MLX need of an exported student.

Each check looks at the files that were written, or repeats what a server does with them. What no check here
can know (an architecture that a server lacks, its kernels) is left to the server.

Sources: vLLM's vllm/lora/peft_helper.py, vllm/config/lora.py and `--dtype`; SGLang's
python/sglang/srt/lora/lora_config.py and lora.py; mlx-lm's mlx_lm/utils.py; transformers' `serve`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from trainer.config import TrainConfig
from trainer.data.chat_template import Renderer
from trainer.data.published_template import serving_template
from trainer.model import weights
from trainer.publish.adapted_weights import StoredTensor, stored_tensors

# Values that vLLM's --max-lora-rank accepts; its default is 16.
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
ALL = ("vLLM", "SGLang", "transformers", "PEFT", "MLX")
# Those that serve the merged folder. PEFT loads base and adapter.
_MERGED = ("vLLM", "SGLang", "transformers", "MLX")
_OK = "ok"


@dataclass(frozen=True, slots=True)
class ServerCheck:
    """One thing that was checked.

    Attributes:
        name: of what was checked. value: what was found.
        checked_by: what it was compared with, or what was done with it, in few words.
        servers: "ok", or what stands against it, by server; a server that it does not concern is missing.
    """

    name: str
    value: str
    checked_by: str
    servers: Mapping[str, str]


def check_servers(
    config: TrainConfig, renderer: Renderer, adapter: Path, merged: Path
) -> tuple[ServerCheck, ...]:
    """Check an adapter and the folder it was merged into.

    Args:
        adapter: folder of the adapter.
        merged: folder of the merged student.
    """
    tensors = stored_tensors(merged)
    return (
        *(() if config.is_full else _adapter_checks(weights.read_json(adapter / "adapter_config.json"))),
        _tied_head(merged, tensors),
        _dtype(merged, tensors),
        _vocabulary(merged, renderer, tensors),
        _generation_config(merged, renderer),
        _template(config, renderer),
        _file_names(merged),
    )


def adapter_obstacles(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return why a server can't serve an adapter beside its base, by server; those that can are missing."""
    obstacles = {"MLX": "has adapters of another format"}
    rank = int(settings.get("r") or 0)
    targets = settings.get("target_modules") or ()
    names = [targets] if isinstance(targets, str) else targets
    outer = next((n for n in names if n.split(".")[-1] in ("lm_head", "embed_tokens")), "")
    rows = bool(settings.get("trainable_token_indices"))
    if settings.get("use_dora"):
        obstacles |= dict.fromkeys(("vLLM", "SGLang"), "does not support DoRA")
    elif rows:
        obstacles |= dict.fromkeys(("vLLM", "SGLang"), "does not support adapters with rows of tokens")
    elif settings.get("modules_to_save"):
        obstacles |= dict.fromkeys(("vLLM", "SGLang"), "does not support adapters with whole modules")
    elif rank > VLLM_RANKS[-1]:
        obstacles["vLLM"] = f"supports ranks up to {VLLM_RANKS[-1]}"
    elif outer:
        obstacles["vLLM"] = f"does not support adapters on {outer}"
    if settings.get("use_rslora"):
        obstacles.setdefault("SGLang", "scales rsLoRA as LoRA")
    return obstacles


def _adapter_checks(settings: Mapping[str, Any]) -> tuple[ServerCheck, ...]:
    """Check rank, method and target modules of an adapter that is served beside its base."""
    obstacles = adapter_obstacles(settings)
    targets = settings.get("target_modules") or ()
    methods = {
        "use_rslora": "rsLoRA",
        "use_dora": "DoRA",
        "trainable_token_indices": "rows of tokens",
        "modules_to_save": "whole modules",
    }
    method = ", ".join(["LoRA", *(name for key, name in methods.items() if settings.get(key))])

    def servers(*words: str) -> dict[str, str]:
        found = {s: o for s, o in obstacles.items() if s == "MLX" or any(word in o for word in words)}
        return {server: found.get(server, _OK) for server in ("vLLM", "SGLang", "PEFT", "MLX")}

    return (
        ServerCheck("rank", str(settings.get("r")), "vLLM's ranks", servers("ranks up to")),
        ServerCheck(
            "target modules",
            targets if isinstance(targets, str) else ", ".join(sorted(targets)),
            "servers' lists",
            servers("adapters on"),
        ),
        ServerCheck(
            "method", method, "servers' lists", servers("DoRA", "rsLoRA", "rows of tokens", "whole modules")
        ),
    )


def _tied_head(merged: Path, tensors: Mapping[str, StoredTensor]) -> ServerCheck:
    """Say whether the output layer is the embedding; the export has loaded the folder and compared logits."""
    is_tied = bool(transformers.AutoConfig.from_pretrained(merged).get_text_config().tie_word_embeddings)
    has_head = any(name.endswith("lm_head.weight") for name in tensors)
    value = f"{'tied' if is_tied else 'own output layer'}{', stored too' if is_tied and has_head else ''}"
    return ServerCheck("tied heads", value, "logits compared", _all(""))


def _dtype(merged: Path, tensors: Mapping[str, StoredTensor]) -> ServerCheck:
    """Check that the configuration names the dtype of the weights, by which servers choose theirs."""
    config = weights.read_json(merged / "config.json")
    named = str(weights.text_config(merged).get("dtype") or config.get("dtype"))
    short = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(named)
    stored = {tensor.dtype for tensor in tensors.values() if len(tensor.shape) > 1}
    fault = "" if short in stored else f"reads {named} in config.json, the tensors are {min(stored)}"
    return ServerCheck("dtype", named, "config, tensors", _all(fault))


def _vocabulary(merged: Path, renderer: Renderer, tensors: Mapping[str, StoredTensor]) -> ServerCheck:
    """Check that every token id has a row in the embedding."""
    size = weights.vocabulary_size(merged)
    rows = next((t.shape[0] for name, t in tensors.items() if name.endswith("embed_tokens.weight")), size)
    ids = max(renderer.tokenizer.get_vocab().values()) + 1
    fault = ""
    if rows != size:
        fault = f"the embedding has {rows:,} rows"
    elif ids > size:
        fault = f"the tokenizer has ids up to {ids - 1:,}"
    return ServerCheck("vocabulary size", f"{size:,}", "embedding rows", _all(fault))


def _generation_config(merged: Path, renderer: Renderer) -> ServerCheck:
    """Check that generation_config.json ends answers where the student learned to end them."""
    ends = weights.read_json(merged / "generation_config.json").get("eos_token_id")
    ids = ends if isinstance(ends, list) else [ends]
    stop = renderer.chat_shape.stop_id
    fault = "" if stop in ids else f"lacks the end of turn, token {stop}"
    return ServerCheck(
        "generation_config",
        f"ends at {', '.join(map(str, ids))}",
        "end of turn",
        _all(fault),
    )


def _template(config: TrainConfig, renderer: Renderer) -> ServerCheck:
    """Check that the published template renders the prompts that were learned."""
    _, fault = serving_template(config, renderer)
    return ServerCheck(
        "chat template",
        "renders what was learned" if not fault else "differs",
        "rendered",
        _all(fault),
    )


def _file_names(merged: Path) -> ServerCheck:
    """Check the names of the files of weights: MLX, Ollama and llama.cpp read `model*.safetensors` only."""
    files = sorted(file.name for file in merged.glob("*.safetensors"))
    others = [name for name in files if not name.startswith("model")]
    fault = f"does not read {others[0]}" if others else ""
    value = files[0] if len(files) == 1 else f"{len(files)} files"
    return ServerCheck(
        "weight files", value, "their names", {**_all(""), **({"MLX": fault} if fault else {})}
    )


def _all(fault: str) -> dict[str, str]:
    return dict.fromkeys(_MERGED, fault or _OK)


# Widest text of the first column: the table has at most 80 columns.
_WIDEST = 30


def table(checks: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the checks as lines of at most 80 columns, and below them what stands against a server.

    Args:
        checks: from export.json: the fields of `ServerCheck`.
    """
    rows = [("checked", "vLLM", "SGLang", "serve", "PEFT", "MLX", "by")]
    reasons: dict[str, list[str]] = {}
    for check in checks:
        findings = {server: check["servers"].get(server) for server in ALL}
        for server, finding in findings.items():
            if finding not in (None, _OK):
                reasons.setdefault(f"{server}: {finding}", []).append(check["name"])
        cells = [{None: "-", _OK: _OK}.get(finding, "no") for finding in findings.values()]
        name = f"{check['name']}: {check['value']}"
        name = name if len(name) <= _WIDEST else f"{name[: _WIDEST - 3]}..."
        rows.append((name, *cells, check["checked_by"]))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return [
        *(line.rstrip() for line in lines),
        *(f"{reason} ({', '.join(names)})" for reason, names in reasons.items()),
    ]
