"""Compare the fault catalogue in README.md with the numbered tests, in both directions."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

from tests.faults.test_replies import ROWS
from tests.faults.test_shapes import REFUSALS, SHAPES

TESTS = Path(__file__).resolve().parents[1]
CATALOGUE = TESTS / "faults" / "README.md"
BY_SUBJECT = "*by subject:*"


def _test_names(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith("test_")]


def _numbered_tests() -> dict[int, set[str]]:
    """Return the test files for each number in a test's name or in the rows of the tables."""
    files: dict[int, set[str]] = defaultdict(set)
    for path in TESTS.rglob("test_*.py"):
        if path.is_relative_to(TESTS / "trainer"):  # the trainer has a list and numbers of its own
            continue
        for name in _test_names(path):
            if match := re.match(r"test_rows?_(\d+)(?:_and_(\d+))?_", name):
                for number in filter(None, match.groups()):
                    files[int(number)].add(str(path.relative_to(TESTS)))
    for row in ROWS:
        files[row.number].add("faults/test_replies.py")
    for shape in (*SHAPES, *REFUSALS):
        files[shape.number].add("faults/test_shapes.py")
    return files


def _catalogue() -> dict[int, tuple[bool, set[str]]]:
    """Return, for each row of the table, whether it is tested by subject, and the files it names."""
    rows: dict[int, tuple[bool, set[str]]] = {}
    for line in CATALOGUE.read_text(encoding="utf-8").splitlines():
        if re.match(r"\| \d+ \|", line):
            number, _, _, tests = (cell.strip() for cell in line.strip("|").split(" | "))
            assert int(number) not in rows, f"row {number} occurs twice"
            files = tests.removeprefix(BY_SUBJECT).split(",")
            rows[int(number)] = (tests.startswith(BY_SUBJECT), {file.strip() for file in files})
    return rows


def test_rows_are_numbered_without_a_gap():
    numbers = list(_catalogue())
    assert numbers == list(range(1, len(numbers) + 1))


def test_every_row_names_the_files_of_its_tests_and_every_numbered_test_has_a_row():
    listed = {number: files for number, (by_subject, files) in _catalogue().items() if not by_subject}
    assert listed == _numbered_tests()


def test_files_that_test_a_row_by_subject_hold_tests():
    for number, (by_subject, files) in _catalogue().items():
        for file in files if by_subject else ():
            assert _test_names(TESTS / file), f"row {number}: no test in {file}"
