"""torchrun around `trainer train`: one process a device, rank r of world n."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from trainer.errors import ConfigError


def launch(config: Path, processes: int, *, allow_change: bool = False) -> int:
    """Run `trainer train CONFIG` in `processes` processes on this machine; returns the exit code.

    Raises:
        ConfigError: fewer than two processes.
    """
    if processes < 2:
        raise ConfigError("a fleet has at least two processes", place="--processes", remedy="leave it out")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    flags = ["--json", *(["--allow-change"] if allow_change else [])]
    done = subprocess.run([*command, "-m", "trainer", "train", str(config), *flags], check=False)
    return done.returncode
