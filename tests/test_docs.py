"""Build the pages, and check what a build can't: coverage of the code, assets, texts for coding agents."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import typing
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pydantic import BaseModel

from harvester.config.config import HarvestConfig
from trainer.reference import descriptions

ROOT = Path(__file__).resolve().parent.parent


def models(annotation: typing.Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
        for field in annotation.model_fields.values():
            yield from models(field.annotation)
    for inner in typing.get_args(annotation):
        yield from models(inner)


def test_every_key_of_harvest_toml_is_described():
    """By the `Attributes:` of its class, from which the page is made; tables have docstrings of their own."""
    missing = [
        f"{section.__name__}.{name}"
        for section in dict.fromkeys(models(HarvestConfig))
        for name, field in section.model_fields.items()
        if name not in descriptions(section) and not list(models(field.annotation))
    ]
    assert missing == []


class Page(HTMLParser):
    """Collects ids, links and what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.ids.add(values["id"])
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        elif tag in ("script", "img", "iframe", "source") and "src" in values:
            self.loads.append(values["src"])
        elif tag == "link" and values.get("rel") not in ("index", "search", "next", "prev", "canonical"):
            self.loads.append(values.get("href", ""))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages, built as by `make docs`: a warning, such as a broken link or anchor, is an error."""
    out = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "build.py", out], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_the_pages_hold_together(site: Path):
    pages = {path: Page() for path in site.rglob("*.html")}
    assert len(pages) > 45
    for path, page in pages.items():
        page.feed(path.read_text(encoding="utf-8"))
    for path, page in pages.items():
        assert [address for address in page.loads if "//" in address or address.startswith("data:")] == []
        for file in filter(None, (address.partition("?")[0] for address in page.loads)):
            assert (path.parent / file).is_file(), f"{path.name} loads {file}"
        for link in page.links:
            file, _, anchor = link.partition("#")
            if "//" in link or link.startswith("mailto:") or file.endswith((".ipynb", ".txt")):
                continue
            target = (path.parent / file).resolve() if file else path
            assert target.exists(), f"{path.name}: {link}"
            if anchor and target in pages:
                assert anchor in pages[target].ids, f"{path.name}: {link}"
    styles = " ".join(path.read_text(encoding="utf-8") for path in site.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import )['\"]?(?:https?:)?//", styles) == []


@pytest.mark.slow
def test_the_reference_names_what_the_code_has(site: Path):
    text = (site / "reference" / "harvest-toml.html").read_text(encoding="utf-8")
    for section in dict.fromkeys(models(HarvestConfig)):
        for name, field in section.model_fields.items():
            assert (field.alias or name) in text
    api = (site / "reference" / "python.html").read_text(encoding="utf-8")
    assert all(f"harvester.{name}" in api for name in ("harvest", "open", "plan", "curate", "Samples"))


@pytest.mark.parametrize("name", ["AGENTS.md", "llms.txt"])
def test_a_text_for_agents_names_files_that_exist(name: str):
    text = (ROOT / name).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    paths = re.findall(r"`((?:harvester|trainer|tests|docs|data|prompts|benchmarks)/[\w./-]*)`", text)
    assert len(links) + len(paths) > 5
    assert [path for path in (*links, *paths) if not (ROOT / path).exists()] == []


def test_targets_that_the_text_for_agents_names_exist():
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.findall(r"make ([a-z-]+)", text)
    assert len(named) > 3
    assert [target for target in named if not re.search(rf"^{target}:", makefile, re.MULTILINE)] == []
