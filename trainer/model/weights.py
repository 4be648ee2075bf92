"""The base folder's files, looked at before anything is loaded: nothing here runs code or moves a weight."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open

from trainer.errors import StudentError

MAX_TEMPLATE_BYTES = 1 << 18  # the largest published chat templates have some 20 KB


def check_base(folder: Path, sha256: str = "") -> None:
    """Refuse a base that is missing, brings code, holds pickled or torn weights, or points outside.

    Args:
        sha256: `base_sha256` it must have; empty asks for none.

    Raises:
        StudentError: which file, what is wrong and what to do.
    """
    if not (folder / "config.json").is_file():
        raise StudentError(
            "no student here: config.json is missing",
            place=str(folder),
            remedy="set [student] base to a local folder in transformers' format; nothing is downloaded",
        )
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        if "auto_map" in read_json(folder / name):
            raise StudentError(
                "wants to run Python code of its own (auto_map)",
                place=str(folder / name),
                remedy="use a student whose architecture is part of transformers",
            )
    _check_index(folder)
    if not any(folder.glob("*.safetensors")):
        raise StudentError(
            "no *.safetensors weights",
            place=str(folder),
            remedy="convert the weights; pickled files are never loaded",
        )
    tensor_shapes(folder)
    if sha256 and base_sha256(folder) != sha256:
        raise StudentError(
            "this base is not the one [student] sha256 names", place=str(folder), remedy="fetch that revision"
        )


def _check_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    for name in dict.fromkeys(read_json(index).get("weight_map", {}).values()):
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise StudentError(
                f"names a file outside its folder, or no safetensors file: {name!r}",
                place=str(index),
                remedy="nothing outside the base folder is read",
            )
        if not (folder / name).is_file():
            raise StudentError(f"names {name}, which is missing", place=str(index), remedy="fetch it again")


def check_adapter(folder: Path) -> None:
    """Refuse an adapter that is missing, pickled, torn, or a link out of its folder.

    Raises:
        StudentError: which file, and what is wrong.
    """
    if not (folder / "adapter_config.json").is_file():
        raise StudentError("no adapter here", place=str(folder), remedy="`trainer train train.toml` makes it")
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise StudentError(
            "no adapter_model.safetensors", place=str(folder), remedy="pickled adapters are never loaded"
        )
    if file.resolve().parent != folder.resolve():
        raise StudentError("is a link to somewhere else", place=str(file), remedy="train or fetch it again")
    _shapes(file)


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor, from the headers alone.

    Raises:
        StudentError: a file that is not what safetensors wrote; names it.
    """
    found: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found.update(_shapes(path))
    return found


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(str(path), framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # noqa: BLE001 - safetensors raises its own kinds
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise StudentError(
            f"weights can't be loaded: {said}", place=str(path), remedy="fetch the file again"
        ) from None


def read_json(path: Path) -> Mapping[str, Any]:
    """A JSON object, {} where the file is absent.

    Raises:
        StudentError: not JSON.
    """
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise StudentError(f"not readable as JSON: {error}", place=str(path)) from None
    return loaded if isinstance(loaded, dict) else {}


def base_sha256(folder: Path) -> str:
    """Hash of the base's configuration and weights; ties an adapter to the base it was made for."""
    digest = hashlib.sha256()
    for path in [folder / "config.json", *sorted(folder.glob("*.safetensors"))]:
        digest.update(path.name.encode())
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def vocabulary_size(folder: Path) -> int:
    """Rows of the base's embedding, as its configuration tells."""
    return int(read_json(folder / "config.json").get("vocab_size", 0))


def read_chat_template(path: Path) -> str:
    """A chat template from a file of its own.

    Raises:
        StudentError: unreadable, or far larger than any template is.
    """
    try:
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise StudentError("too large for a chat template", place=str(path))
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StudentError(f"chat template can't be read: {error}", place=str(path)) from None
