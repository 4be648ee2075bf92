"""From an adapter back to every row it learned from: a hash tree, written beside it and checked later.

A leaf is SHA-256(0x00 || key || SHA-256(completion)), a node SHA-256(0x01 || left || right), as in RFC 6962
section 2.1; leaves are ordered by key. The root stands for the exact set of rows: one flipped byte in a row,
a missing or an added row gives another root.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harvester.corpus import Corpus
from harvester.schema import Sample
from trainer.errors import ConfigError, FindingsError

TREE = "hash_tree.json"
ROWS = "hash_tree.rows.jsonl"
_IDENTITY = ("key", "prompt_id", "sample_index", "completion")
_COLUMNS = (
    "key",
    "prompt_id",
    "sample_index",
    "completion",
    "request_model",
    "endpoint",
    "terms_id",
    "run_id",
)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One learned row: its cache key and the SHA-256 of its completion, both 64 hex digits."""

    key: str
    completion_sha256: str
    prompt_id: str
    sample_index: int

    @property
    def digest(self) -> bytes:
        """The leaf's hash, 32 bytes."""
        return hashlib.sha256(
            b"\x00" + bytes.fromhex(self.key) + bytes.fromhex(self.completion_sha256)
        ).digest()


def leaf_of(sample: Sample) -> Leaf:
    """The leaf of a row that was learned."""
    completion = (sample.completion or "").encode("utf-8", "surrogatepass")
    return Leaf(sample.key, hashlib.sha256(completion).hexdigest(), sample.prompt_id, sample.sample_index)


def root_of(digests: Sequence[bytes]) -> bytes:
    """The tree's root over leaf hashes in order (RFC 6962: the left subtree is the largest power of two).

    The root of no leaf is the hash of nothing.
    """
    if not digests:
        return hashlib.sha256(b"").digest()
    if len(digests) == 1:
        return digests[0]
    split = 1 << (len(digests) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + root_of(digests[:split]) + root_of(digests[split:])).digest()


def write(adapter: Path, leaves: Iterable[Leaf], lineages: Sequence[Mapping[str, Any]]) -> str:
    """Write the tree beside an adapter; returns its root, 64 hex digits. The rows first, the root last."""
    ordered = sorted(leaves, key=lambda leaf: (leaf.key, leaf.prompt_id, leaf.sample_index))
    with (adapter / ROWS).open("w", encoding="utf-8") as handle:
        for leaf in ordered:
            handle.write(json.dumps(asdict(leaf)) + "\n")
    root = root_of([leaf.digest for leaf in ordered]).hex()
    tree = {
        "version": 1,
        "root": root,
        "rows": len(ordered),
        "lineages": list(lineages),
        "adapter": {path.name: _sha256(path) for path in sorted(adapter.glob("adapter_*"))},
    }
    (adapter / TREE).write_text(json.dumps(tree, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return root


def read(adapter: Path) -> tuple[dict[str, Any], list[Leaf]]:
    """The tree and its leaves.

    Raises:
        ConfigError: no tree here, or a file that isn't one.
    """
    try:
        tree = json.loads((adapter / TREE).read_text(encoding="utf-8"))
        lines = (adapter / ROWS).read_text(encoding="utf-8").splitlines()
        leaves = [Leaf(**json.loads(line)) for line in lines]
        if not isinstance(tree, dict) or not isinstance(tree.get("root"), str):
            raise ValueError("no root")
    except FileNotFoundError as error:
        raise ConfigError(
            f"carries no lineage: {error.filename} is missing", place=str(adapter), remedy="train it again"
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"its lineage can't be read: {error}", place=str(adapter)) from None
    return tree, leaves


def verify(adapter: Path, corpus: Path | None = None) -> list[str]:
    """What doesn't fit: leaves and root, adapter files and their hashes, learned rows and a corpus."""
    tree, leaves = read(adapter)
    found = []
    if root_of([leaf.digest for leaf in leaves]).hex() != tree["root"] or len(leaves) != tree.get("rows"):
        found.append(f"{ROWS} does not give the root in {TREE}")
    for name, digest in (tree.get("adapter") or {}).items():
        path = adapter / name
        if not path.is_file() or _sha256(path) != digest:
            found.append(f"{name} is not the file that was trained")
    if corpus is not None:
        wanted = {(leaf.key, leaf.prompt_id, leaf.sample_index): leaf for leaf in leaves}
        for sample in Corpus.open(corpus).samples(columns=_IDENTITY):
            leaf = wanted.pop((sample.key, sample.prompt_id, sample.sample_index), None)
            if leaf is not None and leaf != leaf_of(sample):
                found.append(f"row {sample.prompt_id}: its completion is not what was learned")
        found += [f"row {leaf.prompt_id} is not in the corpus" for leaf in wanted.values()]
    return found


def trace(adapter: Path, row: str, corpus: Path) -> dict[str, Any]:
    """One learned row, by prompt id or the start of its key: request, answer, teacher, terms, run.

    Raises:
        ConfigError: the adapter did not learn such a row, or several fit.
        FindingsError: the corpus no longer holds what was learned.
    """
    tree, leaves = read(adapter)
    by_key = len(row) >= 8
    fitting = [one for one in leaves if one.prompt_id == row or (by_key and one.key.startswith(row))]
    if len(fitting) != 1:
        many = f"{len(fitting)} rows fit" if fitting else "no learned row has this prompt id or key"
        raise ConfigError(many, place=f"{adapter}: {row}", remedy=f"ids and keys are in {ROWS}")
    wanted = fitting[0]
    for sample in Corpus.open(corpus).samples():
        if (sample.key, sample.prompt_id, sample.sample_index) != (
            wanted.key, wanted.prompt_id, wanted.sample_index,
        ):  # fmt: skip
            continue
        if leaf_of(sample) != wanted:
            raise FindingsError("the corpus holds another completion than was learned", place=row)
        shown = {name: getattr(sample, name) for name in (*_COLUMNS, "request_json", "response_id", "mock")}
        lineage: dict[str, Any] = next((o for o in tree["lineages"] if o.get("run_id") == sample.run_id), {})
        return {**shown, "created_at": sample.created_at.isoformat(), "lineage": lineage}
    raise FindingsError("the corpus no longer holds this row", place=f"{corpus}: {row}")


def _sha256(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
