"""Name the folders that a training writes in `[out] path`, and refuse what lies in their place."""

from __future__ import annotations

from trainer.config import TrainConfig
from trainer.errors import ConfigError

CHECKPOINTS = "checkpoints"


def require_folders(config: TrainConfig) -> None:
    """Refuse what lies in the place of the folders that a training writes, before any work is done.

    Checkpoints may lie behind a symbolic link. The student may not: a finished folder replaces it.

    Raises:
        ConfigError: names the first.
    """
    student, checkpoints = config.student_path, config.out_path / CHECKPOINTS
    for path in (student, checkpoints):
        is_link = path.is_symlink() and (path == student or not path.exists())
        if is_link or (path.exists() and not path.is_dir()):
            raise ConfigError(
                f"{'a symbolic link' if is_link else 'a file'} lies where the training writes a folder",
                place=str(path),
                remedy="move it away, or set another [out] path",
            )
