"""Treat rotary embeddings whose angles depend on the longest row: dynamic scaling and LongRoPE.

transformers chooses the angles of a whole forward pass by its longest row, so a short document beside a long
one is computed otherwise than alone. Documents on the two sides of that border get passes of their own.
"""

from __future__ import annotations

from typing import Any

from trainer.model import structure
from trainer.model.forward.rows import RotaryBorder


def kinds_of(parameters: Any) -> set[str]:
    """Return the kinds of rotary embedding in a configuration's `rope_parameters`, which may be by layer."""
    if not isinstance(parameters, dict):
        return set()
    nested = (kinds_of(value) for value in parameters.values())
    return {str(parameters.get("rope_type", "default"))}.union(*nested)


def border_of(model: Any) -> RotaryBorder | None:
    """Return from which length on a model's rotary embedding is another one; None: from none."""
    config = structure.text_config(model)
    parameters = getattr(config, "rope_parameters", None)
    kinds = kinds_of(parameters)
    borders: list[int] = []
    if "longrope" in kinds:
        borders += _values_of("original_max_position_embeddings", parameters)
    if any("dynamic" in kind for kind in kinds):
        borders.append(config.max_position_embeddings)
    borders = [border for border in borders if isinstance(border, int)]
    return RotaryBorder(min(borders), any("dynamic" in kind for kind in kinds)) if borders else None


def _values_of(name: str, parameters: Any) -> list[Any]:
    """Return the values of a name in a table and in tables within it."""
    if not isinstance(parameters, dict):
        return []
    nested = [value for part in parameters.values() for value in _values_of(name, part)]
    return [*([parameters[name]] if name in parameters else []), *nested]


def forget_lengths(model: Any) -> None:
    """Let a rotary embedding with dynamic scaling compute every forward pass as if it were the first.

    transformers' own keeps the angles of the longest row that it has seen, until a short row comes.
    """
    for module in model.modules():
        if hasattr(module, "max_seq_len_cached") and hasattr(module, "original_max_seq_len"):
            module.register_forward_pre_hook(_begin_anew)


def _begin_anew(module: Any, _arguments: Any) -> None:
    kinds = module.rope_type if isinstance(module.rope_type, dict) else {"": module.rope_type}
    for layer, kind in kinds.items():
        prefix = f"{layer}_" if layer else ""
        if "dynamic" not in kind:
            continue
        original = getattr(module, f"{prefix}original_inv_freq")
        device = getattr(module, f"{prefix}inv_freq").device
        module.register_buffer(f"{prefix}inv_freq", original.to(device), persistent=False)
        setattr(module, f"{prefix}max_seq_len_cached", module.original_max_seq_len)


def keep_angles(model: Any) -> None:
    """Let rotary embeddings keep their angles, whatever the rows: fake tensors hold no numbers."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, dict):
            module.rope_type = dict.fromkeys(kinds, "default")
        elif isinstance(kinds, str):
            module.rope_type = "default"
