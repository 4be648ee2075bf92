"""Keep a multi-map from 64-bit hashes to numbers in a file without a name.

Open addressing with linear probing. The file is mapped into memory: the operating system writes pages to
disk and drops them when memory is short, so a large table needs little of it.
"""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path

# Slots of a new table. A slot has 16 bytes; the table doubles when half of the slots are in use.
FIRST_SLOTS = 1 << 12
SLOT_BYTES = 16

# Most values that are kept for one hash; further ones are left out. It bounds the time of a lookup.
MOST_VALUES = 64

_MASK64 = (1 << 64) - 1


class HashTable:
    """Maps 64-bit hashes to 64-bit numbers, several for each hash.

    Args:
        folder: where the file lies; None for the folder of temporary files (TMPDIR).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        self._used = 0
        self._open(FIRST_SLOTS)

    def __len__(self) -> int:
        return self._used

    def get(self, key: int) -> list[int]:
        """Return the numbers of a hash, in the order in which they were added."""
        key = (key & _MASK64) or 1
        slots, mask = self._slots, self._mask
        slot = key & mask
        found = []
        while stored := slots[2 * slot]:
            if stored == key:
                found.append(slots[2 * slot + 1])
            slot = (slot + 1) & mask
        return found

    def add(self, key: int, value: int) -> None:
        """Add a number to a hash, unless it has `MOST_VALUES` already."""
        if 2 * self._used >= self._mask:
            self._grow()
        key = (key & _MASK64) or 1
        slots, mask = self._slots, self._mask
        slot, values = key & mask, 0
        while stored := slots[2 * slot]:
            values += stored == key
            slot = (slot + 1) & mask
        if values < MOST_VALUES:
            slots[2 * slot], slots[2 * slot + 1] = key, value
            self._used += 1

    def close(self) -> None:
        """Give the memory and the file back."""
        self._slots.release()
        self._map.close()

    def _open(self, slots: int) -> None:
        with tempfile.TemporaryFile(dir=self._folder) as file:
            file.truncate(slots * SLOT_BYTES)
            self._map = mmap.mmap(file.fileno(), slots * SLOT_BYTES)
        self._slots = memoryview(self._map).cast("Q")
        self._mask = slots - 1

    def _grow(self) -> None:
        old_map, old = self._map, self._slots
        self._open(2 * (self._mask + 1))
        slots, mask = self._slots, self._mask
        for at in range(0, len(old), 2):
            if key := old[at]:
                slot = key & mask
                while slots[2 * slot]:
                    slot = (slot + 1) & mask
                slots[2 * slot], slots[2 * slot + 1] = key, old[at + 1]
        old.release()
        old_map.close()
