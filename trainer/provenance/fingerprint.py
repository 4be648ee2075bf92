"""Write and verify a hash tree (Merkle tree) over the rows, lineages and files of a student.

Leaves, in this order:

- the rows by key: SHA-256(0x00 || key || SHA-256(completion) || origin || sample number, space, prompt id);
- each lineage: SHA-256(0x00 || its canonical JSON);
- each file beside the tree but README.md, which people edit: SHA-256(0x00 || name || 0x00 || SHA-256(file)).

A node is SHA-256(0x01 || left || right), as in RFC 6962 section 2.1. One flipped byte in a row, a lineage or
a file, a missing or an added one, gives another root. Both files of the tree must be in canonical form, so
a flipped byte in them is detected too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from harvester.store.reader import Corpus
from harvester.store.shards.schema import Sample
from harvester.system.files import sha256_of
from harvester.terms.lineage import Lineage
from trainer.errors import ConfigError, FindingsError

TREE_FILE = "hash_tree.json"
ROWS_FILE = "hash_tree.rows.jsonl"
VERSION = 2
ORIGIN_COLUMNS = (
    "request_json",
    "request_model",
    "response_model",
    "system_fingerprint",
    "response_id",
    "endpoint",
    "teacher_id",
    "terms_id",
    "permission_sha256",
    "purpose",
    "mock",
    "run_id",
    "config_sha256",
    "tool_version",
    "created_at",
)
"""Columns that say where a row came from. Its asker's columns may change later; these never do."""

_NOT_HASHED = frozenset({TREE_FILE, ROWS_FILE, "README.md"})
_TRACED_COLUMNS = ("key", "prompt_id", "sample_index", "completion", *ORIGIN_COLUMNS)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One learned row: cache key, SHA-256 of its completion and of its origin, each 64 hex digits."""

    key: str
    completion_sha256: str
    origin_sha256: str
    prompt_id: str
    sample_index: int

    @property
    def digest(self) -> bytes:
        """The leaf's hash, 32 bytes."""
        told = bytes.fromhex(self.key + self.completion_sha256 + self.origin_sha256)
        asker = f"{self.sample_index} {self.prompt_id}".encode("utf-8", "surrogatepass")
        return hashlib.sha256(b"\x00" + told + asker).digest()


def origin_sha256(sample: Sample) -> str:
    """SHA-256 (64 hex digits) over the columns of `ORIGIN`, as JSON with names sorted."""
    told = {name: getattr(sample, name) for name in ORIGIN_COLUMNS}
    return hashlib.sha256(_canonical({**told, "created_at": sample.created_at.isoformat()})).hexdigest()


def leaf_of(sample: Sample, origin: str = "") -> Leaf:
    """The leaf of a row that was learned; `origin` where the row no longer has the columns for it."""
    completion = (sample.completion or "").encode("utf-8", "surrogatepass")
    return Leaf(
        sample.key,
        hashlib.sha256(completion).hexdigest(),
        origin or origin_sha256(sample),
        sample.prompt_id,
        sample.sample_index,
    )


def merkle_root(digests: Sequence[bytes]) -> bytes:
    """The tree's root over leaf hashes in order (RFC 6962: the left subtree is the largest power of two).

    The root of no leaf is the hash of nothing.
    """
    if not digests:
        return hashlib.sha256(b"").digest()
    if len(digests) == 1:
        return digests[0]
    split = 1 << (len(digests) - 1).bit_length() - 1
    return hashlib.sha256(b"\x01" + merkle_root(digests[:split]) + merkle_root(digests[split:])).digest()


def write_rows(folder: Path, leaves: Iterable[Leaf]) -> list[Leaf]:
    """Write the list of learned rows; returns it in its order."""
    ordered = sorted(leaves, key=lambda leaf: (leaf.key, leaf.prompt_id, leaf.sample_index))
    (folder / ROWS_FILE).write_bytes(_rows_text(ordered))
    return ordered


def write_tree(folder: Path, leaves: Sequence[Leaf], lineages: Sequence[Lineage]) -> str:
    """Write the tree over rows, lineages and all files that lie here now; returns its root, 64 hex digits."""
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name not in _NOT_HASHED}
    told = {
        "version": VERSION,
        "rows": len(leaves),
        "lineages": [dict(lineage.stored) for lineage in lineages],
        "files": files,
    }
    root = _root(leaves, told)
    (folder / TREE_FILE).write_bytes(_tree_text({**told, "root": root}))
    return root


def _root(leaves: Sequence[Leaf], told: Mapping[str, Any]) -> str:
    lineages = [hashlib.sha256(b"\x00" + _canonical(each)).digest() for each in told["lineages"]]
    files = [
        hashlib.sha256(b"\x00" + name.encode() + b"\x00" + bytes.fromhex(digest)).digest()
        for name, digest in sorted(told["files"].items())
    ]
    return merkle_root([*(leaf.digest for leaf in leaves), *lineages, *files]).hex()


def _is_lowercase_hex(leaf: Leaf) -> bool:
    """Hexadecimal in small letters: a capital would be another spelling of the same hash."""
    told = leaf.key + leaf.completion_sha256 + leaf.origin_sha256
    return bytes.fromhex(told).hex() == told


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _rows_text(leaves: Sequence[Leaf]) -> bytes:
    return "".join(json.dumps(asdict(leaf)) + "\n" for leaf in leaves).encode()


def _tree_text(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, sort_keys=True) + "\n").encode()


def read(folder: Path) -> tuple[dict[str, Any], list[Leaf]]:
    """The tree and its leaves.

    Raises:
        ConfigError: no tree here, or one of another version.
        FindingsError: a file of it that isn't one any more.
    """
    try:
        tree_bytes, rows_bytes = (folder / TREE_FILE).read_bytes(), (folder / ROWS_FILE).read_bytes()
    except OSError as error:
        raise ConfigError(
            f"carries no lineage: {error.filename} is missing", place=str(folder), remedy="train it again"
        ) from None
    try:
        tree = json.loads(tree_bytes)
        version = tree["version"]
        leaves = [Leaf(**json.loads(line)) for line in rows_bytes.splitlines()]
        is_whole = _tree_text(tree) == tree_bytes and _rows_text(leaves) == rows_bytes
        is_whole = is_whole and all(_is_lowercase_hex(leaf) for leaf in leaves)
        _root(leaves, tree)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise FindingsError(f"its hash tree is not as it was written: {error}", place=str(folder)) from None
    if version != VERSION:
        raise ConfigError(
            f"its hash tree is of version {version!r}", place=str(folder), remedy="train it again"
        )
    if not is_whole:
        raise FindingsError("its hash tree is not as it was written: spelt otherwise", place=str(folder))
    return tree, leaves


def verify(folder: Path, corpus: Path | None = None) -> list[str]:
    """What doesn't fit: rows, lineages and root, files and their hashes, learned rows and a corpus."""
    tree, leaves = read(folder)
    found = []
    if _root(leaves, tree) != tree.get("root") or len(leaves) != tree.get("rows"):
        found.append(f"{ROWS_FILE} and the lineages do not give the root in {TREE_FILE}")
    present = {path.name for path in folder.iterdir()} - _NOT_HASHED
    found += [f"{name} was not there when this was trained" for name in sorted(present - set(tree["files"]))]
    for name, digest in tree["files"].items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != digest:
            found.append(f"{name} is not the file that was trained")
    if corpus is not None:
        wanted = {(leaf.key, leaf.prompt_id, leaf.sample_index): leaf for leaf in leaves}
        for sample in Corpus.open(corpus).samples(columns=_TRACED_COLUMNS):
            leaf = wanted.pop((sample.key, sample.prompt_id, sample.sample_index), None)
            if leaf is not None and (why := _difference(leaf, sample)):
                found.append(f"row {sample.prompt_id}: {why}")
        found += [f"row {leaf.prompt_id} is not in the corpus" for leaf in wanted.values()]
    return found


def _difference(leaf: Leaf, sample: Sample) -> str:
    now = leaf_of(sample)
    if now.completion_sha256 != leaf.completion_sha256:
        return "its completion is not what was learned"
    return "" if now == leaf else "its request, teacher or terms are not those of the day"


def require_intact(folder: Path) -> None:
    """Do nothing when the tree is whole.

    Raises:
        ConfigError, FindingsError: it is not; whoever has such a student can't show what it learned from.
    """
    if found := verify(folder):
        raise FindingsError("; ".join(found[:5]), place=str(folder), remedy="train it again")


def trace(folder: Path, row: str, corpus: Path) -> dict[str, Any]:
    """One learned row, by prompt id or the start of its key: request, answer, teacher, terms, run.

    Raises:
        ConfigError: the student did not learn such a row, or several fit.
        FindingsError: the tree is not whole, or the corpus no longer holds what was learned.
    """
    require_intact(folder)
    tree, leaves = read(folder)
    by_key = len(row) >= 8
    fitting = [one for one in leaves if one.prompt_id == row or (by_key and one.key.startswith(row))]
    if len(fitting) != 1:
        many = f"{len(fitting)} rows fit" if fitting else "no learned row has this prompt id or key"
        raise ConfigError(many, place=f"{folder}: {row}", remedy=f"ids and keys are in {ROWS_FILE}")
    wanted = fitting[0]
    for sample in Corpus.open(corpus).samples():
        if (sample.key, sample.prompt_id, sample.sample_index) != (
            wanted.key,
            wanted.prompt_id,
            wanted.sample_index,
        ):
            continue
        if why := _difference(wanted, sample):
            raise FindingsError(why, place=row)
        shown = {name: getattr(sample, name) for name in _TRACED_COLUMNS}
        lineage: dict[str, Any] = next((o for o in tree["lineages"] if o.get("run_id") == sample.run_id), {})
        return {**shown, "created_at": sample.created_at.isoformat(), "lineage": lineage}
    raise FindingsError("the corpus no longer holds this row", place=f"{corpus}: {row}")
