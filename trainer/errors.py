"""Define the trainer's errors and their exit codes; the base classes are the harvester's.

HarvesterError                       message, place, remedy; knows its exit code
├── UsageError                   2
│   ├── ConfigError                  train.toml, a flag
│   ├── MissingPackage               a package of an extra is not installed
│   ├── DataError                    the corpus holds nothing to learn from, or to evaluate with
│   └── StudentError                 base folder, tokenizer or chat template can't be used
├── StoreError                   5
│   ├── StoreFull                    no room for a checkpoint or an adapter
│   └── CheckpointError              a checkpoint is damaged or not what was written
├── ResumeRefused                2   configuration or corpus changed since the checkpoint
├── StoreLocked                 75   another training holds the output folder
├── OutOfMemory                  1   a pack does not fit the device; checkpoints are untouched
├── TrainingDiverged             1   loss or gradient kept being NaN or infinite
├── ProcessLost                 75   another process of the training ended; the same command resumes
├── HarvestFailed                     a harvest or judge that was started ended early; has its exit code
├── CommandFailed                     a command that `trainer distil` started failed; has its exit code
├── FindingsError                1   `doctor` found something fatal
└── Interrupted            130/143   a signal; checkpointed; resumable
"""

from __future__ import annotations

from harvester.errors import (
    ConfigError,
    FindingsError,
    HarvesterError,
    Interrupted,
    MissingPackage,
    StoreError,
    StoreFull,
    StoreLocked,
    UsageError,
)

__all__ = [
    "CheckpointError",
    "CommandFailed",
    "ConfigError",
    "DataError",
    "FindingsError",
    "HarvestFailed",
    "HarvesterError",
    "Interrupted",
    "MissingPackage",
    "OutOfMemory",
    "ProcessLost",
    "ResumeRefused",
    "StoreError",
    "StoreFull",
    "StoreLocked",
    "StudentError",
    "TrainingDiverged",
    "UsageError",
]


class DataError(UsageError):
    """The corpus holds nothing to learn from, or nothing to evaluate with."""

    code = "data"


class StudentError(UsageError):
    """The base folder, its tokenizer or its chat template can't be used."""

    code = "student"


class CheckpointError(StoreError):
    """A checkpoint, or a file in it, is damaged or not what was written."""

    code = "checkpoint"


class ResumeRefused(UsageError):
    """Configuration or corpus changed since the checkpoint of an unfinished training."""

    code = "resume"


class TrainingDiverged(HarvesterError):
    """Loss or gradient was NaN or infinite several steps in a row."""

    code = "diverged"
    exit_code = 1


class OutOfMemory(HarvesterError):
    """A pack does not fit into the device's memory."""

    code = "memory"
    exit_code = 1


class HarvestFailed(HarvesterError):
    """A harvest that a command of the trainer started ended early."""

    code = "harvest"

    def __init__(
        self, exit_code: int, how_to_go_on: str = "the same command goes on", ending: str = "", why: str = ""
    ) -> None:
        """Name the ending of a harvest (`budget`, `parked`) and why it ended so, where they are known."""
        facts = ": ".join(each for each in (ending, why) if each)
        super().__init__(
            f"the harvest ended with exit code {exit_code}{f' ({facts})' if facts else ''}",
            remedy=how_to_go_on if facts else f"see the harvester's message above; {how_to_go_on}",
        )
        self.exit_code = exit_code


class CommandFailed(HarvesterError):
    """A command that `trainer distil` started failed."""

    code = "command"

    def __init__(self, command: str, exit_code: int) -> None:
        super().__init__(
            f"`{command}` ended with exit code {exit_code}", remedy="see its message above; then run it again"
        )
        self.exit_code = exit_code


class ProcessLost(HarvesterError):
    """Another process of the same training ended or was killed. The last checkpoint is good."""

    code = "lost"
    exit_code = 75
