"""Start `trainer train` in several processes on this machine, with torchrun: one process for each device."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from trainer.errors import ConfigError


def launch(config: Path, processes: int, *, allow_change: bool = False) -> int:
    """Run `trainer train CONFIG` in `processes` processes and wait for them.

    Returns:
        torchrun's exit code: 0 when all processes succeeded.

    Raises:
        ConfigError: fewer than two processes.
    """
    if processes < 2:
        raise ConfigError(
            "a launch needs at least two processes",
            place="--processes",
            remedy="leave the option out to train in one process",
        )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    flags = ["--json", *(["--allow-change"] if allow_change else [])]
    command = [*torchrun, f"--nproc-per-node={processes}", "-m", "trainer", "train", str(config), *flags]
    return subprocess.run(command, check=False).returncode
