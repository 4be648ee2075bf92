"""Compare the fault catalogue in README.md with the tests that are defined, in both directions."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CATALOGUE = HERE / "README.md"
JOURNEY = HERE.parent / "journey"


@pytest.fixture(scope="module")
def collected() -> set[str]:
    """The tests below tests/trainer and in tests/journey, as `file::name` relative to tests/trainer."""
    ids = set()
    for path in (*HERE.rglob("test_*.py"), *JOURNEY.glob("test_*.py")):
        place = path.relative_to(HERE) if path.is_relative_to(HERE) else f"../journey/{path.name}"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        ids |= {
            f"{place}::{node.name}"
            for node in tree.body
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
        }
    return ids


def table(columns: int) -> list[list[str]]:
    """The rows of the catalogue's tables with this number of columns, without their headings."""
    lines = CATALOGUE.read_text(encoding="utf-8").splitlines()
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("| ")
    ]
    return [row for row in rows if len(row) == columns and row[0] not in ("#", "thread")]


def named(cell: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", cell))


def test_rows_are_numbered_without_a_gap():
    assert [int(row[0]) for row in table(4)] == list(range(1, 37))


def test_each_row_lists_exactly_the_tests_with_its_number(collected):
    numbered: dict[int, set[str]] = defaultdict(set)
    for test in collected:
        if match := re.search(r"::test_((?:\d+_)+)", test):
            for number in match[1].strip("_").split("_"):
                numbered[int(number)].add(test)
    assert {int(row[0]): named(row[3]) for row in table(4)} == numbered


def test_each_reported_fault_has_a_collected_test(collected):
    rows = table(3)
    assert len(rows) == len({row[0] + row[1] for row in rows}) >= 30
    missing = {row[0]: named(row[2]) - collected for row in rows if not named(row[2]) <= collected}
    assert not missing
    assert all(named(row[2]) for row in rows)
