"""Define which shard of a harvest this process runs, as in `2/8`. No I/O."""

from __future__ import annotations

import re
from dataclasses import dataclass

# The most shards that a harvest may be split into.
MOST_SHARDS = 10_000
_PATTERN = re.compile(r"([0-9]{1,5})/([0-9]{1,5})\Z")


@dataclass(frozen=True, slots=True)
class Shard:
    """One of several processes that share a harvest: number `number` of `of`, from 1."""

    number: int
    of: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read a shard as the command line and harvest.toml name it.

        Raises:
            ValueError: it is no shard.
        """
        match = _PATTERN.match(text.strip())
        shard = cls(int(match[1]), int(match[2])) if match is not None else cls(0, 0)
        if not 1 <= shard.number <= shard.of <= MOST_SHARDS:
            raise ValueError(f"{text!r} is no shard: 2/8 is the second of eight")
        return shard

    @property
    def rank(self) -> int:
        """Its rank, from 0 (`request_key.owner`)."""
        return self.number - 1

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def store(self, path: str) -> str:
        """Return the folder of its store, beside that of the whole harvest."""
        return f"{path.rstrip('/')}-{self.number}-of-{self.of}"

    @classmethod
    def of_store(cls, name: str, whole: str) -> Shard | None:
        """Return the shard whose store has this name beside that of the whole harvest; None if it is none."""
        number, _, of = name.removeprefix(f"{whole}-").partition("-of-")
        try:
            shard = cls.parse(f"{number}/{of}")
        except ValueError:
            return None
        return shard if shard.store(whole) == name else None

    def count(self, whole: int) -> int:
        """Return its part of a count: 0 for some shards if it is below `of`. All parts add up to it."""
        return whole // self.of + (self.rank < whole % self.of)
