"""Check what a training needs before its first step, for `trainer plan` and `trainer doctor` too.

`trainer train` refuses the same in the same words, some of it only when the student is loaded.
"""

from __future__ import annotations

import torch

from trainer.config import TrainConfig
from trainer.data.chat_template import Renderer
from trainer.data.dataset import Rows
from trainer.data.tokens.stored_rows import StoredRows
from trainer.model import loading, model, rotary
from trainer.publish.adapter import require_storable
from trainer.training import fsdp, samples, trackers, validation
from trainer.training.output_folders import require_folders
from trainer.training.student import require_one_pass


def check_settings(config: TrainConfig) -> None:
    """Check what needs neither corpus nor student.

    Raises:
        MissingPackage: a tracker is not installed. ConfigError: something lies in the place of an output
            folder, or the device is absent.
    """
    trackers.require_installed(config)
    require_folders(config)
    model.select_device(config.train)


def check_rows(config: TrainConfig, rows: Rows | StoredRows, renderer: Renderer) -> None:
    """Check that there are held-out rows for what is to be looked at during the training.

    Raises:
        DataError: there are none.
    """
    if config.evaluate.sample_interval(1):
        samples.require_prompts(rows)
    if config.evaluate.interval(1):
        validation.held_out_examples(config, rows, renderer)


def check_storable(config: TrainConfig) -> None:
    """Check that the files of a base can hold it when all of its weights are trained.

    Raises:
        StudentError: they can't.
    """
    if config.is_full:
        with torch.device("meta"):
            require_storable(model.add_adapter(loading.load_shapes(config.base), config), config)


def check_sharding(config: TrainConfig) -> None:
    """Check that the base can be split over processes.

    Raises:
        ConfigError: rows may need several passes. StudentError: its layers can't be found.
    """
    base = loading.load_shapes(config.base)
    require_one_pass(config, rotary.border_of(base))
    fsdp.require_layers(base)
