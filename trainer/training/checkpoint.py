"""Adapter + optimiser + position, atomically: written aside, fsynced, manifest last, renamed.

Randomness is no part of it: order and dropout are pure functions of (seed, step). Files are safetensors and
JSON; nothing here can run code when it is read.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from harvester.system import failpoints
from trainer.errors import CheckpointError, StoreFull
from trainer.files import fsync

MANIFEST = "MANIFEST.json"
FORMAT = 1
KEEP_NEWEST = 2


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What a training needs to go on as if it had never stopped.

    Attributes:
        step: optimiser steps done.
        state: plain facts: configuration, corpus hash, counts.
        adapter: trainable parameters by name.
        moments: AdamW's moments, `<name>/exp_avg` and so on.
    """

    step: int
    state: Mapping[str, Any]
    adapter: Mapping[str, torch.Tensor]
    moments: Mapping[str, torch.Tensor]


def optimiser_moments(
    optimiser: torch.optim.Optimizer, named: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The optimiser's state by parameter name, never by number: an order may change, a name may not."""
    return {
        f"{name}/{key}": torch.as_tensor(value).detach().clone()
        for name, parameter in named.items()
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def restore(
    checkpoint: Checkpoint, optimiser: torch.optim.Optimizer, named: Mapping[str, torch.nn.Parameter]
) -> None:
    """Put weights and moments back.

    Raises:
        CheckpointError: names or shapes are not those of this student.
    """
    mine = {name: tuple(p.shape) for name, p in named.items()}
    theirs = {name: tuple(t.shape) for name, t in checkpoint.adapter.items()}
    if mine != theirs:
        odd = sorted(set(mine.items()) ^ set(theirs.items()))[0]
        raise CheckpointError(
            f"checkpoint of step {checkpoint.step} is of another student: {odd[0]} {odd[1]}"
        )
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(checkpoint.adapter[name])
    for key, value in checkpoint.moments.items():
        name, _, kind = key.rpartition("/")
        parameter = named[name]
        place = "cpu" if kind == "step" and parameter.device.type == "cpu" else parameter.device
        optimiser.state[parameter][kind] = value.to(place)


def save(folder: Path, checkpoint: Checkpoint) -> Path:
    """Write one checkpoint into `folder` and forget all but the newest `KEEP`.

    Raises:
        StoreFull: no room; earlier checkpoints are untouched.
        CheckpointError: what was written is not what is read; earlier checkpoints are kept.
    """
    final = folder / f"step-{checkpoint.step:08d}"
    aside = folder / f".{final.name}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        _check_room(folder, checkpoint)
        aside.mkdir()
        save_file(_plain(checkpoint.adapter), aside / "adapter.safetensors")
        failpoints.reach("checkpoint.adapter_written")
        save_file(_plain(checkpoint.moments), aside / "optimiser.safetensors")
        _write(aside / "state.json", {"format": FORMAT, "step": checkpoint.step, **checkpoint.state})
        files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(aside.iterdir())}
        for name in files:
            fsync(aside / name)
        failpoints.reach("checkpoint.before_manifest")
        _write(aside / MANIFEST, {"format": FORMAT, "files": files})
        fsync(aside / MANIFEST)
        fsync(aside)
        failpoints.reach("checkpoint.before_rename")
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        failpoints.reach("checkpoint.after_rename")
        fsync(folder)
        _check_read(final, checkpoint)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StoreFull(
            f"checkpoint of step {checkpoint.step} not written: {error}",
            place=str(folder),
            remedy="free some room; training resumes from the last one",
        ) from None
    for old in _finished(folder)[KEEP_NEWEST:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def _check_read(path: Path, checkpoint: Checkpoint) -> None:
    """An older checkpoint is forgotten only when the new one can be read back and is what was meant."""
    found = _read(path)
    for mine, theirs in ((checkpoint.adapter, found.adapter), (checkpoint.moments, found.moments)):
        same = mine.keys() == theirs.keys() and all(
            torch.equal(theirs[name], t.detach().cpu()) for name, t in mine.items()
        )
        if not same:
            raise CheckpointError("reads back other than it was written", place=str(path))


def _check_room(folder: Path, checkpoint: Checkpoint) -> None:
    tensors = (*checkpoint.adapter.values(), *checkpoint.moments.values())
    needed = 2 * sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"{free / 2**20:,.0f} MiB free, {needed / 2**20:,.0f} MiB wanted")


def describe_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One phrase for each setting that differs."""
    keys = sorted({*before, *now})
    return [f"{k} {before.get(k)!r} -> {now.get(k)!r}" for k in keys if before.get(k) != now.get(k)]


def newest_valid(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that verifies, and one line for each newer one that doesn't."""
    skipped: list[str] = []
    for path in _finished(folder):
        try:
            return _read(path), skipped
        except (CheckpointError, OSError, ValueError, KeyError, SafetensorError) as error:
            skipped.append(f"{path.name}: {error}")
    return None, skipped


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _finished(folder: Path) -> list[Path]:
    return sorted((p for p in folder.glob("step-*") if p.is_dir() and not p.is_symlink()), reverse=True)


def _read(path: Path) -> Checkpoint:
    manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    if (version := manifest.get("format")) != FORMAT:
        raise CheckpointError(f"format {version}, this version reads {FORMAT}", place=str(path))
    for name in ("adapter.safetensors", "optimiser.safetensors", "state.json"):
        told, file = manifest["files"][name], path / name
        if file.is_symlink() or file.stat().st_size != told["bytes"] or sha256(file) != told["sha256"]:
            raise CheckpointError(f"{name} is not what was written", place=str(path))
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    return Checkpoint(
        int(state["step"]),
        state,
        load_file(path / "adapter.safetensors"),
        load_file(path / "optimiser.safetensors"),
    )


def _plain(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: t.detach().cpu().contiguous() for name, t in tensors.items()}


def _write(path: Path, value: Mapping[str, Any]) -> None:
    # no newline at the end: every byte that is cut off breaks the JSON
    path.write_text(json.dumps(value, indent=1, sort_keys=True, default=str), encoding="utf-8")
