"""Hold what all parts of the batch transport share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from harvester.api.batches import BatchClient
from harvester.config.config import HarvestConfig
from harvester.config.teacher_section import BatchApiSection, PriceSection
from harvester.errors import HarvesterError
from harvester.run.endings import PassEnding
from harvester.run.in_flight import InFlight
from harvester.run.workers import Worker
from harvester.store.journal.writer import AsyncWriter
from harvester.system.clock import Clock
from harvester.teacher.budget import Budget
from harvester.teacher.retry import RetryBudget


@dataclass(frozen=True, slots=True)
class BatchContext:
    """The parts of a pass that batches need.

    Attributes:
        retries: bounds how many rows are asked again after replies without an answer.
        clock: governs polls and the age of batches.
        complain: notes an error that ends no run.
        finish_by: deadline of the run in Unix seconds, None for none.
        runs: numbers of the runs whose batches count for the budget of this run.
    """

    config: HarvestConfig
    client: BatchClient
    writer: AsyncWriter
    in_flight: InFlight
    worker: Worker
    ending: PassEnding
    budget: Budget
    retries: RetryBudget
    clock: Clock
    complain: Callable[[HarvesterError], None]
    finish_by: float | None
    runs: frozenset[int]

    @property
    def api(self) -> BatchApiSection:
        """Bounds and words of the provider."""
        return self.config.teacher.batch or BatchApiSection()

    @property
    def price(self) -> PriceSection | None:
        """The price in batches; None where no cost is known."""
        price = self.config.teacher.price
        return None if price is None else price.of_batches

    @property
    def endpoint(self) -> str:
        """Base URL of the provider: batches go to the first address."""
        return self.config.teacher.base_url
