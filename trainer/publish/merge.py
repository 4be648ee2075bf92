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
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open

from trainer.errors import StudentError
from trainer.model import structure, weights
from trainer.publish.adapted_weights import (
    FLOATS,
    INDEX_FILE,
    AdaptedGroup,
    merged_in_float32,
    stored_dtype,
    stored_tensors,
)

_NAMES = {dtype: name for name, dtype in FLOATS.items()}

# Files of a base that a server needs beside config, weights and the files that a tokenizer saves: of
# multimodal ones, and the model of SentencePiece, from which llama.cpp's converter reads the pieces' scores.
_COPIED_FILES = (
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.model",
)


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
        if self._merge and self._recurse:  # else the children are blocks of their own
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


def write_merged(base: Path, folder: Path, groups: Sequence[AdaptedGroup], dtype: torch.dtype) -> None:
    """Write configuration and weights of the merged student: files, names and layout are those of the base.

    Each written tensor is read back and compared.

    Args:
        groups: from `adapted_groups`.
        dtype: of the written weights. A float tensor that the base stores in another dtype than the rest
            keeps it, unless it is adapted or `dtype` is float32.

    Raises:
        StudentError: an adapter is not finite, or a file does not hold what was written to it.
        OSError: the folder can't be written.
    """
    tensors = stored_tensors(base)
    main = _NAMES[stored_dtype(tensors)]
    group_of = {name: group for group in groups for name in group.stored}

    def written_dtype(name: str) -> str:
        stored = tensors[name].dtype
        is_cast = stored in FLOATS and (name in group_of or stored == main or dtype is torch.float32)
        return _NAMES[dtype] if is_cast else stored

    folder.mkdir(parents=True)
    for file in dict.fromkeys(tensor.file for tensor in tensors.values()):
        entries = [(n, written_dtype(n), t.shape) for n, t in tensors.items() if t.file == file]
        hashes = write_safetensors(folder / file.name, entries, _file_tensors(file, entries, group_of))
        _check_written(folder / file.name, hashes)
    _write_index(base, folder)
    _write_config(base, folder, dtype)


def _file_tensors(
    file: Path, entries: Sequence[tuple[str, str, tuple[int, ...]]], group_of: Mapping[str, AdaptedGroup]
) -> Iterator[torch.Tensor]:
    """Yield the tensors of one file: merged ones from their group, the others as they are stored.

    The tensors of a group are merged together and kept until each was taken. A file names the tensors of a
    decoder layer one after the other, so what is kept is part of a layer.
    """
    dtypes = {name: dtype for name, dtype, _ in entries}
    merged: dict[str, torch.Tensor] = {}
    header, begin = _header(file)
    for name, dtype, _ in entries:
        if name in group_of:
            if name not in merged:
                merged |= _merge_group(group_of[name], dtypes)
            yield merged.pop(name)
            continue
        stored, stored_in = _read(file, header[name], begin), header[name]["dtype"]
        if dtype == stored_in or dtype not in FLOATS:
            yield stored
        else:
            yield stored.view(FLOATS[stored_in]).to(FLOATS[dtype])


def _merge_group(group: AdaptedGroup, dtypes: Mapping[str, str]) -> dict[str, torch.Tensor]:
    """Merge a group and cast its tensors; those of other files are left out.

    Args:
        dtypes: of the tensors of this file, by name.
    """
    try:
        stored = group.merged()
    except ValueError as error:
        first = next(iter(group.parameters))
        raise StudentError(f"{first} can't be merged: {error}", remedy="train the adapter again") from None
    return {name: stored[name].to(FLOATS[dtypes[name]]) for name in group.stored if name in dtypes}


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
    for file in _COPIED_FILES:
        if (base / file).is_file():
            shutil.copyfile(base / file, folder / file)


def check_loaded(model: Any, folder: Path, groups: Sequence[AdaptedGroup]) -> None:
    """Check that a reloaded student has the written weights at the layers that were adapted.

    Args:
        groups: what was merged.

    Raises:
        StudentError: names the first that differs.
    """
    tensors = stored_tensors(folder)
    base = structure.base_model_of(model)
    parameters = dict(base.named_parameters(remove_duplicate=False))
    for group in groups:
        loaded = {name: parameters[name].data for name in group.parameters if name in parameters}
        stored = group.as_stored(base, loaded) if len(loaded) == len(group.parameters) else {}
        for name in group.stored:
            with safe_open(str(tensors[name].file), framework="pt") as opened:
                written = opened.get_tensor(name)
            if name not in stored or not torch.equal(stored[name], written.to(stored[name].dtype)):
                raise StudentError(
                    f"the written weights are not the ones that are loaded: {name}",
                    place=str(folder),
                    remedy="its files and config disagree (tied weights?); serve base and adapter apart",
                )
