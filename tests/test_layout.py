"""Check the layout: import contracts, package lists, class names, what `--help` loads, forbidden calls."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

from tests.tiers import rest_is_slow

ROOT = Path(__file__).resolve().parent.parent
TOP_PACKAGES = ("harvester", "trainer")
SOURCES = sorted(path for name in TOP_PACKAGES for path in (ROOT / name).rglob("*.py"))


def _packages() -> set[str]:
    """Return the dotted name of every package in the source tree."""
    result = {path.parent.relative_to(ROOT) for path in SOURCES if path.name == "__init__.py"}
    return {".".join(path.parts) for path in result}


@pytest.fixture
def source_copy(tmp_path: Path) -> Path:
    """Copy what `make layers` reads into a folder of its own."""
    for name in TOP_PACKAGES:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def _check_imports(folder: Path) -> tuple[int, dict[str, str]]:
    """Run `make layers` in `folder`; return its exit code and KEPT or BROKEN for each contract."""
    installed = folder / "installed"  # newer than pyproject.toml, so that make installs nothing
    installed.touch()
    command = ["make", "layers", f"BIN={Path(sys.executable).parent}", f"STAMP={installed}"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    lines = re.findall(r"^(.+) (KEPT|BROKEN)\b", done.stdout, flags=re.MULTILINE)
    assert lines, done.stdout + done.stderr
    return done.returncode, dict(lines)


def test_make_check_runs_the_import_check():
    command = ["make", "--dry-run", "--always-make", "check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "lint-imports" in done.stdout


def test_the_import_contracts_hold_in_a_copy(source_copy: Path):
    exit_code, contracts = _check_imports(source_copy)
    assert exit_code == 0
    assert set(contracts.values()) == {"KEPT"}


PLANTED = {
    "circle": (
        "harvester/store/journal/checksums.py",
        "import harvester.store.journal.journal",
        "no import circle, at any depth",
    ),
    "sibling": (
        "harvester/prompts/reader.py",
        "import harvester.teacher.retry",
        "harvester: imports go down",
    ),
    "sibling in the store": (
        "harvester/store/reuse.py",
        "import harvester.store.pauses",
        "harvester.store: imports go down",
    ),
    "module without a place": ("harvester/leftovers.py", "", "harvester: imports go down"),
    "trainer module without a place": ("trainer/leftovers.py", "", "trainer: imports go down"),
    "import upwards": (
        "trainer/model/forward/losses.py",
        "import trainer.training.train",
        "trainer: imports go down",
    ),
    "import that the trainer's allow list lacks": (
        "trainer/training/train.py",
        "import harvester.run.job",
        "trainer imports from harvester what this list allows, and nothing else",
    ),
    "trainer in the harvester": (
        "harvester/export/export.py",
        "import trainer.errors",
        "harvester imports neither the trainer nor its libraries",
    ),
}


@pytest.mark.parametrize(("path", "line", "contract"), rest_is_slow(PLANTED.values(), first=1), ids=PLANTED)
def test_the_import_check_finds_a_planted_fault(source_copy: Path, path: str, line: str, contract: str):
    with (source_copy / path).open("a", encoding="utf-8") as file:
        file.write(f"\n{line}\n")
    exit_code, contracts = _check_imports(source_copy)
    assert exit_code != 0
    assert contracts[contract] == "BROKEN"


def test_pyproject_lists_every_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = project["tool"]["setuptools"]["packages"]
    assert len(listed) == len(set(listed))
    assert set(listed) == _packages() | {"harvester_data", "harvester_prompts"}


def test_architecture_lists_every_package():
    """Compare the package list in ARCHITECTURE.md with the tree, in both directions, down to sub-packages."""
    text = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
    block = text.split("## Packages", 1)[1].split("```text\n", 1)[1].split("```", 1)[0]
    listed = set(re.findall(r"^((?:harvester|trainer)(?:/\w+)*)/(?=\s)", block, flags=re.MULTILINE))
    assert {name.replace("/", ".") for name in listed} == _packages()


@cache
def _nodes(package: str) -> list[tuple[Path, list[ast.AST]]]:
    """Return the syntax nodes of each source file of a package."""
    return [
        (path, list(ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
        for path in SOURCES
        if path.is_relative_to(ROOT / package)
    ]


@pytest.mark.parametrize("package", TOP_PACKAGES)
def test_no_class_name_is_defined_twice(package: str):
    places = defaultdict(list)
    for path, nodes in _nodes(package):
        for node in nodes:
            if isinstance(node, ast.ClassDef):
                places[node.name].append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert {name: where for name, where in places.items() if len(where) > 1} == {}


@pytest.mark.parametrize("program", ["harvester", "trainer"])
def test_help_loads_nothing_heavy(program: str):
    heavy = ("httpx", "openai", "pyarrow", "torch", "transformers", "pydantic")
    code = (
        f"import sys; sys.argv=['{program}','--help']\n"
        f"from {program}.cli.main import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        f"print([m for m in {heavy!r} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == "[]"
    assert "Usage" in done.stdout


def test_what_a_run_imports_before_its_first_request_loads_no_library_of_later_steps():
    later = ("pyarrow", "numpy", "pandas", "jsonschema", "openai")
    code = f"import sys, harvester.run.job; print([m for m in {later!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("entry", "command", "skipped"),
    rest_is_slow(
        [
            ("harvester.cli.main", "run", True),
            ("harvester.cli.main", "curate", False),
            ("trainer.cli.main", "train", True),
            ("trainer.cli.main", "evaluate", False),
        ],
        first=2,
    ),
)
def test_a_command_makes_pyarrow_and_httpx_import_no_package_that_it_does_not_use(
    entry: str, command: str, skipped: bool
):
    code = (
        f"import sys; sys.argv=['program', {command!r}, '--help']\n"
        f"from {entry} import main\n"
        "try: main()\nexcept SystemExit: pass\n"
        "import httpx, pyarrow; pyarrow.array([''])\n"
        "print([m for m in ('pandas', 'httpx._main') if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == ("[]" if skipped else "['pandas', 'httpx._main']")


FORBIDDEN_MODULES = {"pickle", "shelve", "marshal", "joblib", "dill", "cloudpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "__import__"}


def _is_forbidden(node: ast.AST) -> bool:
    if isinstance(node, ast.Import):
        return bool(FORBIDDEN_MODULES & {alias.name.split(".")[0] for alias in node.names})
    if isinstance(node, ast.ImportFrom):
        return node.module is not None and node.module.split(".")[0] in FORBIDDEN_MODULES
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS
    if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
        return not (isinstance(node.value, ast.Constant) and node.value.value is False)
    return False


@pytest.mark.parametrize("package", TOP_PACKAGES)
def test_no_pickle_no_eval_no_unsafe_loaders(package: str):
    places = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path, nodes in _nodes(package)
        for node in nodes
        if _is_forbidden(node)
    ]
    assert places == []


@pytest.mark.parametrize(
    "line",
    [
        "import json, pickle",
        "from joblib.externals import loky",
        "value = eval(text)",
        "load(path, trust_remote_code=True)",
        "load(path, trust_remote_code=chosen)",
    ],
)
def test_each_unsafe_loader_is_found(line: str):
    assert any(map(_is_forbidden, ast.walk(ast.parse(line))))


def test_what_the_trainer_imports_loads_no_network_stack():
    code = (
        "import sys, harvester.store.shards.schema, harvester.terms.gate, harvester.store.reader\n"
        "print([m for m in ('httpx','openai','tenacity','torch','aiohttp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
