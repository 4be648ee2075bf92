"""Keep in the journal how far answers went beyond their reservation, so that the next run begins with it."""

from __future__ import annotations

import hashlib

from harvester.config.config import HarvestConfig
from harvester.store.journal.journal import Journal
from harvester.store.journal.meta_values import read_value, write_values
from harvester.store.journal.writer import AsyncWriter
from harvester.teacher.budget import Budget


class Overshoot:
    """Restores and saves `Budget.overshoot` of one teacher.

    It holds for one `[sampling]` and one price: less reasoning, or another price, is learned anew.
    """

    def __init__(self, writer: AsyncWriter, budget: Budget, config: HarvestConfig) -> None:
        self._writer = writer
        self._budget = budget
        price = config.teacher.price
        settings = config.sampling.model_dump_json() + ("" if price is None else price.model_dump_json())
        self._digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
        self._row_name = f"overshoot:{config.teacher.teacher_id}"
        self._saved = budget.overshoot

    async def restore(self) -> None:
        """Begin with what an earlier run learned."""
        saved = await self._writer.call(self._read)
        if saved.get("settings") == self._digest:
            self._budget.overshoot = self._saved = int(saved["tokens"]), int(saved["microusd"])

    async def save(self) -> None:
        """Write it if it grew."""
        tokens, microusd = self._budget.overshoot
        if (tokens, microusd) == self._saved:
            return
        self._saved = tokens, microusd
        note: dict[str, int | str] = {"settings": self._digest, "tokens": tokens, "microusd": microusd}
        await self._writer.call(lambda journal: self._write(journal, note))

    def _read(self, journal: Journal) -> dict[str, int | str]:
        with journal.reading() as connection:
            return read_value(connection, self._row_name) or {}

    def _write(self, journal: Journal, note: dict[str, int | str]) -> None:
        with journal.writing() as connection:
            write_values(connection, {self._row_name: note})
