"""Find the tensors of a base's files that hold the parameters with an adapter, and merge them group by group.

Most layers are stored as one tensor of the same shape and name. Others are converted by transformers when it
loads a base; how is asked of transformers itself.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors import safe_open
from transformers.core_model_loading import revert_weight_conversion

from trainer.errors import StudentError
from trainer.model import structure, weights

INDEX_FILE = "model.safetensors.index.json"

# Float dtypes by their names in a safetensors header. Weights of any other dtype are copied as they are.
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

# Names of parameters that belong to an adapter and not to the base.
_ADAPTER_PARAMETER = re.compile(r"\.(lora_|trainable_tokens_|modules_to_save\.)")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Describe a tensor in the files of a base. dtype: its name in the safetensors header."""

    file: Path
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size if the dtype is one of `FLOATS`; only used to weigh the dtypes of a base."""
        return torch.Size(self.shape).numel() * FLOATS[self.dtype].itemsize if self.dtype in FLOATS else 0


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """Read names, dtypes and shapes of the tensors that transformers would load, in the order of the files.

    Raises:
        StudentError: no model.safetensors and no index of one.
    """
    index = weights.read_json(folder / INDEX_FILE).get("weight_map", {})
    names = sorted(set(index.values())) or ["model.safetensors"]
    tensors: dict[str, StoredTensor] = {}
    for file in (folder / name for name in names):
        if not file.is_file():
            raise StudentError(f"no {file.name}", place=str(folder), remedy="fetch the base again")
        with safe_open(str(file), framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                part = opened.get_slice(name)
                tensors[name] = StoredTensor(file, str(part.get_dtype()), tuple(part.get_shape()))
    return tensors


def stored_dtype(tensors: Mapping[str, StoredTensor]) -> torch.dtype:
    """Return the float dtype that most bytes of a base have.

    Raises:
        StudentError: no weight has a float dtype of 16 or 32 bits.
    """
    sizes = {dtype: sum(t.bytes for t in tensors.values() if t.dtype == dtype) for dtype in FLOATS}
    name = max(sizes, key=lambda dtype: sizes[dtype])
    if not sizes[name]:
        raise StudentError(
            "the weights are quantised: an adapter can't be merged into them",
            remedy="serve base and adapter separately",
        )
    return FLOATS[name]


@dataclass(frozen=True, slots=True)
class ChangedParameter:
    """A parameter that a training changed.

    Attributes:
        name: in the model of transformers, without the names that PEFT adds.
        value: the base's parameter under an adapter; else the changed one.
        layer: with the adapter; None if the parameter itself was changed.
    """

    name: str
    value: torch.nn.Parameter
    layer: BaseTunerLayer | None = None


@dataclass(frozen=True, slots=True)
class AdaptedGroup:
    """Parameters whose stored tensors are computed together, at least one of them with an adapter.

    Most layers are stored as one tensor of the same shape. transformers converts others when it loads a base:
    the experts of a mixture are stored one by one and held in one parameter.

    Attributes:
        base: the model of transformers.
        parameters: by name in that model; those with an adapter are in `adapted`.
        stored: names of the tensors in the base's files.
        is_converted: whether transformers converts the tensors.
    """

    base: Any
    parameters: Mapping[str, torch.Tensor]
    adapted: Mapping[str, BaseTunerLayer]
    stored: tuple[str, ...]
    is_converted: bool

    def merged(self) -> dict[str, torch.Tensor]:
        """Return the stored tensors with the adapter merged, in fp32.

        Raises:
            ValueError: an adapter is not finite.
        """
        values = {}
        for name, parameter in self.parameters.items():
            if name in self.adapted:
                with merged_in_float32(self.adapted[name]) as merged:
                    values[name] = merged
            else:
                values[name] = parameter.detach().float()
        return self.as_stored(self.base, values)

    def without_weights(self) -> AdaptedGroup:
        """Return the group without references to the model, so that its memory can be freed."""
        parameters = {name: torch.empty(0) for name in self.parameters}
        return replace(self, base=None, parameters=parameters, adapted={})

    def as_stored(self, base: Any, values: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Convert parameters of a model to the tensors that its files have."""
        if self.is_converted:
            return dict(revert_weight_conversion(base, dict(values)))
        return dict(zip(self.stored, values.values(), strict=True))


def adapted_groups(
    student: Any, tensors: Mapping[str, StoredTensor], changed: Sequence[str] = ()
) -> list[AdaptedGroup]:
    """Find, for each parameter that a training changed, the tensors of the base's files that hold it.

    Args:
        student: a PEFT model, or a model of transformers.
        tensors: from `stored_tensors`.
        changed: names of parameters that were changed without an adapter, beside `modules_to_save`.

    Raises:
        StudentError: the tensors of an adapted parameter can't be told.
    """
    base = structure.base_model_of(student)
    adapted = {each.name: each for each in _changed_parameters(base, frozenset(changed))}
    groups: list[AdaptedGroup] = []
    grouped: set[str] = set()
    adapted |= _stored_twice(base, adapted, tensors)
    for name, each in adapted.items():
        if name in grouped:
            continue
        group = (
            _converted_group(base, {name: each.value}, adapted, tensors)
            or _named_group(base, each, tensors)
            or _converted_group(base, _siblings(base, name), adapted, tensors)
        )
        if group is None or any(stored in other.stored for other in groups for stored in group.stored):
            raise StudentError(
                f"it can't be told which tensors of the base's files hold {name}",
                remedy="serve base and adapter apart",
            )
        groups.append(group)
        grouped.update(group.parameters)
    return groups


def _adapted(layer: BaseTunerLayer) -> tuple[torch.nn.Module, str]:
    """Return the module that holds an adapter's parameter, and the parameter's name in it."""
    return layer.get_base_layer(), getattr(layer, "parameter_name", "weight")


def _plain_name(name: str) -> str:
    """Return a name in the model of transformers without the parts that PEFT inserts."""
    added = ("base_layer", "token_adapter", "original_module")
    return ".".join(part for part in name.split(".") if part not in added)


def _changed_parameters(base: Any, changed: Collection[str]) -> Iterator[ChangedParameter]:
    seen: set[int] = set()

    def is_new(parameter: torch.Tensor) -> bool:  # else the other of two tied layers
        known = parameter.data_ptr() in seen
        seen.add(parameter.data_ptr())
        return not known

    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            inner, attribute = _adapted(module)
            parameter = getattr(inner, attribute)
            if is_new(parameter):
                yield ChangedParameter(f"{_plain_name(name)}.{attribute}", parameter, module)
        elif isinstance(module, ModulesToSaveWrapper):
            for own, parameter in module.modules_to_save["default"].named_parameters():
                if is_new(parameter):
                    yield ChangedParameter(f"{_plain_name(name)}.{own}", parameter)
    for name, parameter in base.named_parameters():
        if _plain_name(name) in changed and is_new(parameter):
            yield ChangedParameter(_plain_name(name), parameter)


def _stored_twice(
    base: Any, changed: Mapping[str, ChangedParameter], tensors: Mapping[str, StoredTensor]
) -> dict[str, ChangedParameter]:
    """Return the other name of changed tied weights, where the base's files hold these weights twice."""
    ties = getattr(base, "_tied_weights_keys", None)
    if not getattr(base.config, "tie_word_embeddings", False) or not isinstance(ties, dict):
        return {}
    found = {}
    for one, other in ties.items():
        for name, source in ((one, other), (other, one)):
            if source in changed and name not in changed and name in tensors:
                found[name] = replace(changed[source], name=name)
    return found


def _converted_group(
    base: Any,
    parameters: Mapping[str, torch.Tensor],
    adapted: Mapping[str, ChangedParameter],
    tensors: Mapping[str, StoredTensor],
) -> AdaptedGroup | None:
    """Ask transformers how it would store parameters; None unless the base's files have exactly that."""
    empty = {name: torch.empty_like(value, device="meta") for name, value in parameters.items()}
    try:
        stored = revert_weight_conversion(base, empty)
    except Exception:  # noqa: BLE001 - conversions raise their own kinds for tensors that belong together
        return None
    if not all(name in tensors and tensors[name].shape == tuple(t.shape) for name, t in stored.items()):
        return None
    layers = {
        name: layer
        for name in parameters
        if (each := adapted.get(name)) is not None and (layer := each.layer) is not None
    }
    return AdaptedGroup(base, parameters, layers, tuple(stored), is_converted=True)


def _named_group(
    base: Any, each: ChangedParameter, tensors: Mapping[str, StoredTensor]
) -> AdaptedGroup | None:
    """Find the stored tensor of one parameter by its name."""
    stored = _stored_name(each.name, tensors)
    if stored is None or tensors[stored].shape != tuple(each.value.shape):
        return None
    parameters = {each.name: each.value}
    layers = {} if each.layer is None else {each.name: each.layer}
    return AdaptedGroup(base, parameters, layers, (stored,), is_converted=False)


def _siblings(base: Any, name: str) -> dict[str, torch.Tensor]:
    """Return the parameters of the module around one, without those of adapters."""
    parent = name.rpartition(".")[0].rpartition(".")[0]
    return {
        _plain_name(other): parameter
        for other, parameter in base.named_parameters()
        if _plain_name(other).startswith(f"{parent}.") and not _ADAPTER_PARAMETER.search(other)
    }


def _stored_name(parameter: str, tensors: Mapping[str, StoredTensor]) -> str | None:
    """Return the stored tensor of a parameter: the same name, or the only one that differs by a prefix."""
    if parameter in tensors:
        return parameter
    parts = parameter.split(".")
    for start in range(len(parts) - 1):
        ending = ".".join(parts[start:])
        matches = [name for name in tensors if name == ending or name.endswith(f".{ending}")]
        if len(matches) > 1:
            matches = [name for name in matches if "language_model" in name or "text_model" in name]
        if matches:
            return matches[0] if len(matches) == 1 else None
    return None


@contextmanager
def merged_in_float32(layer: BaseTunerLayer) -> Iterator[torch.Tensor]:
    """Merge one layer's adapter into an fp32 copy of its parameter during the block, and yield that copy.

    Raises:
        ValueError: the merged parameter is not finite.
    """
    module, attribute = _adapted(layer)
    parameter = getattr(module, attribute)
    original = parameter.data
    parameter.data = original.to(torch.float32, copy=True)
    try:
        layer.merge()
        if not torch.isfinite(parameter.data).all():
            raise ValueError("the adapter has values that are not finite")
        yield parameter.data
    finally:
        parameter.data = original
        layer.merged_adapters.clear()
        getattr(layer, "_caches", {}).clear()
