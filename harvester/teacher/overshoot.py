"""Keep in the journal how far answers went beyond their reservation, so that the next run begins with it."""

from __future__ import annotations

import hashlib

import orjson

from harvester.config.config import HarvestConfig
from harvester.store.journal.checksums import updating_checksum
from harvester.store.journal.journal import Journal
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
        note = {"settings": self._digest, "tokens": tokens, "microusd": microusd}
        text = orjson.dumps(note).decode()
        await self._writer.call(lambda journal: self._write(journal, text))

    def _read(self, journal: Journal) -> dict[str, int | str]:
        with journal.reading() as connection:
            row = connection.execute("SELECT value FROM meta WHERE name = ?", (self._row_name,)).fetchone()
        saved: dict[str, int | str] = orjson.loads(row[0]) if row else {}
        return saved

    def _write(self, journal: Journal, text: str) -> None:
        with journal.writing() as connection, updating_checksum(connection, "meta"):
            connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (self._row_name, text))
