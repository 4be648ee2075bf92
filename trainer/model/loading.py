"""Load a base's weights and refuse what transformers tolerates: missing, unexpected or odd tensors.

transformers fills a missing tensor with random numbers, anew in each process, and leaves out a tensor that
it has no place for; both only with a warning. Here each is an error that names the tensor.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from trainer.errors import StudentError
from trainer.model.weights import check_base, tensor_shapes

# Remedy where transformers can't make a model of a base's files.
ONE_DOWNLOAD = (
    "check that config.json, tokenizer and *.safetensors are of one download and that this transformers "
    "supports the architecture"
)

# Buffers that older versions of transformers saved and newer ones compute.
_COMPUTED_BUFFER = re.compile(r"(rotary_emb\.inv_freq|\.attn\.(masked_)?bias)$")


def load_model(folder: Path, **options: Any) -> Any:
    """Load a causal language model from a base's folder, complete and without leftovers.

    Args:
        options: passed to transformers, e.g. `dtype`; `device_map="meta"` compares names and shapes only.

    Raises:
        StudentError: files that transformers can't make a model of, or tensors that don't fit it.
    """
    check_base(folder)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # then they are reported by name, and refused here
            **options,
        )
    except Exception as error:  # noqa: BLE001 - safetensors, transformers and torch each raise their own
        raise StudentError(
            f"the base can't be loaded: {first_line(error)}", place=str(folder), remedy=ONE_DOWNLOAD
        ) from None
    _refuse_odd_tensors(info, folder)
    _refuse_untied(model, folder)
    return model


def load_shapes(folder: Path) -> Any:
    """Load a base's model without its weights, on the meta device, after the checks of `load_model`."""
    return load_model(folder, device_map="meta")


def unused_tensors(model: Any, folder: Path) -> list[str]:
    """Return the base's tensors that its class knows and leaves out, such as those of a vision tower."""
    patterns = model._keys_to_ignore_on_load_unexpected or ()
    held = model.state_dict().keys()  # the patterns match some of these too: "attn.bias", "c_attn.bias"
    return [
        name
        for name in tensor_shapes(folder)
        if name not in held
        and any(re.search(pattern, name) for pattern in patterns)
        and not _COMPUTED_BUFFER.search(name)
    ]


def check_adapter_tensors(student: Any, folder: Path) -> None:
    """Refuse an adapter file that lacks tensors of the adapter, or holds others.

    Raises:
        StudentError: names the first of each and their number.
    """
    with safe_open(str(folder / "adapter_model.safetensors"), framework="pt") as file:
        stored = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    held = get_peft_model_state_dict(student, save_embedding_layers=False)
    wanted = {name: tuple(tensor.shape) for name, tensor in held.items()}
    _refuse(
        {
            "missing": wanted.keys() - stored.keys(),
            "unexpected": stored.keys() - wanted.keys(),
            "of another shape": {n for n in wanted.keys() & stored.keys() if wanted[n] != stored[n]},
        },
        "the adapter's tensors don't fit this base",
        folder,
        "use the base that the adapter was trained on, or train it again",
    )


def first_line(error: BaseException) -> str:
    """Return the first line of a library's error message, at most 300 characters."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300]


def kind_and_first_line(error: BaseException, most: int = 120) -> str:
    """Return the kind of an error and the first line of its message, at most `most` characters of it."""
    message = (str(error).strip() or "no message").splitlines()[0][:most]
    return f"{type(error).__name__}: {message}"


def _refuse_odd_tensors(info: Mapping[str, Any], folder: Path) -> None:
    unexpected = {name for name in info["unexpected_keys"] if not _COMPUTED_BUFFER.search(name)}
    _refuse(
        {
            "missing": info["missing_keys"],
            "unexpected": unexpected,
            "of another shape": {key[0] for key in info["mismatched_keys"]},
        },
        "the base's tensors don't fit its config.json",
        folder,
        "fetch the base again, whole; a missing tensor would be filled with random numbers",
    )
    if info["error_msgs"]:
        message = f"the base can't be loaded: {info['error_msgs'][0][:300]}"
        raise StudentError(message, place=str(folder), remedy=ONE_DOWNLOAD)


def _refuse(kinds: Mapping[str, Collection[str]], problem: str, folder: Path, remedy: str) -> None:
    """Raise StudentError if any kind has tensors: their number and the first by name."""
    parts = [f"{len(names):,} {kind} (first: {min(names)})" for kind, names in kinds.items() if names]
    if parts:
        raise StudentError(f"{problem}: {', '.join(parts)}", place=str(folder), remedy=remedy)


def _refuse_untied(model: Any, folder: Path) -> None:
    """Refuse a base whose configuration ties two tensors that its files hold with different values."""
    ties = model._tied_weights_keys
    if not getattr(model.config, "tie_word_embeddings", False) or not isinstance(ties, dict):
        return
    names = tensor_shapes(folder)
    for name, source in ties.items():
        if name not in names or source not in names:
            continue
        if not torch.equal(_read_tensor(folder, name), _read_tensor(folder, source)):
            raise StudentError(
                f"config.json ties {name} to {source}, but the files hold different values for them",
                place=str(folder),
                remedy='set "tie_word_embeddings" in config.json as the base was trained, or fetch it again',
            )


def _read_tensor(folder: Path, name: str) -> torch.Tensor:
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            if name in file.keys():  # noqa: SIM118
                tensor: torch.Tensor = file.get_tensor(name)
                return tensor
    raise StudentError(f"no tensor {name}", place=str(folder))
