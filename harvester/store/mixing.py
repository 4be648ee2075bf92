"""Notice rows that were asked under different settings, so that nobody mixes them unknowingly."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from harvester.store.shards.schema import Sample
from harvester.store.where import epochs_of_runs, system_of
from harvester.system.counted import counted

# Columns that `Mixing.add` looks at.
COLUMNS = ("request_model", "messages", "request_json", "run_id")

# Fields of a request that do not change what kind of answer comes, or that a prompt sets for itself.
_SAME_KIND = frozenset(
    {
        *(
            "model",
            "messages",
            "max_tokens",
            "max_completion_tokens",
            "stream",
            "stream_options",
            "seed",
            "n",
        ),
        *("logprobs", "top_logprobs", "tools", "tool_choice", "parallel_tool_calls", "response_format"),
    }
)
# Different values that are counted and shown; further ones are counted together.
_COUNTED, _SHOWN = 100, 3
_SHOWN_CHARACTERS = 60
_OTHERS = "others"


class Mixing:
    """Counts the settings of rows: model, system prompt, sampling and epoch.

    Args:
        store: names the epochs of its runs, if it has a journal.
    """

    def __init__(self, store: Path) -> None:
        self._epochs = epochs_of_runs(store)
        self._counts: dict[str, Counter[str]] = {
            name: Counter() for name in ("model", "system", "sampling", "epoch")
        }

    def add(self, sample: Sample) -> None:
        """Count a row; it has at least `COLUMNS`."""
        values = {
            "model": sample.request_model,
            "system": system_of(sample) or "none",
            "sampling": _sampling(sample.request_json),
            "epoch": str(self._epochs.get(sample.run_id, 0)),
        }
        for name, value in values.items():
            counts = self._counts[name]
            counts[value if value in counts or len(counts) < _COUNTED else _OTHERS] += 1

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """How many rows have each value of each setting."""
        return {name: dict(counts) for name, counts in self._counts.items()}

    def add_counts(self, counts: Mapping[str, Mapping[str, int]]) -> None:
        """Count the rows of another `Mixing`, by its `counts`."""
        for name, by_value in counts.items():
            of_name = self._counts[name]
            for value, rows in by_value.items():
                of_name[value if value in of_name or len(of_name) < _COUNTED else _OTHERS] += rows

    def notes(self) -> tuple[str, ...]:
        """Return a line for each setting in which rows differ."""
        return tuple(_note(name, counts) for name, counts in self._counts.items() if len(counts) > 1)


def _sampling(request_json: str) -> str:
    """Return the sampling settings of a request, as text; "defaults" for none."""
    try:
        request: Any = json.loads(request_json)
    except ValueError:
        return "unknown"
    if not isinstance(request, Mapping):
        return "unknown"
    settings = {name: request[name] for name in sorted(request) if name not in _SAME_KIND}
    return ", ".join(f"{name} {json.dumps(value)}" for name, value in settings.items()) or "defaults"


def _note(name: str, counts: Counter[str]) -> str:
    what = {
        "model": "models",
        "system": "system prompts",
        "sampling": "sampling settings",
        "epoch": "epochs",
    }[name]
    shown = "; ".join(
        f"{_excerpt(value)} ({counted(count, 'row')})" for value, count in counts.most_common(_SHOWN)
    )
    more = " ..." if len(counts) > _SHOWN else ""
    number = f"more than {_COUNTED}" if _OTHERS in counts else str(len(counts))
    return f"mixes rows of {number} {what}: {shown}{more}; `where` chooses among them"


def _excerpt(value: str) -> str:
    flat = " ".join(value.split())
    return flat if len(flat) <= _SHOWN_CHARACTERS else f"{flat[:_SHOWN_CHARACTERS]}..."
