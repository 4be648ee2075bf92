"""Keep the temporary files of the tests in memory where there is enough of it."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

# A file system in memory on Linux. By default it may hold half of the machine's memory.
_MEMORY = Path("/dev/shm")

# All tests together write about 1 GiB; those of a test that passed are removed when it ends.
_NEEDED_BYTES = 4 << 30


def use_memory() -> None:
    """Choose a folder in memory for temporary files, unless `TMPDIR` names one or there is too little memory.

    The tests open some thousand stores, and each waits for the disk many times: half of a test process's
    time on a slow disk. What they prove does not depend on it: a killed process loses nothing that it wrote,
    and failing disks are simulated (`tests.harvester.faulty_disk`).
    """
    if "TMPDIR" not in os.environ and _MEMORY.is_dir() and shutil.disk_usage(_MEMORY).free >= _NEEDED_BYTES:
        os.environ["TMPDIR"] = str(_MEMORY)
        tempfile.tempdir = None  # it is read from the environment again
