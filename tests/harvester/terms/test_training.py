"""Test the checks before training and export: lineages are judged again, duties are united."""

from __future__ import annotations

import itertools
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.terms import gate
from harvester.terms.lineage import Lineage
from harvester.terms.obligations import DerivedModel, licence_of
from harvester.terms.permissions import Permission, load_permissions, record_permission
from tests.harvester.terms.judging import judge_training

TODAY = date(2026, 11, 24)
SHIPPED = gate.load_registry()


def lineage(model: str = "mock-teacher", terms_id: str = "mock-teacher", **more: Any) -> dict[str, Any]:
    return {
        "run_id": f"run {terms_id} {sorted(more.items())}",
        "teacher_id": f"http://127.0.0.1:8000/v1|{model}",
        "host": "127.0.0.1:8000",
        "model": model,
        "terms_id": terms_id,
        "permission_sha256": "",
        "purpose": "train",
        "mock": terms_id == "mock-teacher",
        "duties": [],
        **more,
    }


LLAMA_2 = lineage("meta-llama/Llama-2-7b-chat-hf", "llama-2")
LLAMA_3 = lineage("meta-llama/Meta-Llama-3-8B-Instruct", "llama-3")
LLAMA_31 = lineage("meta-llama/Llama-3.1-8B-Instruct", "llama-3.1")
GEMMA_3 = lineage("google/gemma-3-4b-it", "gemma-1-to-3")
QWEN = lineage("Qwen/Qwen3.8-27B", "qwen3.8-27b-apache")
QWEN_72B = lineage("Qwen/Qwen2.5-72B-Instruct", "qwen-licence-2024")
MINIMAX = lineage("MiniMaxAI/MiniMax-M3", "minimax-m3")


def ask(*lineages: dict[str, Any], **more: Any) -> gate.Verdict:
    facts: dict[str, Any] = {
        "registry": SHIPPED,
        "today": TODAY,
        **more,
    }
    student = DerivedModel(
        base=facts.pop("student_base", "Qwen/Qwen3-0.6B"),
        name=facts.pop("student_name", "my-student"),
        licence=facts.pop("student_licence", None),
    )
    return judge_training([Lineage(each) for each in lineages], student=student, **facts)


def test_mock_and_permissive_rows_are_learned_from_and_mock_is_named():
    assert ask(lineage()).permitted
    assert ask(lineage()).mock
    assert ask(QWEN).permitted
    assert not ask(QWEN).mock
    assert ask(QWEN, lineage()).mock


@pytest.mark.parametrize("absent", ["terms_id", "host", "model", "purpose"])
def test_rows_without_lineage_are_refused(absent: str):
    for broken in (lineage(**{absent: ""}), {k: v for k, v in lineage().items() if k != absent}):
        verdict = ask(QWEN, broken)
        assert not verdict.permitted
        assert absent in verdict.reasons[0]
    assert not ask().permitted
    assert not ask({}).permitted


def test_one_eval_lineage_refuses_the_whole():
    assert not ask(QWEN, lineage(purpose="eval")).permitted
    assert not ask(QWEN, lineage(purpose="anything")).permitted


@pytest.mark.parametrize(
    ("rows", "base", "permitted"),
    [
        (LLAMA_2, "meta-llama/Llama-2-7b-hf", True),
        (LLAMA_2, "/models/llama-2-13b-chat", True),
        (LLAMA_2, "meta-llama/Meta-Llama-3-8B", False),
        (LLAMA_2, "Qwen/Qwen3-0.6B", False),
        (LLAMA_2, "TinyLlama/TinyLlama-1.1B", False),
        (LLAMA_3, "meta-llama/Meta-Llama-3-8B", True),
        (LLAMA_3, "meta-llama/Llama-3.1-8B", False),
        (LLAMA_3, "meta-llama/Llama-3.2-1B", False),
        (LLAMA_3, "meta-llama/Llama-2-7b-hf", False),
    ],
)
def test_llama_2_and_3_teach_their_own_line_only(rows: dict[str, Any], base: str, permitted: bool):
    assert ask(rows, student_base=base).permitted == permitted


@pytest.mark.parametrize(
    ("name", "permitted"),
    [
        ("Llama-tiny", True),
        ("me/Llama-tiny", True),
        ("tiny-Llama", False),
        ("llama-tiny", False),
        ("", False),
    ],
)
def test_llama_3_1_asks_for_the_name(name: str, permitted: bool):
    verdict = ask(LLAMA_31, student_name=name)
    assert verdict.permitted == permitted
    assert "display:Built with Llama" in verdict.duties


@pytest.mark.parametrize(("licence", "permitted"), [(None, True), ("gemma", True), ("apache-2.0", False)])
def test_gemma_asks_for_its_licence_and_notice(licence: str | None, permitted: bool):
    verdict = ask(GEMMA_3, student_licence=licence)
    assert verdict.permitted == permitted
    assert any(duty.startswith("notice:Gemma is provided under") for duty in verdict.duties)
    assert licence_of(verdict.duties) == "gemma"


def research(folder: Path, **more: Any) -> Permission:
    facts: dict[str, Any] = {
        "id": "research",
        "granted_by": "the licence",
        "basis": "stated-exception",
        "scope": "non-commercial research",
        "host": "127.0.0.1",
        "model": "*",
        "evidence": "LICENSE of the weights",
        "granted_on": date(2026, 1, 1),
        "recorded_by": "A. Operator",
        **more,
    }
    record_permission(folder, Permission(**facts), isatty=True)
    return load_permissions(folder)[0]


@pytest.mark.parametrize(
    ("licence", "permitted"),
    [(None, True), ("cc-by-nc-4.0", True), ("CC-BY-NC-SA-4.0", True), ("apache-2.0", False), ("mit", False)],
)
def test_non_commercial_answers_block_a_permissive_licence(
    tmp_path: Path, licence: str | None, permitted: bool
):
    permission = research(tmp_path)
    rows = {**MINIMAX, "permission_sha256": permission.sha256}
    verdict = ask(rows, permissions=[permission], student_licence=licence)
    assert verdict.permitted == permitted
    assert verdict.permission_sha256 == permission.sha256
    assert licence_of(verdict.duties) == "cc-by-nc-4.0"


def test_rows_that_lean_on_a_permission_need_that_very_file(tmp_path: Path):
    permission = research(tmp_path / "one")
    other = research(tmp_path / "two", scope="another grant")
    rows = {**MINIMAX, "permission_sha256": permission.sha256}
    assert ask(rows, permissions=[permission]).permitted
    assert not ask(rows, permissions=[other]).permitted
    assert not ask(rows).permitted
    assert any("rely on permission" in reason for reason in ask(rows).reasons)
    assert not ask(MINIMAX, permissions=[permission]).permitted
    short = research(tmp_path / "three", uses=("harvest", "seal"))
    assert not ask({**MINIMAX, "permission_sha256": short.sha256}, permissions=[short]).permitted


def test_duties_written_on_the_day_stay_owed_when_the_registry_forgets_them():
    verdict = ask({**QWEN, "duties": ["name_prefix:Llama"]})
    assert not verdict.permitted
    assert not ask({**QWEN, "duties": ["a duty of the future:x"]}).permitted


def test_export_has_a_check_of_its_own():
    assert ask(QWEN, use="export").permitted
    assert not ask(LLAMA_31, use="export").permitted
    assert not ask(lineage(purpose="eval"), use="export").permitted


POOL = (QWEN, QWEN_72B, LLAMA_31, LLAMA_2, GEMMA_3, MINIMAX, lineage(), lineage(purpose="eval"), {})


@given(
    few=st.lists(st.sampled_from(POOL), min_size=1, max_size=3),
    more=st.sampled_from(POOL),
    name=st.sampled_from(["Llama-x", "x"]),
    licence=st.sampled_from([None, "gemma", "cc-by-nc-4.0", "apache-2.0"]),
)
def test_further_rows_never_free_a_student(
    few: list[Any], more: dict[str, Any], name: str, licence: str | None
):
    facts: dict[str, Any] = {"student_name": name, "student_licence": licence}
    before, after = ask(*few, **facts), ask(*few, more, **facts)
    assert before.permitted or not after.permitted
    assert set(before.duties) <= set(after.duties)
    assert set(before.record_ids) <= set(after.record_ids)


@given(st.lists(st.sampled_from(POOL), min_size=1, max_size=4))
def test_the_order_of_rows_is_of_no_account(rows: list[Any]):
    verdicts = {ask(*order).permitted for order in itertools.islice(itertools.permutations(rows), 6)}
    assert len(verdicts) == 1
