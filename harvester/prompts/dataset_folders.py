"""Find the Arrow files of a folder that the Hugging Face library `datasets` saved."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import orjson

from harvester.errors import PromptError

_STATE, _INFO, _SPLITS = "state.json", "dataset_info.json", "dataset_dict.json"
_SAVE_AGAIN = "save the dataset again: save_to_disk(...)"


def is_dataset(folder: Path) -> bool:
    """Return whether a folder holds a saved dataset, or several splits of one."""
    return any((folder / name).is_file() for name in (_STATE, _INFO, _SPLITS))


def files_of(folder: Path, name: str) -> list[Path]:
    """Return the Arrow files of a saved dataset, in their order.

    Args:
        name: the folder's name for errors.

    Raises:
        PromptError: a file is missing, a description can't be read, or the folder has several splits.
    """
    if (folder / _SPLITS).is_file():
        splits = _names(_loaded(folder / _SPLITS, name).get("splits"), folder / _SPLITS)
        if len(splits) != 1:
            raise (
                PromptError(
                    f"holds the splits {', '.join(splits)}",
                    place=name,
                    remedy=f'name one: "{name}/{splits[0]}"',
                )
                if splits
                else PromptError("holds no split", place=name, remedy=_SAVE_AGAIN)
            )
        folder, name = folder / splits[0], f"{name}/{splits[0]}"
    if (folder / _STATE).is_file():
        entries = _loaded(folder / _STATE, name).get("_data_files")
        listed = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries or ()]
        paths = [folder / file for file in _names(listed, folder / _STATE)]
    else:
        paths = sorted(path for path in folder.glob("*.arrow") if not path.name.startswith("cache-"))
    missing = [path.name for path in paths if not path.is_file()]
    if missing or not paths:
        raise PromptError(
            f"lacks its file {missing[0]}" if missing else "holds no .arrow file",
            place=name,
            remedy=_SAVE_AGAIN,
        )
    return paths


def _loaded(path: Path, name: str) -> dict[str, Any]:
    try:
        value = orjson.loads(path.read_bytes())
    except (OSError, orjson.JSONDecodeError) as error:
        raise PromptError(f"{path.name} can't be read: {error}", place=name, remedy=_SAVE_AGAIN) from None
    if not isinstance(value, dict):
        raise PromptError(f"{path.name} is not a JSON object", place=name, remedy=_SAVE_AGAIN)
    return value


def _names(values: Iterable[Any] | None, path: Path) -> list[str]:
    """Return names of entries in the folder itself; a path that leads elsewhere is refused."""
    names = list(values) if isinstance(values, list | tuple) else []
    for value in names:
        if not isinstance(value, str) or Path(value).name != value or value in {"", ".", ".."}:
            raise PromptError(
                f"names {value!r}, which is no name of a file in the folder",
                place=str(path),
                remedy=_SAVE_AGAIN,
            )
    return names
