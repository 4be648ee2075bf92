"""Black-box distillation harvester: asks a teacher, keeps every paid answer, seals them into Parquet.

The names of `__all__` are public, and so are the exceptions of `harvester.errors`; all other modules are
private and may change in any version. Nothing is imported before a name is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from harvester.export.curate import CurateCounts
    from harvester.export.drops import Drop
    from harvester.library import HarvestEvent, curate, harvest, open, plan, start
    from harvester.run.endings import Summary
    from harvester.run.planning.plan_result import Plan
    from harvester.store.samples import Samples
    from harvester.store.shards.schema import Sample
    from harvester.system.background import Running
    from harvester.system.command_line.version import __version__

# The module of each public name.
_MODULES = {
    "CurateCounts": "harvester.export.curate",
    "Drop": "harvester.export.drops",
    "HarvestEvent": "harvester.library",
    "Plan": "harvester.run.planning.plan_result",
    "Running": "harvester.system.background",
    "Sample": "harvester.store.shards.schema",
    "Samples": "harvester.store.samples",
    "Summary": "harvester.run.endings",
    "__version__": "harvester.system.command_line.version",
    "curate": "harvester.library",
    "harvest": "harvester.library",
    "open": "harvester.library",
    "plan": "harvester.library",
    "start": "harvester.library",
}

__all__ = [
    "CurateCounts",
    "Drop",
    "HarvestEvent",
    "Plan",
    "Running",
    "Sample",
    "Samples",
    "Summary",
    "__version__",
    "curate",
    "harvest",
    "open",
    "plan",
    "start",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
