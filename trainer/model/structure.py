"""Find the parts of a causal language model by their properties, not by the names one family gives them.

Models of transformers differ in where they keep their decoder layers (`model.layers`, `transformer.h`,
`gpt_neox.layers`, `model.language_model.layers` of a multimodal model) and in which configuration holds the
sizes. Everything that needs a part asks here.
"""

from __future__ import annotations

from typing import Any

import torch


def base_model_of(student: Any) -> Any:
    """Return the model of transformers inside a PEFT model, or the model itself."""
    return student.get_base_model() if hasattr(student, "get_base_model") else student


def text_config(model: Any) -> Any:
    """Return the configuration of the text part; a multimodal model nests it."""
    config = getattr(model, "config", model)
    return config.get_text_config(decoder=True)


def backbone(base: Any) -> Any:
    """Return the module that computes hidden states, which the output layer turns into logits.

    Returns:
        None if the model has no such module of its own.
    """
    module = base.base_model
    if module is not base:
        children = list(module.children())
        # OPT and decoders of BART's kind call the one module in their wrapper, and not the wrapper.
        return children[0] if len(children) == 1 else module
    layers = layer_list(base)
    holders = (child for child in base.children() if any(module is layers for module in child.modules()))
    return next(holders, None) if layers is not None else None


def layer_list(base: Any) -> torch.nn.ModuleList | None:
    """Return the list of decoder layers: as long as the configuration says, and the largest such list.

    Returns:
        None if the model has no such list.
    """
    count = int(getattr(text_config(base), "num_hidden_layers", 0) or 0)
    lists = [m for m in text_tower(base).modules() if isinstance(m, torch.nn.ModuleList) and len(m) == count]
    return max(lists, key=_parameter_count, default=None)


def decoder_layers(base: Any) -> list[Any]:
    """Return the decoder layers; empty if they can't be found."""
    layers = layer_list(base)
    return [] if layers is None else list(layers)


def text_tower(base: Any) -> Any:
    """Return the module that holds the text decoder: the whole model, unless it has other towers too."""
    decoder = base.get_decoder() if hasattr(base, "get_decoder") else None
    return base if decoder is None else decoder


def modules_outside_text(base: Any) -> list[str]:
    """Return the names of linear layers that text never passes through, such as those of a vision tower."""
    inside = {id(module) for module in text_tower(base).modules()}
    head = base.get_output_embeddings()
    if len(inside) <= 1 or text_tower(base) is base:
        return []
    return [
        name
        for name, module in base.named_modules()
        if id(module) not in inside and module is not head and is_linear(module)
    ]


def special_token_ids(base: Any) -> set[int]:
    """Return the token ids that the configuration names, e.g. of padding or of an image's place."""
    ids: set[int] = set()
    for config in (base.config, text_config(base)):
        for name, value in config.to_dict().items():
            if is_token_id(name):
                ids.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    return ids


def is_token_id(name: str) -> bool:
    """Return whether a configuration entry holds ids of special tokens, by its name (`pad_token_id`)."""
    return name.endswith(("token_id", "token_index"))


def vocabulary_rows(base: Any) -> int:
    """Return the number of rows of the input embedding."""
    return int(base.get_input_embeddings().weight.shape[0])


def is_linear(module: Any) -> bool:
    """Return whether a module is a linear layer: torch's, or the transposed one of GPT-2."""
    return isinstance(module, torch.nn.Linear) or type(module).__name__ == "Conv1D"


def _parameter_count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
