"""Check what `--help` and the shared modules load, and that forbidden calls are absent."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted([*ROOT.glob("harvester/**/*.py"), *ROOT.glob("trainer/**/*.py")])


@pytest.mark.parametrize("program", ["harvester", "trainer"])
def test_help_loads_nothing_heavy(program: str):
    entry = {"harvester": "cli.main", "trainer": "cli"}[program]
    heavy = ("httpx", "openai", "pyarrow", "torch", "transformers", "pydantic")
    code = (
        f"import sys; sys.argv=['{program}','--help']\n"
        f"from {program}.{entry} import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "Usage" in done.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_pickle_no_eval_no_unsafe_loaders(path: Path):
    forbidden_modules = {"pickle", "shelve", "marshal", "joblib", "dill", "cloudpickle"}
    forbidden_calls = {"eval", "exec", "__import__"}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not forbidden_modules & {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.module.split(".")[0] not in forbidden_modules
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in forbidden_calls
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            assert isinstance(node.value, ast.Constant)
            assert node.value.value is False


def test_the_three_shared_rooms_load_without_the_network_stack():
    code = (
        "import sys, harvester.store.shards.schema, harvester.terms.gate, harvester.store.reader\n"
        "print([m for m in ('httpx','openai','tenacity','torch','aiohttp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
