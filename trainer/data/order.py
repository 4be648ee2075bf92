"""Decide which examples each step learns, from lengths, seed, epoch and step alone. Loads no torch."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from functools import lru_cache

from trainer.config import TrainSection
from trainer.data.packing import max_documents, pack


class Order:
    """The packs of every step of a training.

    Args:
        lengths: tokens that each example feeds to the model.
        channels: values of a token's query in one layer of the student; limits the documents of a pack.

    Attributes:
        waste: share of the packs' token budget that stays empty, mean over the epochs.
    """

    def __init__(self, lengths: Sequence[int], train: TrainSection, channels: int = 0) -> None:
        self._lengths = lengths
        self._train = train
        self._max_documents = max_documents(train.pack_budget, channels)
        self._epoch = lru_cache(maxsize=2)(self._pack_epoch)
        self._first = [0]
        self.waste = 0.0
        for epoch in range(train.epochs):
            packs, waste = self._epoch(epoch)
            self.waste += waste / train.epochs
            self._first.append(self._first[-1] + -(-len(packs) // train.packs_per_step))

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole training: those of all epochs, but at most `[train] max_steps`."""
        return min(self._first[-1], self._train.max_steps or self._first[-1])

    def epoch_of(self, step: int) -> int:
        """Return the epoch of a step; both count from 0."""
        return next(e for e in range(self._train.epochs) if step < self._first[e + 1])

    def packs(self, step: int) -> tuple[tuple[int, ...], ...]:
        """Return the example numbers of each pack of a step (from 0)."""
        epoch = self.epoch_of(step)
        begin = (step - self._first[epoch]) * self._train.packs_per_step
        return self._epoch(epoch)[0][begin : begin + self._train.packs_per_step]

    def largest(self) -> tuple[int, ...]:
        """Return the pack with the most tokens; the first one if there are several."""
        packs = (pack for step in range(self.steps) for pack in self.packs(step))
        return max(packs, key=lambda pack: sum(self._lengths[i] for i in pack))

    def _pack_epoch(self, epoch: int) -> tuple[tuple[tuple[int, ...], ...], float]:
        seed = int.from_bytes(hashlib.sha256(f"{self._train.seed}/{epoch}".encode()).digest()[:8])
        packing = pack(self._lengths, self._train.pack_budget, seed=seed, max_documents=self._max_documents)
        packs = list(packing.packs)
        random.Random(seed).shuffle(packs)  # noqa: S311 - reproducible order, nothing secret
        return tuple(packs), packing.waste
