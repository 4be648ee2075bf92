"""Find texts that repeat an earlier text, exactly or nearly, one text after the other.

Exact: equal once Unicode form, case and white space are folded. Near: the Jaccard similarity of the sets of
shingles, estimated by MinHash (Broder 1997), is at least a threshold. Candidates are found by
locality-sensitive hashing: a signature is cut into bands, and texts with an equal band are compared. Texts
whose numbers differ are never near duplicates: "12 + 5" and "12 + 6" are two questions.

Only the first text of its kind is kept for comparison. All that is kept lies in files without a name, mapped
into memory: for a text 512 bytes of signature and about 700 bytes of hash table; in memory 8 bytes.
"""

from __future__ import annotations

import hashlib
import mmap
import tempfile
import weakref
from array import array
from contextlib import ExitStack, closing
from dataclasses import dataclass
from operator import eq
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from harvester.quality.similarity.hash_table import HashTable
from harvester.quality.similarity.texts import normalised, numbers_in, shingles_of

if TYPE_CHECKING:
    from collections.abc import Sequence

How = Literal["exact", "near"]

DEFAULT_THRESHOLD = 0.8
# Below it, bands of one value would compare nearly every text with every other.
LEAST_THRESHOLD = 0.3

# Values of a signature. The estimate's standard deviation is sqrt(s (1 - s) / 128): 0.035 at s = 0.8.
SIGNATURE = 128
SEED = 1

# The share of pairs at the threshold that must become candidates; decides how long a band is.
LEAST_RECALL = 0.99


@dataclass(frozen=True, slots=True)
class Match:
    """The earlier text that a text repeats: its label, and the (estimated) similarity, 1.0 if equal."""

    label: str
    similarity: float


def rows_of_band(threshold: float) -> int:
    """Return how many values a band has: as many as leave `LEAST_RECALL` of the pairs at the threshold."""
    fitting = [
        rows
        for rows in range(1, SIGNATURE + 1)
        if 1 - (1 - threshold**rows) ** (SIGNATURE // rows) >= LEAST_RECALL
    ]
    return max(fitting, default=1)


def signature_of(text: str) -> array[int]:
    """Return the MinHash signature of a normalised text, 128 numbers of 32 bits."""
    from rensa import RMinHash  # loaded for those only who compare texts

    minhash = RMinHash(num_perm=SIGNATURE, seed=SEED)
    minhash.update(shingles_of(text))
    return array("I", minhash.digest())


class Duplicates:
    """Finds repetitions among texts that are given one after the other.

    Args:
        how: exactly equal, or near duplicates too.
        threshold: least similarity of near duplicates.
        folder: where the files lie; None for the folder of temporary files (TMPDIR).
    """

    def __init__(
        self, how: How = "exact", threshold: float = DEFAULT_THRESHOLD, folder: Path | None = None
    ) -> None:
        self._stack = ExitStack()
        self._exact = self._stack.enter_context(closing(HashTable(folder)))
        self._labels = self._stack.enter_context(closing(_Labels(folder)))
        self._near = (
            self._stack.enter_context(closing(_NearIndex(threshold, folder))) if how == "near" else None
        )

    def match(self, text: str, guard: str = "") -> Match | None:
        """Return the earlier text that this one repeats; None if there is none.

        Args:
            guard: texts with different guards are never duplicates.
        """
        return self._match(normalised(text), guard)[0]

    def find(self, text: str, label: str, guard: str = "") -> Match | None:
        """Return the earlier text that this one repeats; if there is none, remember it under its label."""
        folded = normalised(text)
        match, digest, signature = self._match(folded, guard)
        if match is None:
            number = self._labels.add(label)
            self._exact.add(digest >> 64, (digest & 0xFFFFFFFF) << 32 | number)
            if self._near is not None:
                assert signature is not None
                self._near.add(number, signature)
        return match

    def _match(self, folded: str, guard: str) -> tuple[Match | None, int, _BandedSignature | None]:
        encoded = f"{guard}\x1f{folded}".encode("utf-8", "surrogatepass")
        digest = int.from_bytes(hashlib.blake2b(encoded, digest_size=16).digest(), "big")
        for value in self._exact.get(digest >> 64):  # 96 bits of the digest are compared
            if value >> 32 == digest & 0xFFFFFFFF:
                return Match(self._labels[value & 0xFFFFFFFF], 1.0), digest, None
        if self._near is None:
            return None, digest, None
        signature = self._near.signature(folded, guard)
        nearest = self._near.nearest(signature)
        match = None if nearest is None else Match(self._labels[nearest[0]], nearest[1])
        return match, digest, signature

    def close(self) -> None:
        """Give memory and files back."""
        self._stack.close()


@dataclass(frozen=True, slots=True)
class _BandedSignature:
    """A signature, and the hash of each of its bands."""

    values: array[int]
    bands: Sequence[int]


class _NearIndex:
    """Signatures by number, and a table from bands to numbers."""

    def __init__(self, threshold: float, folder: Path | None) -> None:
        self._threshold = threshold
        self._rows = rows_of_band(threshold)
        self._bands = HashTable(folder)
        self._signatures = _Signatures(folder)

    def signature(self, folded: str, guard: str) -> _BandedSignature:
        """Compute the signature of a normalised text. Texts with other guards or numbers share no band."""
        values, rows = signature_of(folded), self._rows
        apart = repr((guard, numbers_in(folded))).encode("utf-8", "surrogatepass")
        salt = int.from_bytes(hashlib.blake2b(apart, digest_size=8).digest(), "big")
        # The hash of a tuple of integers is the same in every process.
        starts = range(0, SIGNATURE - rows + 1, rows)
        return _BandedSignature(
            values, [hash((salt, start, *values[start : start + rows])) for start in starts]
        )

    def nearest(self, signature: _BandedSignature) -> tuple[int, float] | None:
        """Return number and similarity of the most similar text that reaches the threshold."""
        candidates = {number for band in signature.bands for number in self._bands.get(band)}
        best: tuple[int, float] | None = None
        for number in sorted(candidates):
            equal = sum(map(eq, signature.values, self._signatures[number]))
            if equal >= self._threshold * SIGNATURE and (best is None or equal / SIGNATURE > best[1]):
                best = number, equal / SIGNATURE
        return best

    def add(self, number: int, signature: _BandedSignature) -> None:
        """Add a signature; numbers come in order, from 0."""
        self._signatures.add(signature.values)
        for band in signature.bands:
            self._bands.add(band, number)

    def close(self) -> None:
        self._bands.close()
        self._signatures.close()


class _Signatures:
    """Signatures in a file, by number."""

    def __init__(self, folder: Path | None) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        weakref.finalize(self, self._file.close)  # an error may end the work before `close`
        self._count = self._room = 0
        self._map: mmap.mmap | None = None

    def add(self, signature: array[int]) -> None:
        if self._count == self._room:
            self._grow()
        assert self._map is not None
        size = SIGNATURE * signature.itemsize
        self._map[self._count * size : (self._count + 1) * size] = signature.tobytes()
        self._count += 1

    def __getitem__(self, number: int) -> array[int]:
        assert self._map is not None
        signature = array("I")
        size = SIGNATURE * signature.itemsize
        signature.frombytes(self._map[number * size : (number + 1) * size])
        return signature

    def _grow(self) -> None:
        self._room = max(1024, 2 * self._room)
        size = self._room * SIGNATURE * array("I").itemsize
        self._file.truncate(size)
        if self._map is None:
            self._map = mmap.mmap(self._file.fileno(), size)
        else:
            self._map.resize(size)

    def close(self) -> None:
        if self._map is not None:
            self._map.close()
        self._file.close()


class _Labels:
    """Short texts in a file, by number; 8 bytes each in memory."""

    def __init__(self, folder: Path | None) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._ends = array("Q", [0])
        self._waiting: list[bytes] = []

    def add(self, label: str) -> int:
        """Add a label; return its number."""
        encoded = label.encode("utf-8", "surrogatepass")
        self._waiting.append(encoded)
        self._ends.append(self._ends[-1] + len(encoded))
        if len(self._waiting) >= 1024:
            self._write()
        return len(self._ends) - 2

    def __getitem__(self, number: int) -> str:
        self._write()
        self._file.seek(self._ends[number])
        return self._file.read(self._ends[number + 1] - self._ends[number]).decode("utf-8", "surrogatepass")

    def _write(self) -> None:
        if self._waiting:
            self._file.seek(0, 2)
            self._file.write(b"".join(self._waiting))
            self._waiting.clear()

    def close(self) -> None:
        self._file.close()
