"""Merge an adapter into a base tensor by tensor: each weight is merged in fp32, cast and written on its own.

The base stays in the dtype of its files. The logits that prove the merge are computed in fp32 all the same:
during a forward, the weights of one decoder layer at a time are converted. So the memory needed beyond the
base is that of its largest layer, not that of further copies of the model.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open

from trainer.errors import StudentError
from trainer.model import structure, weights

INDEX_FILE = "model.safetensors.index.json"

# Float dtypes by their names in a safetensors header. Weights of any other dtype are copied as they are.
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_NAMES = {dtype: name for name, dtype in FLOATS.items()}

# Files of a multimodal base that a server needs beside config, weights and tokenizer.
_PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


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
        raise StudentError("the weights are quantised: an adapter can't be merged into them")
    return FLOATS[name]


def adapted_tensors(student: Any, tensors: Mapping[str, StoredTensor]) -> dict[str, BaseTunerLayer] | None:
    """Find, for each layer with an adapter, the tensor of the base's files that holds its weight.

    Args:
        student: a PEFT model.
        tensors: from `stored_tensors`.

    Returns:
        Adapted layers by the name of the stored tensor; None if a layer's weight is not stored as one tensor
        of the same shape, because transformers converts it when it loads the base, or if the adapter is on a
        bare parameter (the experts of a mixture).
    """
    adapted: dict[str, BaseTunerLayer] = {}
    seen: set[int] = set()
    for name, module in structure.base_model_of(student).named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        weight = getattr(module.get_base_layer(), "weight", None)
        if weight is None:  # PEFT adapts a parameter of the experts' module, not a layer
            return None
        if weight.data_ptr() in seen:
            continue  # the other of two tied layers
        seen.add(weight.data_ptr())
        stored = _stored_name(f"{name.removesuffix('.token_adapter')}.weight", tensors)
        if stored is None or tensors[stored].shape != tuple(weight.shape) or stored in adapted:
            return None
        adapted[stored] = module
    return adapted


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
    """Merge one layer's adapter into an fp32 copy of its weight during the block, and yield that weight."""
    base_layer = layer.get_base_layer()
    original = base_layer.weight.data
    base_layer.weight.data = original.to(torch.float32, copy=True)
    try:
        layer.merge(safe_merge=True)
        yield base_layer.weight.data
    finally:
        base_layer.weight.data = original
        layer.merged_adapters.clear()
        getattr(layer, "_caches", {}).clear()


@contextmanager
def float32_forward(model: Any, *, merge: bool = False, cast: torch.dtype | None = None) -> Iterator[None]:
    """Let forwards compute in fp32 during the block, with the weights of one layer converted at a time.

    Args:
        model: a model of transformers, or a PEFT model around one.
        merge: merge the adapters while their layer runs.
        cast: round the weights, merged ones too, to this dtype first.
    """
    hooks = []
    for block, recurse in _blocks(structure.base_model_of(model)):
        converted = _ConvertedBlock(block, recurse=recurse, merge=merge, cast=cast)
        hooks.append(block.register_forward_pre_hook(converted.enter))
        hooks.append(block.register_forward_hook(converted.leave, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class _ConvertedBlock:
    """Convert the weights of a module to fp32 before its forward, and put the stored ones back after it."""

    def __init__(
        self, block: torch.nn.Module, *, recurse: bool, merge: bool, cast: torch.dtype | None
    ) -> None:
        self._block = block
        self._recurse = recurse
        self._merge = merge
        self._cast = cast
        self._stored: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        self._merged: list[Any] = []

    def enter(self, *_: Any) -> None:
        if self._merge:
            for module in self._block.modules():
                if isinstance(module, BaseTunerLayer):
                    merging = merged_in_float32(module)
                    merging.__enter__()
                    self._merged.append(merging)
        for name, parameter in self._block.named_parameters(recurse=self._recurse):
            is_cast = self._cast not in (None, parameter.dtype) and "lora_" not in name
            if is_cast or parameter.dtype in (torch.bfloat16, torch.float16):
                self._stored.append((parameter, parameter.data))
                data = parameter.data.to(self._cast) if is_cast else parameter.data
                parameter.data = data.float()

    def leave(self, *_: Any) -> None:
        for parameter, stored in self._stored:
            parameter.data = stored
        self._stored.clear()
        for merging in self._merged:
            merging.__exit__(None, None, None)
        self._merged.clear()


def _blocks(base: Any) -> list[tuple[torch.nn.Module, bool]]:
    """Return the modules whose weights are converted together, and whether that includes their children's."""
    layers = structure.decoder_layers(base)
    blocks: list[tuple[torch.nn.Module, bool]] = [(layer, True) for layer in layers]
    covered = {id(module) for layer in layers for module in layer.modules()}
    for module in base.modules():
        if id(module) in covered:
            continue
        if isinstance(module, BaseTunerLayer):
            blocks.append((module, True))
            covered.update(id(inner) for inner in module.modules())
        elif next(module.parameters(recurse=False), None) is not None:
            blocks.append((module, False))
    return blocks


def write_merged(base: Path, folder: Path, adapted: Mapping[str, BaseTunerLayer], dtype: torch.dtype) -> None:
    """Write configuration and weights of the merged student: files, names and layout are those of the base.

    Each written tensor is read back and compared.

    Args:
        adapted: from `adapted_tensors`.
        dtype: of the written weights. A float tensor that the base stores in another dtype than the rest
            keeps it, unless it is adapted or `dtype` is float32.

    Raises:
        StudentError: an adapter is not finite, or a file does not hold what was written to it.
        OSError: the folder can't be written.
    """
    tensors = stored_tensors(base)
    main = _NAMES[stored_dtype(tensors)]

    def written_dtype(name: str) -> str:
        stored = tensors[name].dtype
        is_cast = stored in FLOATS and (name in adapted or stored == main or dtype is torch.float32)
        return _NAMES[dtype] if is_cast else stored

    folder.mkdir(parents=True)
    for file in dict.fromkeys(tensor.file for tensor in tensors.values()):
        names = [name for name, tensor in tensors.items() if tensor.file == file]
        entries = [(name, written_dtype(name), tensors[name].shape) for name in names]
        merged = (_merged_tensor(file, name, adapted, written_dtype(name)) for name in names)
        hashes = write_safetensors(folder / file.name, entries, merged)
        _check_written(folder / file.name, hashes)
    _write_index(base, folder)
    _write_config(base, folder, dtype)


def _merged_tensor(file: Path, name: str, adapted: Mapping[str, BaseTunerLayer], dtype: str) -> torch.Tensor:
    if name not in adapted:
        header, begin = _header(file)
        stored = _read(file, header[name], begin)
        if dtype == header[name]["dtype"] or dtype not in FLOATS:
            return stored
        return stored.view(FLOATS[header[name]["dtype"]]).to(FLOATS[dtype])
    try:
        with merged_in_float32(adapted[name]) as merged:
            return merged.to(FLOATS[dtype])
    except ValueError as error:
        raise StudentError(f"{name} can't be merged: {error}", remedy="train the adapter again") from None


def write_safetensors(
    file: Path,
    entries: Sequence[tuple[str, str, tuple[int, ...]]],
    tensors: Iterable[torch.Tensor],
) -> dict[str, str]:
    """Write a safetensors file one tensor at a time.

    Format: 8 bytes with the length of the header, the header (JSON), the tensors without gaps.

    Args:
        entries: name, dtype (its name in the header) and shape of each tensor, in the order of the file.
        tensors: their values in that order; each is taken when the one before it has been written.

    Returns:
        SHA-256 of each tensor's bytes, by name.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in entries:
        begin, end = end, end + torch.Size(shape).numel() * _ITEM_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hashes = {}
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for (name, _, _), tensor in zip(entries, tensors, strict=True):
            data = _bytes_of(tensor)
            hashes[name] = hashlib.sha256(data).hexdigest()
            out.write(data)
    return hashes


# Bytes of an element by the dtype's name in a safetensors header.
_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}


def _bytes_of(tensor: torch.Tensor) -> Any:
    """Return a tensor's memory as an array of bytes, without a copy where it is contiguous."""
    return tensor.detach().contiguous().flatten().view(torch.uint8).numpy()


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """Read the header of a safetensors file, and where the first tensor begins."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return dict(json.loads(opened.read(length))), 8 + length


def _read(file: Path, entry: Mapping[str, Any], begin: int) -> torch.Tensor:
    """Read the bytes of one tensor [bytes], without mapping the file: its pages would count as memory."""
    first, end = entry["data_offsets"]
    with file.open("rb") as opened:
        opened.seek(begin + first)
        data = bytearray(opened.read(end - first))
    return torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def _check_written(file: Path, hashes: Mapping[str, str]) -> None:
    header, begin = _header(file)
    for name, digest in hashes.items():
        if hashlib.sha256(_bytes_of(_read(file, header[name], begin))).hexdigest() != digest:
            raise StudentError(
                f"the written weights are not the merged ones: {name}",
                place=str(file),
                remedy="check the disk, and export again",
            )


def _write_index(base: Path, folder: Path) -> None:
    index = dict(weights.read_json(base / INDEX_FILE))
    if not index:
        return
    sizes = [path.stat().st_size for path in folder.glob("*.safetensors")]
    index["metadata"] = {**index.get("metadata", {}), "total_size": sum(sizes)}
    (folder / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _write_config(base: Path, folder: Path, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    config = dict(weights.read_json(base / "config.json"))
    for part in (config, config.get("text_config")):
        if isinstance(part, dict):
            part.pop("torch_dtype", None)  # the name that older versions of transformers wrote
            part["dtype"] = name
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in _PROCESSOR_FILES:
        if (base / file).is_file():
            shutil.copyfile(base / file, folder / file)


def check_loaded(model: Any, folder: Path, names: Sequence[str]) -> None:
    """Check that a reloaded student has the written weights at the layers that were adapted.

    Args:
        names: stored tensors that were merged.

    Raises:
        StudentError: names the first that differs.
    """
    tensors = stored_tensors(folder)
    parameters = dict(structure.base_model_of(model).named_parameters())
    stored_names = {_stored_name(name, tensors): name for name in parameters}
    for name in names:
        parameter = parameters[stored_names[name]] if name in stored_names else None
        with safe_open(str(tensors[name].file), framework="pt") as opened:
            written = opened.get_tensor(name)
        if parameter is None or not torch.equal(parameter.data, written.to(parameter.dtype)):
            raise StudentError(
                f"the written weights are not the ones that are loaded: {name}",
                place=str(folder),
                remedy="the base's files and config disagree (tied weights?); serve base and adapter apart",
            )
