"""Hold the keys and values of the rows in work in tensors that are kept from step to step.

Every row ends at the same column: a step writes one column and copies nothing else. Rows of different length
begin at different columns; what is before a row's beginning is masked. A transformers model sees the columns
in use through `Cache`, so nothing here depends on its architecture beyond plain attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache
from transformers.cache_utils import DynamicLayer

# Columns that new tensors have beyond those in use; as many steps run before the rows are copied again.
SPARE_COLUMNS = 64

Layers = Sequence[tuple[torch.Tensor, torch.Tensor]]


class RowCache:
    """The rows' keys and values: for each layer a pair of tensors (rows, heads, columns, size).

    Attributes:
        starts: the first column of each row.
        end: the column after the last, the same for all rows.
    """

    def __init__(self) -> None:
        self.starts: list[int] = []
        self.end = 0
        self._layers: list[tuple[torch.Tensor, torch.Tensor]] = []

    @property
    def start(self) -> int:
        """Return the first column that any row uses."""
        return min(self.starts, default=self.end)

    def add(self, layers: Layers, sources: Sequence[int], lengths: Sequence[int]) -> None:
        """Append rows: row i copies row `sources[i]` of `layers`, and uses its last `lengths[i]` columns."""
        count, more, width = len(self.starts), len(sources), layers[0][0].size(2)
        if not count:
            self.end = width
        self._fit(count + more, max(width, self.end - self.start), 0, layers)
        index: Any = (
            slice(None) if list(sources) == list(range(layers[0][0].size(0))) else torch.tensor(sources)
        )
        for mine, other in zip(self._layers, layers, strict=True):
            for tensor, added in zip(mine, other, strict=True):
                tensor[count : count + more, :, self.end - width : self.end] = added[index]
        self.starts += [self.end - length for length in lengths]

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Keep these rows only; return them in their new order. Rows from the end move into the gaps."""
        size = len(rows)
        kept = set(rows)
        gaps = [row for row in range(size) if row not in kept]
        moved = [row for row in rows if row >= size]
        order = list(range(size))
        for gap, row in zip(gaps, moved, strict=True):
            order[gap] = row
        used = slice(self.start, self.end)
        if moved:
            for layer in self._layers:
                for tensor in layer:
                    tensor[gaps, :, used] = tensor[moved, :, used]
        self.starts = [self.starts[row] for row in order]
        return order

    def extend(self) -> tuple[Cache, torch.Tensor, torch.Tensor]:
        """Add a column for one token a row; return the cache for its forward pass, mask and positions."""
        self._fit(len(self.starts), self.end - self.start, 1, self._layers)
        start, rows = self.start, len(self.starts)
        self.end += 1
        starts = torch.tensor(self.starts)[:, None]
        mask = (torch.arange(start, self.end) >= starts).long()
        views = [[tensor[:rows, :, start : self.end] for tensor in layer] for layer in self._layers]
        return (
            Cache(layers=[_LastColumn(keys, values) for keys, values in views]),
            mask,
            self.end - 1 - starts,
        )

    def _fit(self, rows: int, width: int, more: int, shapes: Layers) -> None:
        """Make room for `rows` rows with `width` columns before `end` and `more` after it."""
        if self._layers:
            tensor = self._layers[0][0]
            if rows <= tensor.size(0) and width <= self.end and self.end + more <= tensor.size(2):
                return
        used, count = self.end - self.start, len(self.starts)
        height = max(1 << (rows - 1).bit_length(), self._layers[0][0].size(0) if self._layers else 0)
        layers = []
        for number, pair in enumerate(shapes):
            fresh = [
                part.new_zeros(height, part.size(1), width + SPARE_COLUMNS, part.size(3)) for part in pair
            ]
            if count:
                for new, old in zip(fresh, self._layers[number], strict=True):
                    new[:count, :, width - used : width] = old[:count, :, self.end - used : self.end]
            layers.append((fresh[0], fresh[1]))
        self._layers = layers
        self.starts = [begin + width - self.end for begin in self.starts]
        self.end = width


class _LastColumn(DynamicLayer):  # type: ignore[misc]
    """A layer of the columns in use, of which a forward pass writes the last."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the last column and return all."""
        self.keys[:, :, -1:] = key_states
        self.values[:, :, -1:] = value_states
        return self.keys, self.values

    def get_seq_length(self) -> int:
        """Return the columns before the last."""
        return int(self.keys.size(2)) - 1
