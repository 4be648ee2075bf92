"""Build the wheel, install it into environments of their own, and use the commands there, without a network.

The environments are empty but for the wheel. What it requires is linked from the environment of the tests:
for `base` the distributions of an installation without extras and nothing else, so that torch is missing.
"""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
import typer.main

from harvester.cli import main
from tests.test_release_files import ROOT, base_requirements
from trainer.cli import main as cli

pytestmark = pytest.mark.slow

SOURCES = ("harvester", "trainer", "data", "prompts")
NOT_SOURCES = shutil.ignore_patterns("__pycache__", "demo", "*.egg-info")
# Verbs of the trainer that need nothing of the extra `train`.
WITHOUT_TORCH = {"init", "trace", "config", "publish", "push", "schedule"}


class Environment:
    """A virtual environment with the wheel."""

    def __init__(self, folder: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        self.bin = folder / "bin"
        scheme = {"base": str(folder), "platbase": str(folder)}
        self.packages = Path(sysconfig.get_path("purelib", "venv", vars=scheme))

    def install(self, wheel: Path) -> None:
        """Install the wheel as pip does, with its scripts, and nothing that it requires."""
        install = ["-m", "pip", "--python", self.bin / "python", "install", "--no-deps", "--no-index", wheel]
        subprocess.run(
            [sys.executable, *install, "--quiet", "--no-compile", "--disable-pip-version-check"], check=True
        )

    def run(self, *command: str, cwd: Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """Run a script of the environment in `cwd`; nothing of the checkout can be imported there."""
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"COLUMNS": "200", "PYTHONNOUSERSITE": "1"}
        program, *arguments = command
        return subprocess.run(
            [self.bin / program, *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for name in SOURCES:
        shutil.copytree(ROOT / name, source / name, ignore=NOT_SOURCES)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    build = ["-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", out, "."]
    subprocess.run([sys.executable, *build, "--quiet", "--disable-pip-version-check"], cwd=source, check=True)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def base(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel, and links to what an installation without extras has."""
    environment = Environment(tmp_path_factory.mktemp("base") / "venv")
    environment.install(wheel)
    for name in base_requirements():
        found = distribution(name)
        tops = {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}
        for top in tops:
            link = environment.packages / top
            if not link.exists():  # namespace packages are shared
                link.symlink_to(Path(str(found.locate_file(top))))
    return environment


@pytest.fixture(scope="module")
def full(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    """The wheel, and every package of the environment of the tests."""
    environment = Environment(tmp_path_factory.mktemp("full") / "venv")
    environment.install(wheel)
    surrounding = [path for path in (*site.getsitepackages(), *sys.path) if path.endswith("-packages")]
    (environment.packages / "surrounding.pth").write_text("\n".join(dict.fromkeys(surrounding)))
    return environment


@pytest.fixture
def teacher(base: Environment, tmp_path: Path) -> Iterator[int]:
    """Start `harvester mock-teacher` of the wheel; yield its port."""
    command = [base.bin / "harvester", "mock-teacher", "--port", "0", "--json"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(json.loads(process.stdout.readline())["base_url"].split(":")[2].split("/")[0])
        finally:
            process.terminate()


def test_a_harvest_runs_from_the_wheel_without_extras(base: Environment, teacher: int, tmp_path: Path):
    where = base.run("python", "-c", "import harvester; print(harvester.__file__)", cwd=tmp_path)
    assert where.stdout.startswith(str(base.packages))
    assert base.run("harvester", "init", "my-run", cwd=tmp_path).returncode == 0
    settings = tmp_path / "my-run" / "harvest.toml"
    settings.write_text(settings.read_text().replace(":8000/", f":{teacher}/"))
    ran = base.run("harvester", "run", "my-run/harvest.toml", "--json", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    assert json.loads(ran.stdout.splitlines()[-1])["answers_stored"] == 3
    for verb in ("verify", "status", "report", "metrics"):
        done = base.run("harvester", verb, "my-run/store", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    batch = base.run("harvester", "run", "my-run/harvest.toml", "--transport", "batch", cwd=tmp_path)
    assert (batch.returncode, "[batch]" in batch.stderr) == (2, True)
    student = base.run("trainer", "init", "my-student", cwd=tmp_path)
    assert student.returncode == 0
    assert (tmp_path / "my-student" / "base" / "model.safetensors").is_file()


def test_a_command_without_torch_names_the_extra(base: Environment, tmp_path: Path):
    done = base.run("trainer", "train", "train.toml", cwd=tmp_path)
    assert done.returncode == 2
    assert "pip install 'blackbox-distillation[train]'" in done.stderr
    assert len(done.stderr.splitlines()) == 2


def _verbs() -> list[tuple[str, ...]]:
    found = []
    for program, app in (("harvester", main.app), ("trainer", cli.app)):
        for name, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
            inner = getattr(command, "commands", {})
            found += [(program, name, verb) for verb in inner] or [(program, name)]
    return found


@pytest.mark.long
@pytest.mark.parametrize("verb", _verbs(), ids=" ".join)
def test_every_command_without_extras_works_or_says_what_it_lacks(
    base: Environment, verb: tuple[str, ...], tmp_path: Path
):
    shown = base.run(*verb, "--help", cwd=tmp_path)
    assert shown.returncode == 0, shown.stderr
    known = tmp_path / "train.toml"
    known.write_text('[student]\nbase = "base"\n[data]\ncorpus = "store"\n')
    needs_two = {"export", "merge", "set", "import", "fetch", "publish", "push"}
    words = ["train.toml", *(["out", "third"] if verb[-1] == "merge" else ["out"])]
    done = base.run(*verb, *(words if verb[-1] in needs_two else words[:1]), cwd=tmp_path)
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 1, 2, 5, 77)
    names_extra = "pip install 'blackbox-distillation[train]'" in done.stderr
    needs_torch = (verb[0] == "trainer" and verb[1] not in WITHOUT_TORCH) or verb[-1] == "demo"
    assert names_extra == needs_torch, done.stderr
    assert done.returncode == 2 or not needs_torch


@pytest.mark.long
def test_the_demo_runs_from_the_wheel(full: Environment, tmp_path: Path):
    done = full.run("harvester", "demo", "--json", cwd=tmp_path, timeout=900)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert (result["requests_sent"], result["answers_stored"]) == (5300, 5300)
    card = json.loads((tmp_path / "distillation-demo" / "scorecard.json").read_text())
    assert card["macro"]["student"]["accuracy"] > 0.8
    again = full.run("harvester", "demo", "--json", cwd=tmp_path, timeout=900)
    assert json.loads(again.stdout.splitlines()[-1])["requests_sent"] == 0
