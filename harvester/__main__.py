"""`python -m harvester` and the `harvester` script."""

import os

from harvester.cli import main

__all__ = ["main"]

# Arrow reads this when it is first loaded, which no command has done yet. Its other allocators keep what a
# sealing needed: 40 MiB of a process that lives for weeks (`system` is malloc, which gives most of it back).
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

if __name__ == "__main__":
    main()
