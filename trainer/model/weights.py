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
# Largest sizes in config.json that are believed; published models have at most a tenth of them.
_MOST = {
    "num_hidden_layers": 5_000,
    "hidden_size": 10_000_000,
    "intermediate_size": 100_000_000,
    "num_attention_heads": 100_000,
    "num_key_value_heads": 100_000,
    "vocab_size": 100_000_000,
}
_TEXTS = frozenset({"model_type", "hidden_act", "hidden_activation"})
MOST_BEAMS = 64

# Names of the number of tokens that a base was made to read.
POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_target_positions")

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
    _check_numbers(folder)
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


def _are_sizes(value: Any, most: int) -> bool:
    """Return whether a value is a whole number up to `most`, or a list of such, as Gemma-3n has by layer."""
    sizes = value if isinstance(value, list) and value else [value]
    return all(type(size) is int and 0 < size <= most for size in sizes)


def _check_numbers(folder: Path) -> None:
    """Refuse sizes that no model has, and types that transformers fails on.

    Raises:
        StudentError: names the field.
    """
    config = read_json(folder / "config.json")
    parts = [config, *(value for name, value in config.items() if name.endswith("_config"))]
    for part in parts:
        for name, value in part.items() if isinstance(part, Mapping) else ():
            most = _MOST.get(name)
            if most is not None and value is not None and not _are_sizes(value, most):
                raise StudentError(
                    f"{name} is {str(value)[:40]!r}, not a whole number from 1 to {most:,}",
                    place=str(folder / "config.json"),
                    remedy="fetch it again",
                )
            if name in _TEXTS and value is not None and not isinstance(value, str):
                raise StudentError(f"{name} is no text", place=str(folder / "config.json"))
    tokenizer = read_json(folder / "tokenizer_config.json")
    if not isinstance(tokenizer.get("tokenizer_class", ""), str | None):
        raise StudentError("tokenizer_class is no text", place=str(folder / "tokenizer_config.json"))
    generation = read_json(folder / "generation_config.json")
    penalty, beams = generation.get("repetition_penalty", 1.0), generation.get("num_beams", 1)
    is_fit = penalty is None or (isinstance(penalty, int | float) and penalty > 0)
    if not is_fit or not (beams is None or (type(beams) is int and 1 <= beams <= MOST_BEAMS)):
        raise StudentError(
            "repetition_penalty must be above 0, num_beams from 1 to 64",
            place=str(folder / "generation_config.json"),
            remedy="remove the file, or mend the value",
        )


def _check_index(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    weight_map = read_json(index).get("weight_map", {})
    if not isinstance(weight_map, Mapping):
        raise StudentError("weight_map is no object", place=str(index), remedy="fetch it again")
    for name in {str(value): value for value in weight_map.values()}.values():
        if not isinstance(name, str) or Path(name).name != name or not name.endswith(".safetensors"):
            raise StudentError(
                f"names a file outside its folder, or no safetensors file: {name!r}",
                place=str(index),
                remedy="nothing outside the base folder is read",
            )
        if not (folder / name).is_file():
            raise StudentError(f"names {name}, which is missing", place=str(index), remedy="fetch it again")


def check_trained(folder: Path, *, full: bool) -> None:
    """Refuse a folder that holds no trained student: an adapter, or with `full` a model.

    Raises:
        StudentError: what is missing or damaged.
    """
    if not full:
        check_adapter(folder)
        return
    if not (folder / "config.json").is_file():
        raise StudentError("no trained student here", place=str(folder), remedy="`trainer train` makes it")
    check_base(folder)


def check_adapter(folder: Path) -> None:
    """Refuse an adapter that is missing, pickled, damaged, or a link out of its folder.

    Raises:
        StudentError: which file, and what is wrong.
    """
    if not (folder / "adapter_config.json").is_file():
        raise StudentError("no adapter here", place=str(folder), remedy="`trainer train` makes it")
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
    except (OSError, ValueError, RecursionError) as error:
        raise StudentError(
            f"not readable as JSON: {str(error)[:200]}",
            place=str(path),
            remedy="fetch the file again",
        ) from None
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
    return next((size for size in sizes if isinstance(size, int) and size), 0)


def context_length(folder: Path) -> int:
    """Return how many tokens the base can read, from config.json; 0 if it does not say."""
    config = text_config(folder)
    lengths = (config.get(name) for name in POSITIONS)
    return next((length for length in lengths if isinstance(length, int) and length > 0), 0)


def text_config(folder: Path) -> Mapping[str, Any]:
    """Return config.json, or its part about text, which a multimodal model nests."""
    config = read_json(folder / "config.json")
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def query_channels(folder: Path) -> int:
    """Return heads * head size, the values of a query in one layer, from config.json; 0 if unknown."""
    text = text_config(folder)
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
