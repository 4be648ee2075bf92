"""Load provider presets, and fill a `[teacher]` table of harvest.toml from one.

A preset is a file `data/teachers/NAME.toml`. It holds keys of `[teacher]`: the address, an example model and
what is known about it. A provider is data, never code.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

# Keys that are right for the preset's own address only: a key must not be sent to another host.
_OF_THE_ADDRESS = ("api_key_env", "idempotency_header", "max_n", "batch")
# Keys that are right for the preset's own model at its own address only.
_OF_THE_MODEL = ("terms", "price")


@dataclass(frozen=True, slots=True)
class AppliedPreset:
    """A preset that was applied to a `[teacher]` table.

    Attributes:
        name: "" for none.
        keys: what the preset set, by dotted key, as in `base_url` and `limits.max_concurrency`.
    """

    name: str = ""
    keys: tuple[str, ...] = ()


@cache
def load_presets() -> Mapping[str, Mapping[str, Any]]:
    """Return every shipped preset by name, as its TOML file stands."""
    paths = sorted(files("harvester_data").joinpath("teachers").iterdir(), key=lambda path: path.name)
    return {
        path.name.removesuffix(".toml"): tomllib.loads(path.read_text(encoding="utf-8"))
        for path in paths
        if path.name.endswith(".toml")
    }


def require_known(name: str) -> None:
    """Do nothing when there is a preset of that name.

    Raises:
        ValueError: there is none; names the nearest and all known ones.
    """
    known = load_presets()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        suggestion = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown preset {name!r}; {suggestion}known presets: {', '.join(known)}")


def fill(table: Mapping[str, Any]) -> Mapping[str, Any]:
    """Add the values of the preset that `[teacher] preset` names and the table does not set itself.

    Terms and price are added only for the preset's own model and address, names of keys and headers only for
    its own address. `preset` becomes an `AppliedPreset`. A table without a preset, or with an unknown one, is
    returned as it is.
    """
    name = str(table.get("preset", ""))
    preset = load_presets().get(name)
    if preset is None:
        return table
    own_address = _is_own(table, preset, "base_url")
    own_model = own_address and _is_own(table, preset, "model")
    names = ("base_url", "model", *(_OF_THE_ADDRESS * own_address), *(_OF_THE_MODEL * own_model))
    added = {name: preset[name] for name in names if name in preset and name not in table}
    keys = [key for name, value in added.items() for key in _dotted(name, value)]
    limits = table.get("limits", {})
    if isinstance(limits, Mapping):
        added_limits = {name: value for name, value in preset.get("limits", {}).items() if name not in limits}
        if added_limits:
            added["limits"] = {**limits, **added_limits}
            keys += _dotted("limits", added_limits)
    return {**table, **added, "preset": AppliedPreset(name, tuple(keys))}


def names_with_batches() -> list[str]:
    """Return the presets whose provider has a Batch API that is supported."""
    return [name for name, preset in load_presets().items() if "batch" in preset]


def lacks_batches(preset: str, base_url: str) -> str:
    """Return the name of the preset whose provider is asked and has no supported Batch API; "" for none.

    Args:
        preset: that `[teacher]` names, "" for none; then the address tells.
    """
    known = load_presets()
    names = [preset] if preset else [name for name, each in known.items() if each["base_url"] == base_url]
    if not names or any("batch" in known[name] for name in names):
        return ""
    return names[0]


def _is_own(table: Mapping[str, Any], preset: Mapping[str, Any], name: str) -> bool:
    return name not in table or str(table[name]).rstrip("/") == preset[name]


def _dotted(name: str, value: Any) -> list[str]:
    return [f"{name}.{part}" for part in value] if isinstance(value, Mapping) else [name]
