"""Refuse a command whose optional packages are not installed, before it does anything, and name the extra."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Final

from harvester.errors import MissingPackage

DISTRIBUTION: Final = "blackbox-distillation"

# The packages that commands import, for each extra that a whole command or a setting needs.
PACKAGES: Final = {
    "train": ("torch", "transformers", "peft", "safetensors", "tokenizers", "numpy"),
    "batch": ("openai",),
    "ray": ("ray",),
    "hub": ("huggingface_hub",),
    "qlora": ("bitsandbytes",),
    "board": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}


def require(extra: str, wanted_by: str) -> None:
    """Check that the packages of an extra can be found; none is imported.

    Args:
        extra: a name in `PACKAGES`.
        wanted_by: the command, function or setting that needs them, for the message.

    Raises:
        MissingPackage: at least one is not installed; its remedy is the command that installs the extra.
    """
    missing = [name for name in PACKAGES[extra] if find_spec(name) is None]
    if missing:
        raise missing_package(extra, wanted_by, missing[0])


def missing_package(extra: str, wanted_by: str, package: str) -> MissingPackage:
    """Return the error that says which extra holds a package that is not installed."""
    return MissingPackage(
        f"{wanted_by} needs {package}, which is not installed",
        remedy=f"pip install '{DISTRIBUTION}[{extra}]'",
    )
