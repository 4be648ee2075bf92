"""The README's tree equals the listing: `make check` runs this, and so does a test.

The tree is the README's fenced block that follows the line `<!-- tree -->`: a folder ends in `/`, what lies
in it is indented by two spaces, a caption follows after two or more spaces. Listed: everything at the top,
and the direct children of harvester, trainer, prompts, data, benchmarks and tests.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPENED = ("harvester", "trainer", "prompts", "data", "benchmarks", "tests")
UNLISTED = {"__init__.py", "py.typed", "__main__.py", ".gitkeep"}


def tracked() -> list[Path]:
    """Files git tracks or would add."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(line) for line in out.splitlines() if (ROOT / line).exists()]


def listing(files: list[Path]) -> set[str]:
    """What the tree has to name."""
    found: set[str] = set()
    for path in files:
        top, *rest = path.parts
        found.add(f"{top}/" if rest else top)
        if top in OPENED and rest and rest[0] not in UNLISTED:
            found.add(f"{top}/{rest[0]}/" if len(rest) > 1 else f"{top}/{rest[0]}")
    return found


def tree(readme: str) -> set[str]:
    """What the README's tree names."""
    block = readme.split("<!-- tree -->", 1)[1].split("```", 2)[1]
    named: set[str] = set()
    folder = ""
    for line in block.splitlines()[1:]:
        if not line.strip():
            continue
        name = line.split()[0]
        if not line.startswith(" "):
            folder = name if name.endswith("/") else ""
            named.add(name)
        else:
            named.add(folder + name)
    return named


def differences() -> list[str]:
    """One line for each name that only one side has."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    told, real = tree(readme), listing(tracked())
    return [f"README names what is not there: {name}" for name in sorted(told - real)] + [
        f"README does not name: {name}" for name in sorted(real - told)
    ]


if __name__ == "__main__":
    found = differences()
    for line in found:
        print(line, file=sys.stderr)
    sys.exit(1 if found else 0)
