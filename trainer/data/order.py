"""Decide which examples each step learns, from lengths, seed, epoch and step alone. Loads no torch."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.config import TrainSection
from trainer.data import array_file
from trainer.data.packing import Numbers, Packing, max_documents, pack, shuffled

# Version of the rule by which examples become packs and steps: another one must not find what this one kept.
RULE = 1


class _Epoch(NamedTuple):
    """Packs of one epoch, and the order in which they are learned ([packs] int32)."""

    packing: Packing
    order: Numbers

    def pack(self, place: int) -> tuple[int, ...]:
        return self.packing.pack(int(self.order[place]))


class Order:
    """The packs of every step of a training.

    Args:
        lengths: tokens that each example feeds to the model.
        channels: values of a token's query in one layer of the student; limits the documents of a pack.
        kept_in: folder in which the packs of each epoch are kept for the next start; None: they are not.

    Attributes:
        waste: share of the packs' token budget that stays empty, mean over the epochs that are reached.
    """

    def __init__(
        self,
        lengths: Sequence[int] | Numbers,
        train: TrainSection,
        channels: int = 0,
        *,
        kept_in: Path | None = None,
    ) -> None:
        self._lengths = np.asarray(lengths, dtype=np.int32)
        self._train = train
        self._max_documents = max_documents(train.pack_budget, channels)
        self._kept_in = kept_in
        self._epoch = lru_cache(maxsize=2)(self._pack_epoch)
        self._first = [0]
        wastes: list[float] = []
        # Epochs that `max_steps` leaves out are not packed.
        while len(wastes) < train.epochs and (train.max_steps is None or self._first[-1] < train.max_steps):
            packing = self._epoch(len(wastes)).packing
            wastes.append(packing.waste)
            self._first.append(self._first[-1] + -(-len(packing) // train.packs_per_step))
        self.waste = sum(wastes) / len(wastes)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training: those of all epochs, but at most `[train] max_steps`."""
        return min(self._first[-1], self._train.max_steps or self._first[-1])

    def epoch_of(self, step: int) -> int:
        """Return the epoch of a step; both count from 0."""
        return next(e for e, end in enumerate(self._first[1:]) if step < end)

    def packs(self, step: int) -> tuple[tuple[int, ...], ...]:
        """Return the example numbers of each pack of a step (from 0)."""
        number = self.epoch_of(step)
        epoch = self._epoch(number)
        begin = (step - self._first[number]) * self._train.packs_per_step
        end = min(begin + self._train.packs_per_step, len(epoch.packing))
        return tuple(epoch.pack(place) for place in range(begin, end))

    def largest(self) -> tuple[int, ...]:
        """Return the pack with the most tokens; the first one if there are several."""
        most = -1
        largest: tuple[int, ...] = ()
        for number in range(self._train.epochs):
            made = (self.steps - self._first[number]) * self._train.packs_per_step
            if made <= 0:
                break
            epoch = self._epoch(number)
            packing = epoch.packing
            tokens = np.add.reduceat(self._lengths[packing.items], packing.bounds[:-1], dtype=np.int64)
            place = int(np.argmax(tokens[epoch.order[:made]]))
            if int(tokens[epoch.order[place]]) > most:
                most, largest = int(tokens[epoch.order[place]]), epoch.pack(place)
        return largest

    def _pack_epoch(self, epoch: int) -> _Epoch:
        path = self._kept_path(epoch)
        kept = array_file.read(path, ("items", "bounds", "order")) if path else None
        tokens = int(self._lengths.sum(dtype=np.int64))
        if kept is not None:
            packing = Packing(kept["items"], kept["bounds"], self._train.pack_budget, tokens)
            return _Epoch(packing, kept["order"])
        seed = int.from_bytes(hashlib.sha256(f"{self._train.seed}/{epoch}".encode()).digest()[:8])
        packing = pack(self._lengths, self._train.pack_budget, seed=seed, max_documents=self._max_documents)
        made = _Epoch(packing, shuffled(len(packing), seed))
        if path:
            with suppress(OSError):  # a disk that is full or can't be written: they are made again next time
                array_file.write(
                    path, {"items": packing.items, "bounds": packing.bounds, "order": made.order}
                )
        return made

    def _kept_path(self, epoch: int) -> Path | None:
        """Return the file of an epoch's packs: its name holds all that they depend on."""
        if self._kept_in is None:
            return None
        digest = hashlib.sha256(self._lengths.tobytes())
        settings = (RULE, self._train.pack_budget, self._max_documents, self._train.seed, epoch)
        digest.update(repr(settings).encode())
        return self._kept_in / f"packs-{digest.hexdigest()[:32]}.npz"
