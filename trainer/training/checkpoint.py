"""Save and restore adapter, optimiser state and step number.

A checkpoint is written to a temporary folder, fsynced, given its manifest last, and renamed. Random state is
not part of it: order and dropout are pure functions of (seed, step). Files are safetensors and JSON, so
reading one never runs code.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from harvester.system import disk_refusal, failpoints
from harvester.system.files import fsync, sha256_of
from trainer.errors import CheckpointError

MANIFEST = "MANIFEST.json"
FORMAT = 1

# Checkpoints that are kept; older ones are deleted.
KEEP_NEWEST = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The state from which a training continues with the same bits as if it had not stopped.

    Attributes:
        step: optimiser steps done.
        state: JSON values: settings, corpus hash, counts.
        adapter: trainable parameters by name, fp32.
        moments: AdamW's state by `<parameter>/<key>`: `exp_avg`, `exp_avg_sq`, `step`.
    """

    step: int
    state: Mapping[str, Any]
    adapter: Mapping[str, torch.Tensor]
    moments: Mapping[str, torch.Tensor]


def optimiser_moments(
    optimiser: torch.optim.Optimizer, named: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Copy the optimiser's state to host memory, keyed by parameter name: positions may change.

    Args:
        named: trainable parameters by name.
    """
    return {
        f"{name}/{key}": torch.as_tensor(value).detach().to("cpu", copy=True)
        for name, parameter in named.items()
        for key, value in optimiser.state.get(parameter, {}).items()
    }


# What reading a checkpoint that somebody changed may raise.
_UNREADABLE = (
    CheckpointError,
    OSError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    SafetensorError,
)


def restore(
    checkpoint: Checkpoint, optimiser: torch.optim.Optimizer, named: Mapping[str, torch.nn.Parameter]
) -> None:
    """Copy a checkpoint's weights and moments into the student and its optimiser.

    Raises:
        CheckpointError: names or shapes are not those of this student.
    """
    expected = {name: tuple(p.shape) for name, p in named.items()}
    saved = {name: tuple(t.shape) for name, t in checkpoint.adapter.items()}
    if expected != saved:
        name, shape = sorted(set(expected.items()) ^ set(saved.items()))[0]
        raise CheckpointError(
            f"checkpoint of step {checkpoint.step} is of another student: {name} {shape}",
            remedy="name another [out] path, or put [student] and [lora] of train.toml back as they were",
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(checkpoint.adapter[name])
    for key, value in checkpoint.moments.items():
        name, _, state_key = key.rpartition("/")
        parameter = named[name]
        device = "cpu" if state_key == "step" and parameter.device.type == "cpu" else parameter.device
        optimiser.state[parameter][state_key] = value.to(device)


def save(folder: Path, checkpoint: Checkpoint, *, keep_step: int = 0) -> Path:
    """Write one checkpoint into `folder`, read it back, and delete all but the newest `KEEP_NEWEST`.

    Args:
        keep_step: step of a checkpoint that is kept as well, however old.

    Raises:
        StoreFull, StoreError: the disk is full or refuses; earlier checkpoints are untouched.
        CheckpointError: what is read back is not what was written; earlier checkpoints are kept.
    """
    final = folder / _name_of(checkpoint.step)
    temporary = folder / f".{final.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        _check_free_space(folder, checkpoint)
        temporary.mkdir()
        save_file(_on_cpu(checkpoint.adapter), temporary / "adapter.safetensors")
        failpoints.reach("checkpoint.adapter_written")
        save_file(_on_cpu(checkpoint.moments), temporary / "optimiser.safetensors")
        _write_json(temporary / "state.json", {"format": FORMAT, "step": checkpoint.step, **checkpoint.state})
        files = {
            p.name: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in sorted(temporary.iterdir())
        }
        for name in files:
            fsync(temporary / name)
        failpoints.reach("checkpoint.before_manifest")
        _write_json(temporary / MANIFEST, {"format": FORMAT, "files": files})
        fsync(temporary / MANIFEST)
        fsync(temporary)
        failpoints.reach("checkpoint.before_rename")
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        failpoints.reach("checkpoint.after_rename")
        fsync(folder)
        _check_read(final, checkpoint)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise disk_refusal.refused(
            error,
            f"checkpoint of step {checkpoint.step} not written",
            folder,
            "",
            afterwards="training resumes from the last checkpoint",
        ) from None
    for old in _complete_checkpoints(folder)[KEEP_NEWEST:]:
        if old.name != _name_of(keep_step):
            shutil.rmtree(old, ignore_errors=True)
    return final


def _check_read(path: Path, checkpoint: Checkpoint) -> None:
    """Compare a written checkpoint with the one in memory, before older ones are deleted."""
    stored = _read(path)
    for expected, actual in ((checkpoint.adapter, stored.adapter), (checkpoint.moments, stored.moments)):
        is_equal = expected.keys() == actual.keys() and all(
            torch.equal(actual[name], tensor.detach().cpu()) for name, tensor in expected.items()
        )
        if not is_equal:
            raise CheckpointError(
                "reads back other than it was written",
                place=str(path),
                remedy="check the disk, or name an [out] path on another; the same command resumes from the "
                "checkpoint before",
            )


def _check_free_space(folder: Path, checkpoint: Checkpoint) -> None:
    tensors = (*checkpoint.adapter.values(), *checkpoint.moments.values())
    # Twice the tensors: metadata, and the space that other writers may take meanwhile.
    needed = 2 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{free / 2**20:,.0f} MiB free, {needed / 2**20:,.0f} MiB needed")


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return one phrase for each setting that differs, e.g. "lora.rank 4 -> 8"."""
    return [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted({*before, *now})
        if before.get(key) != now.get(key)
    ]


def newest_valid(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """Read the newest checkpoint whose files match its manifest.

    Returns:
        The checkpoint, or None; and one line for each newer one that is damaged.
    """
    skipped: list[str] = []
    for path in _complete_checkpoints(folder):
        try:
            return _read(path), skipped
        except _UNREADABLE as error:
            skipped.append(f"{path.name}: {error}")
    return None, skipped


def newest_settings(folder: Path) -> Mapping[str, Any]:
    """Return the settings of the newest checkpoint whose state can be read; empty without one."""
    for path in _complete_checkpoints(folder):
        with suppress(*_UNREADABLE):
            state = json.loads((path / "state.json").read_text(encoding="utf-8"))
            return dict(state["settings"])
    return {}


def adapter_of_step(folder: Path, step: int) -> Mapping[str, torch.Tensor] | None:
    """Return the adapter's parameters in the checkpoint of a step; None if it is absent or damaged."""
    try:
        return _read(folder / _name_of(step)).adapter
    except _UNREADABLE:
        return None


def _name_of(step: int) -> str:
    return f"step-{step:08d}"


def _complete_checkpoints(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if p.is_dir() and not p.is_symlink()), reverse=True)


def _read(path: Path) -> Checkpoint:
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if (version := manifest.get("format")) != FORMAT:
        raise CheckpointError(f"format {version}, this version reads {FORMAT}", place=str(path))
    for name in ("adapter.safetensors", "optimiser.safetensors", "state.json"):
        entry, file = manifest["files"][name], path / name
        is_same_size = not file.is_symlink() and file.stat().st_size == entry["bytes"]
        if not is_same_size or sha256_of(file) != entry["sha256"]:
            raise CheckpointError(f"{name} is not what was written", place=str(path))
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(
        int(state["step"]),
        state,
        load_file(path / "adapter.safetensors"),
        load_file(path / "optimiser.safetensors"),
    )


def _on_cpu(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    # Without a newline at the end every cut-off byte breaks the JSON, so the cut is detected.
    path.write_text(json.dumps(value, indent=1, sort_keys=True, default=str), encoding="utf-8")
