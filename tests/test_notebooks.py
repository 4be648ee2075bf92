"""Execute the notebooks of docs/ as a reader would, and check that none was committed with results."""

from __future__ import annotations

import re
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).resolve().parent.parent / "docs" / "notebooks").glob("*.ipynb"))
# What a notebook prints if it did what it says.
PRINTED = {
    "harvest": ["40 to send", "(40, 40)", "of 40 answers equal the reference", "outcome"],
    "train": ["(460, 0)", "rows kept", "400 examples", "student", "teacher"],
}


def execute(path: Path, folder: Path, **changed: tuple[str, str]) -> str:
    """Run all cells in a folder, with lines of the code changed; return what they show."""
    notebook = nbformat.read(path, as_version=4)
    for old, new in changed.values():
        assert sum(old in cell.source for cell in notebook.cells) == 1
        for cell in notebook.cells:
            cell.source = cell.source.replace(old, new)
    nbclient.NotebookClient(notebook, timeout=500, resources={"metadata": {"path": str(folder)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "\n".join(
        str(output.get("text") or output.get("data", {}).get("text/plain")) for output in outputs
    )


@pytest.fixture(autouse=True)
def _threads_that_sleep(monkeypatch: pytest.MonkeyPatch):
    """A kernel's threads wait without using the cores, which tests share."""
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path):
    changed = {"epochs": ("epochs = 6\n", "epochs = 1\n")} if path.stem == "train" else {}
    shown = execute(path, tmp_path, **changed)
    assert [text for text in PRINTED[path.stem] if text not in shown] == [], shown


@pytest.mark.long
def test_the_student_of_the_notebook_learns(tmp_path: Path):
    (path,) = (path for path in NOTEBOOKS if path.stem == "train")
    found = re.search(r"student +([0-9.]+)%", execute(path, tmp_path))
    assert found is not None
    assert float(found[1]) > 70


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_holds_no_results(path: Path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert all(not cell.get("outputs") for cell in notebook.cells)
    assert path.stem in PRINTED
