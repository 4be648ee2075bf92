"""Choose nested subsets of a corpus, and read what its rows cost. Loads no torch.

The order of the prompts is a pure function of their content and a seed. A subset holds the first prompts of
that order with all their answers, so each smaller subset is contained in every larger one, and a prompt's
answers are bought together, as a further harvest would.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from harvester.quality.held_out import prompt_key
from trainer.config import TrainConfig
from trainer.data import dataset, row_rules
from trainer.errors import ConfigError, DataError
from trainer.experiments.curve_config import CurveConfig
from trainer.experiments.power_law import FEWEST_SIZES

# Number of sizes where curve.toml names none: all rows, and each time half of them.
DEFAULT_SIZES = 6
_COLUMNS = ("key", "messages", "metadata_json", "purpose", "cost_microusd", "outcome")


@dataclass(frozen=True, slots=True)
class PaidRows:
    """Rows of the training split, whether they can be learned or not: all of them were paid for.

    Attributes:
        costs: cost of each row in millionths of a dollar, by key.
        keys_by_prompt: keys of the rows of a prompt, by the hash of its content.
    """

    costs: Mapping[str, int]
    keys_by_prompt: Mapping[str, tuple[str, ...]]

    @property
    def unpriced(self) -> int:
        """Number of rows without a cost."""
        return sum(cost <= 0 for cost in self.costs.values())

    @property
    def dollars_per_row(self) -> float | None:
        """Mean cost of a row; None if a row has none, as a mean over the others would be wrong."""
        if self.unpriced or not self.costs:
            return None
        return sum(self.costs.values()) / len(self.costs) / 1e6

    def dollars(self, keys: frozenset[str]) -> float | None:
        """Return what these rows cost; None if rows have no price."""
        return None if self.unpriced else sum(self.costs[key] for key in keys) / 1e6


def read_paid_rows(config: TrainConfig) -> PaidRows:
    """Read keys and costs of the training split, without prompts that are held out too.

    Rows that were asked otherwise than `[data] where` says, of another teacher, say, are no part of it:
    further rows are bought as those it chooses. A row that it leaves out for its outcome is.

    Raises:
        DataError: there is no corpus.
        StoreError, StoreCorrupt: a shard is missing or damaged.
    """
    dataset.require_folder(config)
    costs: dict[str, int] = {}
    keys: dict[str, dict[str, None]] = {}
    held_out: set[str] = set()
    for sample in dataset.paid_samples(config, _COLUMNS):
        prompt = prompt_key(sample.messages)
        if row_rules.split_of(sample, prompt, config.data) != "train":
            held_out.add(prompt)
            continue
        costs[sample.key] = sample.cost_microusd
        keys.setdefault(prompt, {})[sample.key] = None
    by_prompt = {prompt: tuple(sorted(of)) for prompt, of in keys.items() if prompt not in held_out}
    kept = {key for of in by_prompt.values() for key in of}
    return PaidRows({key: cost for key, cost in costs.items() if key in kept}, by_prompt)


@dataclass(frozen=True, slots=True)
class CurvePlan:
    """Hold what is trained, before torch is needed.

    Attributes:
        sizes: rows asked for, the smallest first.
        subsets: keys of the rows by seed and size.
    """

    config: CurveConfig
    train: TrainConfig
    folder: Path
    paid: PaidRows
    sizes: tuple[int, ...]
    seeds: tuple[int, ...]
    subsets: tuple[tuple[frozenset[str], ...], ...]


def plan_curve(config: CurveConfig, train: TrainConfig, folder: Path) -> CurvePlan:
    """Choose the subsets.

    Raises:
        ConfigError, DataError: the corpus has too few rows, or two sizes give the same subset.
    """
    paid = read_paid_rows(train)
    sizes = choose_sizes(config.rows, paid, str(train.corpus))
    seeds = config.seeds or (train.train.seed,)
    subsets = tuple(tuple(nested_subsets(paid, sizes, seed)) for seed in seeds)
    if any(len(set(map(len, of_seed))) < len(sizes) for of_seed in subsets):
        raise DataError(
            "two sizes give the same subset, because a prompt's answers stay together",
            place=str(train.corpus),
            remedy="name sizes that lie further apart",
        )
    return CurvePlan(config, train, folder, paid, sizes, seeds, subsets)


def choose_sizes(rows: Sequence[int] | None, paid: PaidRows, place: str) -> tuple[int, ...]:
    """Return the sizes of the subsets in rows, the smallest first.

    Raises:
        ConfigError: a size is larger than the corpus. DataError: the corpus is too small for a curve.
    """
    available = len(paid.costs)
    if rows is None:
        halves = {available >> power for power in range(DEFAULT_SIZES)} - {0}
        if len(halves) < FEWEST_SIZES:
            raise DataError(
                f"{available:,} rows are too few for a curve of {FEWEST_SIZES} sizes",
                place=place,
                remedy="harvest more",
            )
        return tuple(sorted(halves))
    if max(rows) > available:
        raise ConfigError(
            f"rows: a size is {max(rows):,}, but the training split has {available:,} rows",
            place=place,
            remedy="name smaller sizes, or harvest more",
        )
    return tuple(sorted(set(rows)))


def nested_subsets(paid: PaidRows, sizes: Sequence[int], seed: int) -> list[frozenset[str]]:
    """Return the keys of the rows of each subset: whole prompts, as many as give `size` rows at least.

    Args:
        sizes: rows of each subset, at most those of the corpus.
    """
    order = sorted(paid.keys_by_prompt, key=lambda prompt: _rank(prompt, seed))
    subsets = []
    for size in sizes:
        keys: list[str] = []
        for prompt in order:
            if len(keys) >= size:
                break
            keys += paid.keys_by_prompt[prompt]
        subsets.append(frozenset(keys))
    return subsets


def _rank(prompt: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed} {prompt}".encode()).digest()
