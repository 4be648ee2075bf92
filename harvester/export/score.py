"""Judge the answers of a store by its verifiers, and sum up pass rates by task."""

from __future__ import annotations

from pathlib import Path

from harvester.api.types import OF_TEXTS
from harvester.quality.verifiers.pass_rates import TaskTally
from harvester.quality.verifiers.verifiers import Candidate, Verifiers
from harvester.store.reader import Corpus
from harvester.store.shards.schema import Sample

# Columns that a verifier looks at, and those that tell answers apart.
COLUMNS = (
    *("key", "prompt_id", "sample_index"),
    *("completion", "outcome", "reference", "tags", "metadata_json"),
)
# Name of the group of prompts without a task.
NO_TASK = "(none)"


def candidate_of(sample: Sample) -> Candidate:
    """Return what a verifier needs of a row."""
    return Candidate(sample.completion, sample.outcome, sample.reference, tuple(sample.tags), sample.metadata)


def score(store: Path, verifiers: Verifiers, *, first: int | None = None) -> dict[str, TaskTally]:
    """Judge every answer, in bounded memory but for two counts a prompt.

    Args:
        first: only answers with a sample number below this one; None for all.

    Returns:
        the verdicts by the task that a prompt's metadata names.

    Raises:
        ConfigError: a function of a verifier can't be imported.
        StoreError: the store can't be read.
    """
    verifiers.require_functions()
    tasks: dict[str, TaskTally] = {}
    for sample in Corpus.open(store).samples(COLUMNS):
        if first is not None and sample.sample_index >= first:
            continue
        if sample.outcome in OF_TEXTS:
            continue
        candidate = candidate_of(sample)
        tally = tasks.setdefault(candidate.task or NO_TASK, TaskTally())
        tally.add(sample.prompt_id, verifiers.judge(candidate))
    return tasks
