"""Build the documentation: `python docs/build.py [OUT]`, default build/docs. Needs the extra `docs`, no network.

Three sources are put together in a folder of their own, which Sphinx reads: the pages in docs/, pages that
`generate.py` writes from the code, and documents of the repository (README.md, FORMAT.md and so on), which are
copied, so that nothing is said twice. A comment in a page takes in a section of a document:

    <!-- include: README.md, Stop and resume -->

Links between documents become links between pages. A link to a file without a page becomes its name. Every
warning of Sphinx is an error.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

# Document of the repository -> its page. README.md is taken in by sections, each on the page that includes it.
DOCUMENTS = {
    "ARCHITECTURE.md": "explanation/architecture.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "explanation/security.md",
    "benchmarks/README.md": "explanation/benchmarks.md",
    "benchmarks/quality/README.md": "explanation/quality.md",
    "data/FORMAT.md": "reference/store-format.md",
    "data/base/README.md": "reference/tiny-base.md",
    "data/skills/README.md": "reference/tiny-teachers.md",
    "data/teachers/README.md": "how-to/preset.md",
    "data/terms/README.md": "how-to/terms-record.md",
    "tests/faults/README.md": "reference/faults.md",
    "tests/trainer/README.md": "reference/training-faults.md",
    "harvester/CONFIG.md": "reference/curate-toml.md",
    "trainer/ARCHITECTURES.md": "reference/student-architectures.md",
    "trainer/CONFIG.md": "reference/trainer-toml.md",
}
INCLUDE = re.compile(r"^<!-- include: ([\w./-]+), (.+?) -->$", re.MULTILINE)
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s]+)\)")
_FENCE = re.compile(r"^(```+|~~~+).*?^\1\s*$", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(#+) (.+)$", re.MULTILINE)


def section(document: str, title: str) -> str:
    """Return the body of a section of a document, with its headings one level below a page's title.

    Raises:
        ValueError: there is no such section.
    """
    text = (ROOT / document).read_text(encoding="utf-8")
    headings = [match for match in _HEADING.finditer(text) if not _in_fence(text, match.start())]
    for number, match in enumerate(headings):
        if match[2].strip() == title:
            depth = len(match[1])
            ends = (h.start() for h in headings[number + 1 :] if len(h[1]) <= depth)
            return _shifted(text[match.end() : next(ends, len(text))].strip(), 1 - depth)
    raise ValueError(f"{document} has no section {title!r}")


def _in_fence(text: str, position: int) -> bool:
    return any(match.start() <= position < match.end() for match in _FENCE.finditer(text))


def _shifted(text: str, by: int) -> str:
    """Return text whose headings are `by` levels deeper."""
    fences = [match.span() for match in _FENCE.finditer(text)]

    def shift(match: re.Match[str]) -> str:
        if any(begin <= match.start() < end for begin, end in fences):
            return match[0]
        return f"{'#' * max(2, len(match[1]) + by)} {match[2]}"

    return _HEADING.sub(shift, text)


class Site:
    """The pages, and where the sections of README.md are, for links to them."""

    def __init__(self) -> None:
        sys.path.insert(0, str(DOCS))
        from generate import write_all  # type: ignore[import-not-found]

        self._written = {path.relative_to(DOCS).as_posix(): path for path in sorted(DOCS.rglob("*.md"))}
        self._generated: dict[str, str] = write_all()
        self._sections: dict[str, str] = {}
        for name, path in self._written.items():
            for match in INCLUDE.finditer(path.read_text(encoding="utf-8")):
                self._sections[_anchor(match[2])] = name

    def pages(self) -> dict[str, str]:
        """Return the text of every page by its name.

        Raises:
            ValueError: an included section or a document is missing.
        """
        pages = {}
        for name, path in self._written.items():
            text = self._linked(path.read_text(encoding="utf-8"), f"docs/{name}", name)
            pages[name] = INCLUDE.sub(lambda match, name=name: self._section(match, name), text)
        for name, text in self._generated.items():
            pages[name] = self._linked(text, f"docs/{name}", name)
        for document, name in DOCUMENTS.items():
            text = (ROOT / document).read_text(encoding="utf-8")
            pages[name] = self._linked(text, document, name)
        return pages

    def _section(self, match: re.Match[str], page: str) -> str:
        return self._linked(section(match[1], match[2]), match[1], page)

    def _linked(self, text: str, source: str, page: str) -> str:
        """Rewrite links that are relative to `source`, for the page."""
        fences = [match.span() for match in _FENCE.finditer(text)]

        def rewrite(match: re.Match[str]) -> str:
            if "://" in match[2] or any(begin <= match.start() < end for begin, end in fences):
                return match[0]
            file, _, anchor = match[2].partition("#")
            target = os.path.normpath(PurePosixPath(source).parent / file) if file else source
            found = self._page_of(target, anchor)
            if found is None:
                return match[1]
            place = os.path.relpath(found[0], PurePosixPath(page).parent) if found[0] != page else ""
            return f"[{match[1]}]({place}{f'#{found[1]}' if found[1] else ''})"

        return _LINK.sub(rewrite, text)

    def _page_of(self, target: str, anchor: str) -> tuple[str, str] | None:
        """Return page and anchor for a path in the repository, None if it has no page."""
        if target == "README.md":
            return (self._sections[anchor], "") if anchor in self._sections else ("index.md", "")
        if target in DOCUMENTS:
            return DOCUMENTS[target], anchor
        if target.startswith("docs/"):
            return target.removeprefix("docs/"), anchor
        return None


def _anchor(title: str) -> str:
    """Return the anchor of a heading as repository viewers make it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")


def build(out: Path, *, execute: bool = False) -> int:
    """Build the pages into `out`; return Sphinx's exit status, which is not 0 after a warning."""
    os.environ["DOCS_ROOT"] = str(ROOT)
    os.environ["DOCS_EXECUTE"] = "force" if execute else "off"
    from sphinx.cmd.build import build_main

    with tempfile.TemporaryDirectory(prefix="docs-") as name:
        source = Path(name) / "source"
        shutil.copytree(DOCS, source, ignore=shutil.ignore_patterns("*.md", "*.py", "__pycache__"))
        shutil.copy(DOCS / "conf.py", source)
        for page, text in Site().pages().items():
            path = source / page
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        options = [
            "--fail-on-warning",
            "--keep-going",
            "-q",
            "-b",
            "html",
            "-d",
            str(Path(name) / "doctrees"),
        ]
        return int(build_main([*options, str(source), str(out)]))


def main() -> int:
    """Read the command line and build."""
    parser = argparse.ArgumentParser(description="Build the documentation.")
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "build" / "docs")
    parser.add_argument("--execute", action="store_true", help="execute the notebooks and show their results")
    flags = parser.parse_args()
    status = build(flags.out, execute=flags.execute)
    if status == 0:
        print(f"the pages are in {flags.out}: open {flags.out / 'index.html'}")
    return status


if __name__ == "__main__":
    sys.exit(main())
