"""What can go wrong on the way to a student, drawn once; the root and the exit codes are the harvester's.

HarvesterError                       message, place, remedy; knows its exit code
├── UsageError                   2
│   ├── ConfigError                  train.toml, a flag
│   ├── DataError                    the corpus holds nothing to learn from, or to judge with
│   └── StudentError                 base folder, tokenizer or chat template can't be used
├── StoreError                   5
│   ├── StoreFull                    no room for a checkpoint or an adapter
│   └── CheckpointError              a checkpoint isn't what was written
├── ResumeRefused                2   configuration or corpus changed under a half-done training
├── StoreLocked                 75   another training holds the output folder
├── OutOfMemory                  1   a pack does not fit the device; checkpoints are untouched
├── TrainingDiverged             1   loss or gradient kept being NaN or infinite
├── FindingsError                1   `doctor` found something fatal
└── Interrupted            130/143   a signal; checkpointed; resumable
"""

from __future__ import annotations

from harvester.errors import (
    ConfigError,
    FindingsError,
    HarvesterError,
    Interrupted,
    StoreError,
    StoreFull,
    StoreLocked,
    UsageError,
)

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FindingsError",
    "HarvesterError",
    "Interrupted",
    "OutOfMemory",
    "ResumeRefused",
    "StoreError",
    "StoreFull",
    "StoreLocked",
    "StudentError",
    "TrainingDiverged",
    "UsageError",
]


class DataError(UsageError):
    """The corpus holds nothing to learn from, or nothing to judge with."""

    code = "data"


class StudentError(UsageError):
    """The base folder, its tokenizer or its chat template can't be used."""

    code = "student"


class CheckpointError(StoreError):
    """A checkpoint, or a file in it, is not what was written."""

    code = "checkpoint"


class ResumeRefused(UsageError):
    """Configuration or corpus changed under a training that is half done."""

    code = "resume"


class TrainingDiverged(HarvesterError):
    """Loss or gradient was NaN or infinite several steps in a row."""

    code = "diverged"
    exit_code = 1


class OutOfMemory(HarvesterError):
    """A pack does not fit into the device's memory."""

    code = "memory"
    exit_code = 1
