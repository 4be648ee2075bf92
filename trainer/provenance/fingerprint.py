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
from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import reduce
from itertools import compress
from pathlib import Path
from typing import Any, Protocol

from harvester.store.reader import Corpus
from harvester.store.shards.schema import Sample
from harvester.system.counted import first_few
from harvester.system.files import sha256_of
from harvester.terms.lineage import Lineage
from trainer.errors import ConfigError, FindingsError

TREE_FILE = "hash_tree.json"
ROWS_FILE = "hash_tree.rows.jsonl"
VERSION = 2
# Remedy where a corpus is not the one that was learned.
_OTHER_ROWS = "name the corpus that was learned by --corpus; a purged or repaired row can't be traced"
CHANGED_REMEDY = "restore the files from a copy, or train the adapter again"
# Columns that describe where a row came from. They never change; the other columns of the prompt may.
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

_NOT_HASHED = frozenset({TREE_FILE, ROWS_FILE, "README.md"})
_TRACED_COLUMNS = ("key", "prompt_id", "sample_index", "completion", *ORIGIN_COLUMNS)


@dataclass(frozen=True, slots=True)
class Leaf:
    """Hold one learned row: cache key, SHA-256 of its completion and of its origin, each 64 hex digits."""

    key: str
    completion_sha256: str
    origin_sha256: str
    prompt_id: str
    sample_index: int

    @property
    def digest(self) -> bytes:
        """Return the leaf's hash, 32 bytes."""
        hashes = bytes.fromhex(self.key + self.completion_sha256 + self.origin_sha256)
        prompt = f"{self.sample_index} {self.prompt_id}".encode("utf-8", "surrogatepass")
        return hashlib.sha256(b"\x00" + hashes + prompt).digest()


def origin_sha256(sample: Sample) -> str:
    """Return the SHA-256 (64 hex digits) of `ORIGIN_COLUMNS` of a row, as canonical JSON."""
    values = {name: getattr(sample, name) for name in ORIGIN_COLUMNS}
    return hashlib.sha256(_canonical({**values, "created_at": sample.created_at.isoformat()})).hexdigest()


def sorted_leaves(samples: Iterable[Sample], origins: Mapping[str, str]) -> list[Leaf]:
    """Return the leaves of learned rows in the order of the tree.

    Args:
        origins: `origin_sha256` of rows, by key, where it was computed before.
    """
    leaves = (leaf_of(sample, origins.get(sample.key, "")) for sample in samples)
    return sorted(leaves, key=lambda leaf: (leaf.key, leaf.prompt_id, leaf.sample_index))


def leaf_of(sample: Sample, origin: str = "") -> Leaf:
    """Return the leaf of a learned row.

    Args:
        origin: `origin_sha256` of the row, if it was computed before; empty: compute it.
    """
    completion = (sample.completion or "").encode("utf-8", "surrogatepass")
    return Leaf(
        sample.key,
        hashlib.sha256(completion).hexdigest(),
        origin or origin_sha256(sample),
        sample.prompt_id,
        sample.sample_index,
    )


class LearnedRows(Protocol):
    """Say which rows a student learned, for its documents."""

    @property
    def lineages(self) -> Sequence[Lineage]:
        """Teachers of the corpus, and the terms they were asked under."""

    @property
    def learned(self) -> int:
        """Number of the rows."""

    def leaves(self) -> Iterator[Leaf]:
        """Yield the leaf of each row, sorted by key, prompt id and sample number."""

    def teachers(self) -> Mapping[tuple[str, str, bool], int]:
        """Return the number of rows by teacher, terms record and whether the teacher is a mock."""

    def first(self, count: int) -> LearnedRows:
        """Return at most some of the rows, to see whether they can be written."""


class MerkleTree:
    """Compute the root of the tree over leaf hashes (RFC 6962 section 2.1), one leaf after the other.

    Attributes:
        leaves: leaves so far.
    """

    def __init__(self) -> None:
        self.leaves = 0
        # Roots of the full trees that the leaves so far make, the largest first.
        self._full: list[bytes] = []

    def add(self, digest: bytes) -> None:
        """Add the hash of a leaf."""
        self.leaves += 1
        size = self.leaves
        while size % 2 == 0:
            digest = _node(self._full.pop(), digest)
            size //= 2
        self._full.append(digest)

    @property
    def root(self) -> bytes:
        """The root over the leaves so far; SHA-256("") without leaves."""
        if not self._full:
            return hashlib.sha256(b"").digest()
        return reduce(lambda right, left: _node(left, right), reversed(self._full))


def _node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def write_rows(folder: Path, leaves: Iterable[Leaf]) -> MerkleTree:
    """Write the learned rows, which are sorted by key, to `ROWS_FILE`; return the tree over them."""
    tree = MerkleTree()
    with (folder / ROWS_FILE).open("wb") as file:
        for leaf in leaves:
            file.write(_line(leaf))
            tree.add(leaf.digest)
    return tree


def write_tree(folder: Path, rows: MerkleTree, lineages: Sequence[Lineage]) -> str:
    """Write `TREE_FILE` over rows, lineages and all files in the folder; return the root, 64 hex digits.

    Args:
        rows: the tree over the rows, from `write_rows`; lineages and files are added to it.
    """
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name not in _NOT_HASHED}
    content = {
        "version": VERSION,
        "rows": rows.leaves,
        "lineages": [dict(lineage.stored) for lineage in lineages],
        "files": files,
    }
    root = _root(rows, content)
    (folder / TREE_FILE).write_bytes(_tree_text({**content, "root": root}))
    return root


def _root(tree: MerkleTree, content: Mapping[str, Any]) -> str:
    for lineage in content["lineages"]:
        tree.add(hashlib.sha256(b"\x00" + _canonical(lineage)).digest())
    for name, digest in sorted(content["files"].items()):
        tree.add(hashlib.sha256(b"\x00" + name.encode() + b"\x00" + bytes.fromhex(digest)).digest())
    return tree.root.hex()


def _is_lowercase_hex(leaf: Leaf) -> bool:
    """Whether the hashes of a leaf are in lower case: upper case would spell the same hash differently."""
    hashes = leaf.key + leaf.completion_sha256 + leaf.origin_sha256
    return bytes.fromhex(hashes).hex() == hashes


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _line(leaf: Leaf) -> bytes:
    return f"{json.dumps(asdict(leaf))}\n".encode()


def _tree_text(tree: Mapping[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2, sort_keys=True) + "\n").encode()


@dataclass(frozen=True, slots=True)
class StoredLeaves:
    """The leaves of a tree, of which there may be millions: they are read when they are asked for.

    Attributes:
        path: of their file. count: their number.
        root: of the tree over them and what `TREE_FILE` names, 64 hex digits.
    """

    path: Path
    count: int
    root: str

    def __len__(self) -> int:
        """Return their number."""
        return self.count

    def __iter__(self) -> Iterator[Leaf]:
        """Yield them in the order of the tree."""
        with self.path.open("rb") as file:
            for line in file:
                yield _parsed(line)

    def read(self, start: int) -> Leaf:
        """Return the leaf whose line begins at a byte of the file."""
        with self.path.open("rb") as file:
            file.seek(start)
            return _parsed(file.readline())


def _parsed(line: bytes) -> Leaf:
    return Leaf(**json.loads(line))


def read(folder: Path) -> tuple[dict[str, Any], StoredLeaves]:
    """Read the tree, and check that both of its files are as they were written.

    Raises:
        ConfigError: the folder has no tree, or one of another version.
        FindingsError: a file of the tree was changed after it was written.
    """
    path = folder / ROWS_FILE
    try:
        tree_bytes = (folder / TREE_FILE).read_bytes()
        rows = path.open("rb")
    except OSError as error:
        raise ConfigError(
            f"no hash tree here: {error.filename} is missing",
            place=str(folder),
            remedy=f"name the folder of an adapter that `trainer train` wrote; it holds {TREE_FILE}",
        ) from None
    with rows:
        try:
            tree = json.loads(tree_bytes)
            version = tree["version"]
            learned = MerkleTree()
            is_whole = _tree_text(tree) == tree_bytes
            for line in rows:
                leaf = _parsed(line)
                learned.add(leaf.digest)
                is_whole = is_whole and _line(leaf) == line and _is_lowercase_hex(leaf)
            leaves = StoredLeaves(path, learned.leaves, _root(learned, tree))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FindingsError(
                f"the hash tree was changed: {error}", place=str(folder), remedy=CHANGED_REMEDY
            ) from None
    if version != VERSION:
        raise ConfigError(
            f"the hash tree has version {version!r}; this program reads {VERSION}",
            place=str(folder),
            remedy="use the version of trainer that wrote it, or train the adapter again",
        )
    if not is_whole:
        raise FindingsError(
            "the hash tree was changed: it is not in canonical form", place=str(folder), remedy=CHANGED_REMEDY
        )
    return tree, leaves


def verify(folder: Path, corpus: Path | None = None) -> list[str]:
    """Check rows, lineages and files against the tree, and the rows against a corpus if one is given.

    Returns:
        One line for each difference; empty if there is none.

    Raises:
        ConfigError, FindingsError: see `read`.
    """
    tree, leaves = read(folder)
    findings = []
    if leaves.root != tree.get("root") or len(leaves) != tree.get("rows"):
        findings.append(f"{ROWS_FILE} and the lineages do not give the root in {TREE_FILE}")
    present = {path.name for path in folder.iterdir()} - _NOT_HASHED
    findings += [f"{name} was added after the training" for name in sorted(present - set(tree["files"]))]
    for name, digest in tree["files"].items():
        path = folder / name
        if not path.is_file() or sha256_of(path) != digest:
            findings.append(f"{name} was changed or removed after the training")
    if corpus is not None:
        expected = _LeavesByKey(leaves)
        for sample in Corpus.open(corpus).samples(columns=_TRACED_COLUMNS):
            leaf = expected.take(sample)
            if leaf is not None and (why := _difference(leaf, sample)):
                findings.append(f"row {sample.prompt_id}: {why}")
        findings += [f"row {leaf.prompt_id} is not in the corpus" for leaf in expected.left()]
    return findings


class _LeavesByKey:
    """Find the leaves of samples, each once. Of a leaf only 21 bytes are held."""

    def __init__(self, leaves: StoredLeaves) -> None:
        self._leaves = leaves
        # Not numpy, which comes with the extra `train`: `trainer trace` works without it.
        self._starts, keys, start = array("q"), array("Q"), 0
        with leaves.path.open("rb") as file:
            for line in file:
                self._starts.append(start)
                keys.append(_short_key(_parsed(line).key))
                start += len(line)
        self._order = array("i", sorted(range(len(keys)), key=keys.__getitem__))
        self._keys = array("Q", (keys[place] for place in self._order))
        self._is_left = bytearray(b"\1") * len(keys)

    def take(self, sample: Sample) -> Leaf | None:
        """Return the leaf of a row; None if there is none, or it was taken before."""
        found = None
        key = _short_key(sample.key)
        for at in range(bisect_left(self._keys, key), bisect_right(self._keys, key)):
            place = self._order[at]
            if self._is_left[place]:
                leaf = self._leaves.read(self._starts[place])
                if _identity(leaf) == _identity(sample):
                    self._is_left[place] = 0
                    found = leaf
        return found

    def left(self) -> Iterator[Leaf]:
        """Yield the leaves that were not taken, in the order of the tree."""
        for start in compress(self._starts, self._is_left):
            yield self._leaves.read(start)


def _short_key(key: str) -> int:
    # Hashed, because rows of a corpus that another program wrote may have keys of any kind.
    digest = hashlib.blake2b(key[:16].encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest)


def _identity(row: Leaf | Sample) -> tuple[str, str, int]:
    return row.key, row.prompt_id, row.sample_index


def _difference(leaf: Leaf, sample: Sample) -> str:
    now = leaf_of(sample)
    if now.completion_sha256 != leaf.completion_sha256:
        return "the completion differs from the learned one"
    return "" if now == leaf else "request, teacher or terms differ from those at the time of training"


def require_intact(folder: Path) -> None:
    """Refuse a folder whose rows, lineages or files differ from its hash tree.

    Raises:
        ConfigError: no tree, or one of another version. FindingsError: the first five differences.
    """
    if findings := verify(folder):
        raise FindingsError(first_few(findings), place=str(folder), remedy=CHANGED_REMEDY)


def trace(folder: Path, row: str, corpus: Path) -> dict[str, Any]:
    """Find one learned row in the corpus and return its request, answer, teacher, terms and lineage.

    Args:
        row: prompt id, or the first 8 or more digits of the key.

    Raises:
        ConfigError: no learned row matches, or several do.
        FindingsError: the hash tree was changed, or the corpus no longer holds the learned row.
    """
    require_intact(folder)
    tree, leaves = read(folder)
    by_key = len(row) >= 8
    matches = [leaf for leaf in leaves if leaf.prompt_id == row or (by_key and leaf.key.startswith(row))]
    if len(matches) != 1:
        message = f"{len(matches)} rows match" if matches else "no learned row has this prompt id or key"
        raise ConfigError(message, place=f"{folder}: {row}", remedy=f"ids and keys are in {ROWS_FILE}")
    wanted = matches[0]
    for sample in Corpus.open(corpus).samples():
        if _identity(sample) != _identity(wanted):
            continue
        if why := _difference(wanted, sample):
            raise FindingsError(why, place=row, remedy=_OTHER_ROWS)
        columns = {name: getattr(sample, name) for name in _TRACED_COLUMNS}
        lineage: dict[str, Any] = next(
            (stored for stored in tree["lineages"] if stored.get("run_id") == sample.run_id), {}
        )
        return {**columns, "created_at": sample.created_at.isoformat(), "lineage": lineage}
    raise FindingsError("the corpus no longer holds this row", place=f"{corpus}: {row}", remedy=_OTHER_ROWS)
