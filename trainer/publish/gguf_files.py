"""Write the GGUF files of a merged student and of its adapter, and read each of them back.

What is read back: the chat template byte for byte, the tokens that end an answer, the number of tokens, that
every weight is finite, and which type each tensor got.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from harvester.terms.lineage import Lineage
from trainer.config import TrainConfig
from trainer.data.chat_template import Renderer
from trainer.errors import ConfigError, StudentError
from trainer.model import model, weights
from trainer.provenance.student_facts import base_name
from trainer.publish import gguf_convert, quantise
from trainer.publish.gguf_convert import GgufFacts

# Kinds that `--gguf` takes: those of the converter, and those of llama.cpp's quantiser.
CONVERTED = ("f16", "q8_0")
KINDS = (*CONVERTED, *quantise.FILE_TYPES)
# Keys that hold the tokens at which llama.cpp ends an answer.
_ENDS = ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")


def check_kinds(kinds: Sequence[str], config: TrainConfig, renderer: Renderer) -> None:
    """Do nothing if these files can be written for this base, before anything is merged.

    Raises:
        ConfigError: an unknown kind, or a package is not installed.
        StudentError: llama.cpp does not know the base's architecture or its pre-tokenizer.
    """
    for kind in kinds:
        if kind not in KINDS:
            raise ConfigError(
                f"no such GGUF type {kind!r}", place="--gguf", remedy=f"give --gguf one of {', '.join(KINDS)}"
            )
    if any(kind in quantise.FILE_TYPES for kind in kinds):
        quantise.require_quantiser()
    if kinds:
        gguf_convert.check_student(config.base, renderer.tokenizer)


def write(
    kinds: Sequence[str],
    config: TrainConfig,
    renderer: Renderer,
    folder: Path,
    lineages: Sequence[Lineage],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Write a GGUF file of each kind, and one of the adapter, into a merged folder.

    Args:
        folder: holds the merged weights, tokenizer, template and model card.

    Returns:
        What each file holds (see `read_back`), the adapter's last; and notes for the operator.

    Raises:
        StudentError: the converter or the quantiser fails, or a file does not hold what was to be written.
        OSError: a file can't be written.
    """
    name = config.name.replace("/", "-")
    facts = GgufFacts(
        name=config.name,
        entries=origin_entries(config, lineages),
        stop_id=renderer.chat_shape.stop_id,
        tokenizer=renderer.tokenizer,
    )
    files, notes = [], []
    for kind in dict.fromkeys(kinds):
        file = folder / f"{name}-{kind}.gguf"
        if kind in CONVERTED:
            gguf_convert.convert(folder, file, kind, facts)
        else:
            _write_quantised(folder, file, kind, facts, threads=model.thread_count(config.train))
        files.append({"kind": kind, **read_back(file, folder, renderer.chat_shape.stop_id)})
        notes += _type_notes(kind, files[-1]["tensors"])
    if config.student.quantise != "none":
        return files, [*notes, "no GGUF of the adapter: it belongs to a base in 4 bits (NF4)"]
    if config.is_full:
        return files, notes
    file = folder / f"{name}-adapter.gguf"
    try:
        adapter = config.out_path / "adapter"
        gguf_convert.convert_adapter(
            config.base, adapter, file, GgufFacts(f"{config.name} adapter", facts.entries)
        )
        files.append({"kind": "adapter", **read_back(file)})
    except StudentError as error:
        file.unlink(missing_ok=True)
        notes.append(f"no GGUF of the adapter: {error.message}")
    return files, notes


def origin_entries(config: TrainConfig, lineages: Iterable[Lineage]) -> dict[str, str | list[str]]:
    """Return the key-value pairs that say where a student comes from and what its terms demand.

    The licence and the base stand under `general.*` too, which the converter takes from the model card.
    """
    known = list(lineages)
    return {
        "distillation.base": base_name(config.base),
        "distillation.base_sha256": weights.base_sha256(config.base),
        "distillation.teachers": _unique(each.teacher_id for each in known),
        "distillation.terms": _unique(each.terms_id for each in known),
        "distillation.duties": _unique(duty for each in known for duty in each.duties),
    }


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value))


def _write_quantised(folder: Path, file: Path, kind: str, facts: GgufFacts, *, threads: int) -> None:
    """Quantise from a file in the precision of the merged weights, which is removed afterwards."""
    stored = str(weights.read_json(folder / "config.json").get("dtype", ""))
    whole = file.with_suffix(".tmp")
    try:
        source = {"bfloat16": "bf16", "float16": "f16"}.get(stored, "f32")
        gguf_convert.convert(folder, whole, source, facts)
        quantise.quantise(whole, file, kind, threads)
    finally:
        whole.unlink(missing_ok=True)


def read_back(file: Path, folder: Path | None = None, stop_id: int | None = None) -> dict[str, Any]:
    """Return what a GGUF file holds: its name, bytes, parameters, bits per weight, and tensors by type.

    Args:
        folder: of the merged student, whose template must be in the file; None for an adapter.
        stop_id: token at which answers end.

    Raises:
        StudentError: the file does not hold what was to be written.
    """
    reader = gguf_convert.load_converter().gguf.GGUFReader(file)
    types = Counter(tensor.tensor_type.name for tensor in reader.tensors)
    parameters = sum(int(tensor.n_elements) for tensor in reader.tensors)
    size = sum(int(tensor.n_bytes) for tensor in reader.tensors)
    faults = [
        f"{tensor.name} is not finite as {tensor.tensor_type.name}"
        for tensor in reader.tensors
        if tensor.tensor_type.name in ("F16", "F32") and not np.isfinite(tensor.data).all()
    ]
    if not parameters:
        faults.append("it holds no weights")
    if folder is not None:
        template = (folder / "chat_template.jinja").read_bytes().decode()
        if _content(reader, "tokenizer.chat_template") != template:
            faults.append("its chat template is another one")
        if stop_id not in [_content(reader, key) for key in _ENDS]:
            faults.append(f"it does not end answers at token {stop_id}")
        tokens = _content(reader, "tokenizer.ggml.tokens")
        if len(tokens or ()) != (size_of := weights.vocabulary_size(folder)):
            faults.append(f"it has {len(tokens or ()):,} tokens, not {size_of:,}")
    if faults:
        raise StudentError(
            f"the GGUF file is not what was to be written: {faults[0]}",
            place=str(file),
            remedy="serve the merged folder instead; an update of the packages of the extra `gguf` may "
            "write it right",
        )
    return {
        "file": file.name,
        "bytes": file.stat().st_size,
        "parameters": parameters,
        "bits_per_weight": 8 * size / parameters,
        "tensors": dict(sorted(types.items())),
    }


def _content(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _type_notes(kind: str, tensors: dict[str, int]) -> list[str]:
    """Say which tensors have another type than was asked for, since their rows do not fit its blocks."""
    wanted = {"f16": ("F16", "F32"), "q8_0": ("Q8_0", "F32")}.get(kind, ("Q4_K", "Q6_K", "F32"))
    others = {name: count for name, count in tensors.items() if name not in wanted}
    if not others:
        return []
    counts = ", ".join(f"{count:,} {name}" for name, count in others.items())
    block = 32 if kind == "q8_0" else 256
    return [f"{kind}: {counts} of {sum(tensors.values()):,} tensors: their rows are no multiple of {block}"]


def describe(files: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return a line for each GGUF file: its size, and the bits of a weight.

    Args:
        files: from export.json.
    """
    return [
        f"{file['file']}: {file['bytes'] / 2**20:,.1f} MiB, {file['bits_per_weight']:.2f} bits a weight"
        for file in files
    ]
