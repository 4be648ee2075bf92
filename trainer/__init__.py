"""Fine-tune a local student on a harvested corpus with LoRA, evaluate it, and publish it with its papers.

The names of `__all__` are public, and so are the exceptions of `trainer.errors`; all other modules are
private and may change in any version. Nothing is imported before a name is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harvester.system.background import Running
    from trainer.actions import Exported
    from trainer.library import evaluate, export, start, train
    from trainer.training.logbook import Evaluation, Sampled, StepLog, TrainingStarted
    from trainer.training.train import Trained

# The module of each public name.
_MODULES = {
    "Evaluation": "trainer.training.logbook",
    "Exported": "trainer.actions",
    "Running": "harvester.system.background",
    "Sampled": "trainer.training.logbook",
    "StepLog": "trainer.training.logbook",
    "Trained": "trainer.training.train",
    "TrainingStarted": "trainer.training.logbook",
    "evaluate": "trainer.library",
    "export": "trainer.library",
    "start": "trainer.library",
    "train": "trainer.library",
}

__all__ = [
    "Evaluation",
    "Exported",
    "Running",
    "Sampled",
    "StepLog",
    "Trained",
    "TrainingStarted",
    "evaluate",
    "export",
    "start",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
