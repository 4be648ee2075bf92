"""Count the rows of a plan, and sum up their tokens and cost."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from harvester.api.request_builder import cost_microusd
from harvester.api.types import Request
from harvester.config.config import HarvestConfig
from harvester.config.teacher_section import PriceSection

# The lower end of the cost range assumes answers of a tenth of max_tokens. The upper end can't be exceeded.
SHORT_ANSWER_SHARE = 0.1

# Arrow's types of the columns of `PlanRows`, by type code of their array.
_ARROW_TYPES = {"Q": "uint64", "q": "int64", "b": "int8"}


@dataclass(frozen=True, slots=True)
class PlanTotals:
    """Sums over the rows of a plan; tokens and micro-USD are those of the requests that would be sent.

    `saved_tokens` are the prompt tokens that requests for several rows send once.
    """

    rows: int
    cached: int
    in_batches: int
    duplicates: int
    requests: int
    saved_tokens: int
    input_tokens: int
    max_output_tokens: int
    low_microusd: int
    high_microusd: int

    @property
    def to_send(self) -> int:
        """Rows that would be asked."""
        return self.rows - self.cached - self.in_batches - self.duplicates


class PlanRows:
    """The rows of a plan as columns of numbers: 57 bytes a row to send, whatever its text.

    Equal requests are found at the end, by 64-bit digests of their keys.
    """

    def __init__(self) -> None:
        self._rows = self._cached = self._in_batches = 0
        self._columns = {
            "key": array("Q"),
            "requests": array("q"),
            "saved": array("q"),
            "input": array("q"),
            "output": array("q"),
            "low": array("q"),
            "high": array("q"),
            "skipped": array("b"),
        }

    def add_held(self) -> None:
        """Count one row whose answer the store holds."""
        self._rows += 1
        self._cached += 1

    def add_waiting(self) -> None:
        """Count one row that waits in a batch."""
        self._rows += 1
        self._in_batches += 1

    def add(
        self, request: Request, config: HarvestConfig, *, is_joined: bool, is_skipped: bool = False
    ) -> None:
        """Count one row to send, or to skip. `is_joined`: its prompt is paid with the row before it."""
        self._rows += not is_skipped
        input_tokens = 0 if is_joined else request.input_tokens
        values = (
            int.from_bytes(request.key[:8], "little"),
            0 if is_joined else 1,
            request.input_tokens - input_tokens,
            input_tokens,
            request.output_tokens,
            _low_microusd(input_tokens, request.output_tokens, config.teacher.price),
            cost_microusd(config.teacher.price, input_tokens, request.output_tokens),
            is_skipped,
        )
        for column, value in zip(self._columns.values(), values, strict=True):
            column.append(value)

    def totals(self) -> tuple[PlanTotals, PlanTotals]:
        """Sum up the rows that are asked, and those that skipping saves. Of equal requests one is sent."""
        import pyarrow as pa
        import pyarrow.compute as pc

        arrays = [
            pa.Array.from_buffers(
                pa.type_for_alias(_ARROW_TYPES[column.typecode]),
                len(column),
                [None, pa.py_buffer(column)],
            )
            for column in self._columns.values()
        ]
        table = pa.table(arrays, names=list(self._columns))
        unique = table.group_by("key").aggregate([(name, "min") for name in self._columns if name != "key"])
        totals = []
        for skipped in (0, 1):  # a request that is also made for a prompt that is asked saves nothing
            chosen = unique.filter(pc.equal(unique["skipped_min"], skipped))
            sums = {
                name: pc.sum(chosen[f"{name}_min"]).as_py() or 0
                for name in self._columns
                if name not in {"key", "skipped"}
            }
            to_send = chosen.num_rows
            asked = to_send if skipped else pc.sum(pc.equal(table["skipped"], 0)).as_py() or 0
            totals.append(
                PlanTotals(
                    rows=to_send if skipped else self._rows,
                    cached=0 if skipped else self._cached,
                    in_batches=0 if skipped else self._in_batches,
                    duplicates=asked - to_send,
                    requests=sums["requests"],
                    saved_tokens=sums["saved"],
                    input_tokens=sums["input"],
                    max_output_tokens=sums["output"],
                    low_microusd=sums["low"],
                    high_microusd=sums["high"],
                )
            )
        return totals[0], totals[1]


def _low_microusd(input_tokens: int, output_tokens: int, price: PriceSection | None) -> int:
    """Return the cost of a request with a short answer; prices are USD per million tokens."""
    if price is None:
        return 0
    return round(input_tokens * price.input + output_tokens * SHORT_ANSWER_SHARE * price.output)
