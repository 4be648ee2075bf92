"""Check what can be checked in the documents: paths, modules, columns, commands."""

from __future__ import annotations

import re
from pathlib import Path

import pyarrow as pa
import pytest
import typer.main

from harvester.cli import main
from harvester.store.shards.schema import COLUMNS
from trainer.cli import main as cli

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "AGENTS.md")


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_path_in_a_document_exists(name: str):
    text = (ROOT / name).read_text(encoding="utf-8")
    in_code = re.findall(r"`((?:harvester|trainer|tests|benchmarks|data|prompts)/[\w./-]+)`", text)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    paths = [path for path in (*in_code, *links) if not path.startswith("data/demo") and "NAME" not in path]
    assert paths
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_every_module_named_in_architecture_exists():
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    names = re.findall(r"`((?:\w+\.)+\w+)`", text)
    modules = [n for n in names if not n.endswith((".md", ".toml", ".json", ".jsonl", ".py"))]
    assert len(modules) > 30
    missing = []
    for name in modules:
        path = Path(*name.split("."))
        places = [ROOT / path, ROOT / "harvester" / path]
        if not any(place.is_dir() or place.with_suffix(".py").is_file() for place in places):
            missing.append(name)
    assert missing == []


def test_format_md_describes_every_column():
    """Compare names and nullability in the order of the schema, and types that have a simple name."""
    text = (ROOT / "data" / "FORMAT.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \| (yes|no) \|", text, flags=re.MULTILINE)
    described = [(name, nullable == "yes") for name, _, nullable in rows]
    assert described == [(name, nullable) for name, _, nullable, _ in COLUMNS]
    for (name, written, _), (_, kind, _, _) in zip(rows, COLUMNS, strict=True):
        if pa.types.is_primitive(kind) and not pa.types.is_temporal(kind):
            assert written.strip() in {str(kind), str(kind).replace("double", "float64")}, name


def test_the_readme_shows_commands_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    apps = {"harvester": typer.main.get_command(main.app), "trainer": typer.main.get_command(cli.app)}
    shown = re.findall(r"(?:^\$ |`)(harvester|trainer) ([a-z][a-z-]*)", text, flags=re.MULTILINE)
    assert len(shown) > 15
    assert [(p, verb) for p, verb in shown if verb not in getattr(apps[p], "commands", {})] == []
