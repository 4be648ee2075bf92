"""Publish a student to object storage or push it to the Hugging Face Hub, after a check of the terms.

What goes: the adapter (where all weights were trained, the model), or a folder of merged weights, as it is,
with its card, NOTICE and hash tree; to object storage also the scorecard and the pages beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from harvester.system.objects.folder import files_below, publish_files
from harvester.system.objects.hub import HubTarget, Pushed, push_files
from harvester.system.objects.publisher import Published, PublishOptions
from harvester.terms.lineage import Lineage
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.provenance import fingerprint, terms_check

# Beside the adapter: what the scorecard and the pages are called.
_REPORTS = ("scorecard.json", "*.html")


def publish_student(
    config: TrainConfig,
    url: str,
    merged: Path | None = None,
    options: PublishOptions | None = None,
    note: Callable[[str], None] = lambda _: None,
) -> Published:
    """Publish what was trained (or merged weights), scorecard and pages.

    Args:
        merged: folder that `trainer export` wrote; None: the adapter, or the model of a full fine-tuning.
        note: is called with a line for each file that was uploaded.

    Raises:
        TermsRefused: the terms of the teachers don't permit to export this student; nothing was sent.
        FindingsError: the folder was changed after it was written, or objects there are missing or changed.
        ConfigError: there is no student.
        UsageError, RemoteStoreError: see `harvester.system.objects.publisher`.
    """
    folder = checked_folder(config, merged)
    files = files_below(folder, f"{config.student_path.name if merged is None else 'merged'}/")
    for pattern in _REPORTS:
        files |= {path.name: path for path in sorted(config.out_path.glob(pattern)) if path.is_file()}
    return publish_files(config.name, files, url, options, note)


def push_student(
    config: TrainConfig, target: HubTarget, merged: Path | None = None, *, upload: bool
) -> Pushed:
    """Push what was trained (or merged weights) to a model repository.

    Args:
        upload: False only says what would be sent.

    Raises:
        TermsRefused, FindingsError, ConfigError: as `publish_student`. UsageError, RemoteStoreError: see
            `harvester.system.objects.hub`.
    """
    folder = checked_folder(config, merged)
    return push_files(target, files_below(folder), upload=upload, message="Push a student with its lineage")


def checked_folder(config: TrainConfig, merged: Path | None) -> Path:
    """Return the folder of the student once its files are intact and the terms of its rows permit it.

    Raises:
        TermsRefused, FindingsError, ConfigError: see `publish_student`.
    """
    folder = config.student_path if merged is None else merged
    if not folder.is_dir():
        raise ConfigError(
            "there is no student here",
            place=str(folder),
            remedy=f"`trainer train` writes the {config.student_path.name}, `trainer export` other weights",
        )
    fingerprint.require_intact(folder)
    tree, _ = fingerprint.read(folder)
    lineages = [Lineage(each) for each in tree["lineages"]]
    terms_check.require_permission(config, lineages, (), use="export")
    return folder
