"""Compare the fault catalogue in README.md with the tests that pytest collects, in both directions."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
CATALOGUE = HERE / "README.md"
FOLDERS = ("tests/trainer", "tests/journey")


@pytest.fixture(scope="module")
def collected() -> set[str]:
    """The tests below tests/trainer and in tests/journey, as `file::name` relative to tests/trainer."""
    done = subprocess.run(
        [
            sys.executable,
            *("-m", "pytest", "--collect-only", "-q", "-o", "addopts="),
            "tests/trainer",
            "tests/journey",
        ],
        capture_output=True,
        text=True,
        check=True,
        cwd=HERE.parent.parent,
    )
    ids = {line.split("[")[0] for line in done.stdout.splitlines() if "::" in line}
    return {each.replace("tests/", "../", 1).replace("../trainer/", "", 1) for each in ids}


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
