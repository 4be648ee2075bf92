"""Check the files of a base or an adapter before loading them. Nothing here runs code or loads weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from safetensors import safe_open

from trainer.errors import StudentError
from trainer.model import hash_memory

# The largest published chat templates have about 20 KB.
MAX_TEMPLATE_BYTES = 1 << 18

# Files of a tokenizer, without its chat template.
_TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "vocab.txt"),
)


def check_base(folder: Path, sha256: str = "") -> None:
    """Refuse a base that is missing, needs its own Python code, has pickled or damaged weights, or links out.

    Args:
        sha256: expected `base_sha256`; empty: any.

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
    if sha256 and (actual := base_sha256(folder)) != sha256:
        raise StudentError(
            f"the base has the SHA-256 {actual}, [student] sha256 names {sha256}",
            place=str(folder),
            remedy="fetch the revision that [student] sha256 names",
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
    """Refuse an adapter that is missing, pickled, damaged, or a link out of its folder.

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
    """Read the shape of every tensor by name, from the headers of the safetensors files.

    Raises:
        StudentError: a file is damaged; names it.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        shapes.update(_shapes(path))
    return shapes


def _shapes(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(str(path), framework="np") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except Exception as error:  # noqa: BLE001 - safetensors raises its own kinds
        message = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise StudentError(
            f"weights can't be loaded: {message}", place=str(path), remedy="fetch the file again"
        ) from None


def read_json(path: Path) -> Mapping[str, Any]:
    """Read a JSON object; {} if the file is absent or holds something else.

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
    """Return the SHA-256 of the base's configuration and weights; it ties an adapter to its base.

    The files are read once by a process, and for a large base once for all processes (`hash_memory`), as long
    as none of them has changed.
    """
    files = _identities(folder)
    if remembered := hash_memory.recall(files):
        return remembered
    return content_sha256(folder)


def content_sha256(folder: Path) -> str:
    """Return `base_sha256` as this process computed it from the content, for documents and hash trees."""
    files = _identities(folder)
    digest = _sha256_of_files(files)
    if _identities(folder) == files:
        hash_memory.remember(files, digest)
    return digest


def _identities(folder: Path) -> tuple[hash_memory.FileIdentity, ...]:
    paths = [folder / "config.json", *sorted(folder.glob("*.safetensors"))]
    return tuple(hash_memory.identity(path) for path in paths)


def tokenizer_sha256(folder: Path) -> str:
    """Return the SHA-256 of the files that decide which ids a text has; chat templates are not among them."""
    digest = hashlib.sha256()
    for name in _TOKENIZER_FILES:
        if (folder / name).is_file():
            digest.update(name.encode() + b"\0" + hashlib.sha256((folder / name).read_bytes()).digest())
    return digest.hexdigest()


@lru_cache(maxsize=16)
def _sha256_of_files(files: tuple[hash_memory.FileIdentity, ...]) -> str:
    """Hash the names and contents of files."""
    digest = hashlib.sha256()
    for path, *_ in files:
        digest.update(Path(path).name.encode())
        with Path(path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def vocabulary_size(folder: Path) -> int:
    """Return the size of the base's vocabulary, from config.json; 0 if it does not say.

    A multimodal model nests the sizes of its text part in `text_config`.
    """
    config = read_json(folder / "config.json")
    nested = config.get("text_config")
    sizes = (part.get("vocab_size") for part in (config, nested) if isinstance(part, dict))
    return int(next((size for size in sizes if size), 0))


def query_channels(folder: Path) -> int:
    """Return heads * head size, the values of a query in one layer, from config.json; 0 if unknown."""
    config = read_json(folder / "config.json")
    nested = config.get("text_config")
    text = nested if isinstance(nested, dict) else config
    heads, hidden = text.get("num_attention_heads"), text.get("hidden_size")
    size = text.get("head_dim")
    if isinstance(heads, int) and isinstance(size, int):
        return heads * size
    return hidden if isinstance(hidden, int) else 0


def read_chat_template(path: Path) -> str:
    """Read a chat template from a file.

    Raises:
        StudentError: unreadable, or larger than `MAX_TEMPLATE_BYTES`.
    """
    try:
        if path.stat().st_size > MAX_TEMPLATE_BYTES:
            raise StudentError("too large for a chat template", place=str(path))
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise StudentError(f"chat template can't be read: {error}", place=str(path)) from None
