"""Test verifiers: every kind passes and fails, and what can't be judged is named, never counted as wrong."""

from __future__ import annotations

import itertools
import math
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from harvester.errors import ConfigError
from harvester.quality.verifiers import comparisons, settings
from harvester.quality.verifiers.pass_rates import TaskTally, pass_at
from harvester.quality.verifiers.verifiers import AnswerVerdict, Candidate, Judgement, Reason, Verifiers

FUNCTIONS = """
import os, time

def even(answer, reference, metadata):
    print("a function may print")
    return int(answer) % 2 == metadata.get("rest", 0)

def slow(answer, reference, metadata):
    while True: pass

def large(answer, reference, metadata):
    return bool("x" * (1 << 40))

def dies(answer, reference, metadata):
    os._exit(1)

def raises(answer, reference, metadata):
    raise ValueError(answer)

def unsure(answer, reference, metadata):
    return 1
"""


NEEDS_A = {"type": "object", "required": ["a"]}


def verifiers(folder: Path, **tables: dict[str, Any]) -> Verifiers:
    section = {task: settings.VerifierSection.model_validate(table) for task, table in tables.items()}
    return Verifiers(section, folder)


def judged(folder: Path, table: dict[str, Any], text: str | None, reference: str | None = None) -> Judgement:
    return verifiers(folder, **{"*": table}).judge(Candidate(text, "ok", reference))


@pytest.mark.parametrize(
    ("table", "text", "reference", "reason"),
    [
        ({"kind": "exact"}, " 4\n", "4", Reason.CORRECT),
        ({"kind": "exact"}, "Four", "four", Reason.WRONG),
        ({"kind": "normalised"}, "«ＦＯＵＲ  days».", "four days", Reason.CORRECT),
        ({"kind": "normalised"}, "?!", "...", Reason.WRONG),
        ({"kind": "contains"}, "The capital of Ghana is **Accra**.", "Accra", Reason.CORRECT),
        ({"kind": "contains"}, "Accranians live there; it is Lagos", "Accra", Reason.WRONG),
        ({"kind": "contains"}, "it is 13.12, -12 or 12,345", "12", Reason.WRONG),
        ({"kind": "contains"}, "it is 12.", "12", Reason.CORRECT),
        ({"kind": "contains"}, "首都は東京です", "東京", Reason.CORRECT),
        ({"kind": "contains"}, "yes!", "!", Reason.BAD_REFERENCE),
        ({"kind": "numeric"}, "so it is 1,234.50 in all.", "1234.5", Reason.CORRECT),
        ({"kind": "numeric"}, "1235", "#### 1234", Reason.WRONG),
        ({"kind": "numeric"}, "no idea", "3", Reason.WRONG),
        ({"kind": "numeric"}, "3", "three", Reason.BAD_REFERENCE),
        ({"kind": "numeric", "tolerance": 0.01}, "3.14", "3.1415", Reason.CORRECT),
        ({"kind": "numeric", "relative": 0.01}, "99.1", "100", Reason.CORRECT),
        ({"kind": "numeric", "relative": 0.01}, "98.9", "100", Reason.WRONG),
        ({"kind": "choice"}, "A is wrong, so the answer is (B).", "B", Reason.CORRECT),
        ({"kind": "choice"}, "**Answer:** C", "C", Reason.CORRECT),
        ({"kind": "choice"}, "A cat sat", "A", Reason.WRONG),
        ({"kind": "choice"}, "E", "E", Reason.BAD_REFERENCE),
        ({"kind": "choice", "choices": "ABCDE"}, "E. none of them", "E", Reason.CORRECT),
        ({"kind": "exact"}, "4", None, Reason.NO_REFERENCE),
        ({"kind": "exact"}, None, "4", Reason.UNUSABLE),
        ({"kind": "regex", "pattern": r"^\d+$"}, "42", None, Reason.CORRECT),
        ({"kind": "regex", "pattern": r"^\d+$"}, "x", None, Reason.WRONG),
        ({"kind": "regex", "pattern": "(a+)+$", "timeout_s": 0.2}, "a" * 60 + "b", None, Reason.TOO_SLOW),
        ({"kind": "json_schema", "schema": NEEDS_A}, '{"a": 1}', None, Reason.CORRECT),
        ({"kind": "json_schema", "schema": NEEDS_A}, "{}", None, Reason.WRONG),
        ({"kind": "json_schema", "schema": {"type": "object"}}, "not JSON", None, Reason.WRONG),
    ],
)  # fmt: skip
def test_each_kind_says_what_it_found(
    tmp_path: Path, table: dict[str, Any], text: str | None, reference: str | None, reason: Reason
):
    assert judged(tmp_path, table, text, reference).reason == reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("even", Reason.CORRECT),
        ("slow", Reason.TOO_SLOW),
        ("large", Reason.TOO_LARGE),
        ("dies", Reason.TOO_LARGE),
        ("raises", Reason.RAISED),
        ("unsure", Reason.NOT_BOOLEAN),
    ],
)
def test_a_function_runs_in_a_process_of_its_own_and_may_fail_there(
    tmp_path: Path, name: str, reason: Reason
):
    (tmp_path / "my_checks.py").write_text(FUNCTIONS)
    table = {"kind": "python", "function": f"my_checks:{name}", "timeout_s": 0.3, "memory_mib": 512}
    chosen = verifiers(tmp_path, **{"*": table})
    chosen.require_functions()
    assert chosen.judge(Candidate("42", "ok")).reason == reason
    verdict = chosen.judge(Candidate("42", "ok")).verdict
    assert verdict == (AnswerVerdict.PASSED if name == "even" else AnswerVerdict.UNVERIFIABLE), (
        "also after a failure"
    )


CODE_TESTS = "assert twice(2) == 4"
FENCED = "Here it is:\n```python\ndef twice(x):\n    print('working')\n    return 2 * x\n```\nDone."


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (FENCED, None),
        ("def twice(x): return 3 * x", "AssertionError"),
        ("import os; os._exit(0)", "ended before its tests did"),
        ("while True: pass", "too slow"),
        ("x = ' ' * (1 << 31)", "MemoryError"),
        ("open('x', 'w').write('a' * (3 << 20))", "File too large"),
        ("import os; assert 'HOME' not in os.environ\nassert not os.listdir(), 2\ntwice = lambda x: 4", None),
    ],
)
def test_code_passes_if_its_tests_run_to_their_end(tmp_path: Path, text: str, problem: str | None):
    limit_s = 0.5 if problem == "too slow" else 30
    checks = verifiers(tmp_path, **{"*": {"kind": "code", "timeout_s": limit_s}})
    judgement = checks.judge(Candidate(text, "ok", metadata={"tests": CODE_TESTS}))
    assert judgement.reason == (Reason.CORRECT if problem is None else Reason.WRONG)
    assert (problem or "") in judgement.detail
    assert checks.judge(Candidate(text, "ok")).reason == Reason.NO_REFERENCE


def test_a_function_that_cannot_be_imported_is_an_error_before_anything_is_judged(tmp_path: Path):
    with pytest.raises(ConfigError, match="ModuleNotFoundError"):
        verifiers(tmp_path, sums={"kind": "python", "function": "nowhere:at_all"}).require_functions()


def test_the_task_decides_then_a_tag_then_the_star(tmp_path: Path):
    chosen = verifiers(tmp_path, sums={"kind": "numeric"}, short={"kind": "exact"})
    assert chosen.name_for(Candidate("", "ok", metadata={"task": "sums"}, tags=("short",))) == "sums"
    assert chosen.name_for(Candidate("", "ok", tags=("long", "short"))) == "short"
    assert chosen.judge(Candidate("4", "ok", "4")) == Judgement(Reason.NO_VERIFIER)
    assert verifiers(tmp_path, **{"*": {"kind": "exact"}}).name_for(Candidate("", "ok")) == "*"


@pytest.mark.parametrize(
    ("text", "line", "problem"),
    [
        ('[verify.sums]\nkind = "nearly"\n', 2, "kind"),
        ('[verify.sums]\nkind = "exact"\npattern = "x"\n', 1, "belongs to kind = 'regex'"),
        ('[verify.sums]\nkind = "regex"\n', 1, "needs 'pattern'"),
        ('[verify.sums]\nkind = "regex"\npattern = "("\n', 3, "no regular expression"),
        ('[verify.sums]\nkind = "json_schema"\nschema = {type = 3}\n', 3, "no JSON Schema"),
        ('[verify.sums]\nkind = "python"\nfunction = "rm -rf"\n', 3, "package.module:function"),
    ],
)
def test_a_wrong_table_is_refused_with_its_line(tmp_path: Path, text: str, line: int, problem: str):
    path = tmp_path / "any.toml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        settings.load(path)
    assert problem in error.value.message
    assert error.value.place.endswith(f":{line}")


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_draws_that_hold_a_passed_answer(n: int, data: st.DataObject):
    passed, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    draws = list(itertools.combinations(range(n), k))
    share = sum(any(index < passed for index in draw) for draw in draws) / len(draws)
    assert pass_at(k, n, passed) == pytest.approx(share)
    assert pass_at(k, n, passed) == pytest.approx(1 - math.comb(n - passed, k) / math.comb(n, k))


@pytest.mark.parametrize(("k", "n", "passed"), [(0, 1, 1), (2, 1, 1), (1, 1, 2)])
def test_pass_at_k_is_not_defined_beyond_the_answers(k: int, n: int, passed: int):
    with pytest.raises(ValueError, match="not defined"):
        pass_at(k, n, passed)


def test_unverifiable_answers_count_in_no_pass_rate():
    tally = TaskTally()
    for reason in (Reason.CORRECT, Reason.WRONG, Reason.TOO_SLOW):
        tally.add("p0", Judgement(reason))
    tally.add("p1", Judgement(Reason.NO_REFERENCE))
    facts = tally.facts()
    assert (facts["passed"], facts["failed"], facts["unverifiable"]) == (1, 1, 2)
    assert facts["pass_at"] == {"1": {"value": 0.5, "prompts": 1}, "2": {"value": 1.0, "prompts": 1}}


# Letters that folding or composition changes, and marks that compose with letters before them.
SHIFTING = st.sampled_from(
    "aIi\u0130\u1e9e\u0390\u1f9f\u1fac\ufb03\u03a9 .'\u0301\u0304\u0306\u0307\u0308\u033b\u0343\u0344\u0345"
)


@given(st.text(max_size=40) | st.text(SHIFTING, max_size=8))
@example("I\u0307\u033b")
@example("\u1f9f\u0304")
def test_normalising_twice_changes_nothing(text: str):
    once = comparisons.normalise(text)
    assert comparisons.normalise(once) == once
    assert unicodedata.is_normalized("NFKC", once)


@given(st.decimals(allow_nan=False, allow_infinity=False, places=3, min_value=-(10**9), max_value=10**9))
def test_the_last_number_of_a_sentence_is_found(number: Any):
    assert comparisons.last_number(f"12 apples cost {number:,} in all.") == number
