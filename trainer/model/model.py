"""Load a student from a local folder: tokenizer, base weights, and a LoRA adapter by PEFT."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer
from transformers.utils import logging

from trainer.config import CUDA_PACK_TOKENS, TrainConfig, TrainSection
from trainer.errors import ConfigError, StudentError
from trainer.model import adapter, four_bit, full_student, loading, rotary, self_test
from trainer.model.forward import hopper_attention
from trainer.model.forward.rows import RowLayout
from trainer.model.forward.varlen_attention import MIN_CAPABILITY
from trainer.model.loading import first_line
from trainer.model.self_test import StudentForward
from trainer.model.try_in_child import require_harmless, require_harmless_targets
from trainer.model.weights import check_adapter, check_base, read_chat_template

logging.disable_progress_bar()  # the trainer shows its own
logging.set_verbosity_error()


def load_tokenizer(folder: Path, template: Path | None = None) -> Any:
    """Load the base's tokenizer from disk, with its own chat template or the one given.

    Of several named templates, the one called "default" is used; the adapter and the merged student get only
    that one.

    Raises:
        StudentError: missing or broken files.
    """
    check_base(folder)
    require_harmless(folder, template)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001 - of its parsers, in three languages
        raise StudentError(
            f"tokenizer can't be read: {first_line(error)}",
            place=str(folder),
            remedy="fetch tokenizer.json and tokenizer_config.json again",
        ) from None
    if template is not None:
        tokenizer.chat_template = read_chat_template(template)
    elif isinstance(tokenizer.chat_template, dict):  # several templates by name
        named = tokenizer.chat_template
        if not isinstance(named.get("default"), str):
            raise StudentError(
                f"none of the tokenizer's chat templates is called default: {', '.join(sorted(named))}",
                place=str(folder),
                remedy="set [student] template to a file with the one to use",
            )
        tokenizer.chat_template = named["default"]
    return tokenizer


def select_device(train: TrainSection) -> torch.device:
    """Choose the device to run on. "fastest" is CUDA if present, else the CPU.

    Raises:
        ConfigError: CUDA was asked for and is absent.
    """
    if train.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "no CUDA device on this machine",
            place="train.device",
            remedy='set [train] device = "cpu" in train.toml, or leave it out',
        )
    return torch.device("cuda" if train.device != "cpu" and torch.cuda.is_available() else "cpu")


def fit_to_device(config: TrainConfig, processes: int = 1) -> TrainConfig:
    """Return the configuration with the default of `[train] pack_tokens` for its device.

    On the CPU nothing changes. On CUDA the packs are large, for each takes thousands of kernel launches; but
    a step keeps at least one pack for each process.

    Raises:
        ConfigError: the device that `[train] device` names is absent.
    """
    train = config.train
    if train.pack_tokens is not None or select_device(train).type == "cpu":
        return config
    share = min(CUDA_PACK_TOKENS, train.batch_tokens // processes)
    pack_tokens = min(train.batch_tokens, max(train.max_length, share))
    return config.model_copy(update={"train": train.model_copy(update={"pack_tokens": pack_tokens})})


def thread_count(train: TrainSection) -> int:
    """Return `[train] threads`, else one for each core that this process may use."""
    return train.threads or len(os.sched_getaffinity(0))


def set_threads(train: TrainSection, processes: int = 1) -> None:
    """Set torch's CPU threads: `[train] threads`, else this process's share of the cores.

    Args:
        processes: processes of this training on this machine, which divide the cores among them.
    """
    torch.set_num_threads(train.threads or max(1, thread_count(train) // processes))


@contextmanager
def arithmetic(train: TrainSection, device: torch.device) -> Iterator[None]:
    """Set how CUDA computes during the block; the CPU's arithmetic has no such choice.

    fp32 products (dropout, DoRA, experts: PEFT's own forward) take TF32: its 10 bits are more than the 7 of
    the bf16 values that they read. With `[train] deterministic` only kernels that add in a fixed order are
    used, in attention's backward above all; cuBLAS then needs a workspace that the environment sets
    (https://docs.pytorch.org/docs/stable/notes/randomness.html). With `[train] method = "full"` the weights
    are fp32, and products run in bf16 by autocast.
    """
    if device.type != "cuda":
        yield
        return
    precision = torch.get_float32_matmul_precision()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    in_bf16 = train.method == "full" and torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
    torch.set_float32_matmul_precision("high")
    if train.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        hopper_attention.deactivate()
    try:
        with torch.autocast("cuda", torch.bfloat16) if in_bf16 else nullcontext():
            yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.use_deterministic_algorithms(was_deterministic)


def base_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype of the frozen base: bf16 on CUDA; fp32 on the CPU, where bf16 is slow and inexact.

    A GPU older than compute capability 8.0 only emulates bf16; there the base is in fp32.
    """
    if device.type != "cuda":
        return torch.float32
    has_bf16 = torch.cuda.get_device_capability(device) >= MIN_CAPABILITY
    return torch.bfloat16 if has_bf16 else torch.float32


def register_attention(device: torch.device) -> str:
    """Register the packed attention for a device with transformers; return its name."""
    return self_test.packed_attention(device)


# Peak of dense bf16 arithmetic in FLOP/s by device name, from the vendor's data sheets.
PEAK_BF16_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Return the device's peak of dense bf16 arithmetic in FLOP/s, None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if part in name), None)


def load_base(
    folder: Path,
    device: torch.device,
    *,
    weights_on: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Load the base in evaluation mode.

    Args:
        weights_on: device that holds the weights; None: `device`.
        dtype: of the weights; None: the one for `device`.

    Raises:
        StudentError: files that transformers can't make a causal language model of, or tensors that are
            missing, unexpected or of another shape.
    """
    model = loading.load_model(folder, dtype=dtype or base_dtype(device))
    rotary.forget_lengths(model)
    return model.to(weights_on or device).eval()


def load_base_of(
    config: TrainConfig,
    device: torch.device,
    *,
    weights_on: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> Any:
    """Load the base of a configuration in evaluation mode, in 4 bits if `[student] quantise` says so.

    A base in 4 bits passes through the host's memory in its own dtype, once.

    Args:
        weights_on, dtype: as of `load_base`; of what is not in 4 bits.

    Raises:
        StudentError: as `load_base`, or the base can't be kept in 4 bits.
        ConfigError: the package that 4 bits need is not installed.
    """
    if config.student.quantise == "none":
        return load_base(config.base, device, weights_on=weights_on, dtype=dtype)
    four_bit.require_installed()
    base = load_base(config.base, device, weights_on=torch.device("cpu"), dtype=dtype)
    four_bit.quantise_base(base, device)
    return base.to(device)


def load_new_student(config: TrainConfig, device: torch.device, *, sharded: bool = False) -> Any:
    """Load the base with a new adapter, in training mode: fp32 adapter, everything else frozen.

    With `[train] method = "full"` it is the base alone, in fp32, with nothing frozen.

    A is random by `[train] seed` and B is zero, so the student starts with the base's outputs.

    Args:
        sharded: keep the weights in host memory, for `fsdp.shard_base` to split.

    Raises:
        StudentError: no linear layer matches `[lora] target`.
    """
    check_base(config.base, config.student.sha256)
    dtype = torch.float32 if config.is_full else None
    base = load_base_of(config, device, weights_on=torch.device("cpu") if sharded else None, dtype=dtype)
    with suppress(ValueError):  # the self-test chooses another layout for a student that can't take it
        self_test.set_attention(base, RowLayout(attention=register_attention(device)))
    torch.manual_seed(config.train.seed)
    return add_adapter(base, config).train()


def add_adapter(base: Any, config: TrainConfig) -> Any:
    """Put the adapter of `[lora]` on a base, or let all of it be trained; see `adapter.add_adapter`."""
    if config.is_full:
        return full_student.make_trainable(base)
    student = adapter.add_adapter(base, config.lora, trainable_token_ids(config))
    four_bit.refuse_merges(student)
    return student


def trainable_token_ids(config: TrainConfig) -> list[int]:
    """Return the ids of `[lora] trainable_tokens`.

    Raises:
        ConfigError: the tokenizer has no such token.
    """
    if not config.lora.trainable_tokens:
        return []
    vocabulary = load_tokenizer(config.base, config.template).get_vocab()
    unknown = [token for token in config.lora.trainable_tokens if token not in vocabulary]
    if unknown:
        raise ConfigError(
            f"the tokenizer has no token {unknown[0]!r}",
            place="lora.trainable_tokens",
            remedy="`trainer doctor` names the tokens that were never trained",
        )
    return sorted({vocabulary[token] for token in config.lora.trainable_tokens})


def check_without_weights(config: TrainConfig) -> list[str]:
    """Check everything about the student that needs no weights: tensors, adapter and rows.

    Names and shapes of the base's tensors are compared with its configuration, the adapter is put on the
    shapes, and the self-test runs on a tiny random copy of the architecture. If no such copy can be built
    and run, the student itself is loaded and tested, as for a training.

    Returns:
        Notes for the operator: how rows are computed, what the adapter leaves out.

    Raises:
        StudentError, ConfigError: the student can't be trained as configured; says why.
    """
    base = loading.load_shapes(config.base)
    unused = loading.unused_tensors(base, config.base)
    notes = []
    if unused:
        notes.append(f"the student has no place for {len(unused):,} of the base's tensors, e.g. {unused[0]}")
    with torch.device("meta"):
        student = add_adapter(base, config)
    notes += [] if config.is_full else adapter.describe_left_out(student)
    forward = self_test.check_architecture(config.base)
    if forward is None:
        student = load_new_student(config, select_device(config.train))
        forward = self_test.check_student(student, config.base)
        notes.append(f"{self_test.NO_COPY}, so the student itself was loaded for the test")
    require_compilable(config, forward)
    if config.student.quantise != "none":
        four_bit.require_installed()
    if forward.note:
        notes.append(forward.note)
    return notes


def require_compilable(config: TrainConfig, forward: StudentForward) -> None:
    """Do nothing unless `[train] compile` is set for a student whose rows are not packed.

    Its layers were never seen to compile: torch 2.13's compiler takes minutes for LFM2's convolutions and
    then fails, and rows of many shapes would each be compiled anew.

    Raises:
        ConfigError: it is set, there or for a base in 4 bits.
    """
    if config.train.compile and config.student.quantise != "none":
        raise ConfigError(
            "a base in 4 bits can't be compiled",
            place="train.compile",
            remedy="set [train] compile = false in train.toml",
        )
    if config.train.compile and not forward.layout.packed:
        raise ConfigError(
            "a student whose rows are not packed can't be compiled",
            place="train.compile",
            remedy="set [train] compile = false in train.toml",
        )


def load_trained_student(
    config: TrainConfig,
    folder: Path,
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    base: Any = None,
) -> Any:
    """Load the base with a trained adapter that can be switched off, in evaluation mode.

    Args:
        dtype: of the base's weights; None: the one for `device`. The adapter is fp32.
        base: the base, if it has been loaded already.

    Returns:
        A PEFT model, or a `FullyTrained` one. Under `disable_adapter()` it computes what the base alone
        computes.

    Raises:
        StudentError: no adapter there, or one that doesn't fit the base.
    """
    if config.is_full:
        trained = load_base(folder, device, dtype=dtype)
        before = load_base(config.base, device, dtype=dtype) if base is None else base
        return full_student.FullyTrained(trained, before).eval()
    check_adapter(folder)
    require_harmless_targets(folder)
    base = load_base_of(config, device, dtype=dtype) if base is None else base
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            student = PeftModel.from_pretrained(base, str(folder), local_files_only=True)
    except Exception as error:  # noqa: BLE001 - see load_base
        raise StudentError(
            f"the adapter can't be loaded: {first_line(error)}",
            place=str(folder),
            remedy="check that adapter_config.json and adapter_model.safetensors are of one training, and "
            "that this PEFT supports the method",
        ) from None
    loading.check_adapter_tensors(student, folder)
    four_bit.refuse_merges(student)
    return student.eval()


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Return the trainable parameters by name, in the model's order."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
