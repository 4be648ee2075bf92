"""Test recorded permissions: written by a person at a terminal, exact in scope, identified by hash."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.errors import ConfigError, TermsRefused
from harvester.terms import gate
from harvester.terms.permissions import Permission, as_toml, load_permissions, record_permission
from tests.harvester.terms.judging import judge

TODAY = date(2026, 11, 24)
SHIPPED = gate.load_registry()
GRANT = Permission(
    id="order-17",
    granted_by="OpenAI",
    basis="order-form",
    scope="training of internal models on outputs",
    host="api.openai.com",
    model="gpt-5*",
    evidence="contract folder, order form 17, clause 3",
    granted_on=date(2026, 6, 1),
    expires=date(2027, 5, 31),
    recorded_by="A. Operator",
)


def recorded(folder: Path, **more: Any) -> Permission:
    record_permission(folder, replace(GRANT, **more), isatty=True)
    return load_permissions(folder)[-1]


def ask(permission: Permission, **more: Any) -> gate.Verdict:
    facts: dict[str, Any] = {
        "host": "api.openai.com",
        "model": "gpt-5-mini",
        "declared": "",
        "use": "harvest",
        "purpose": "train",
        "today": TODAY,
        **more,
    }
    return judge(SHIPPED, permissions=[permission], **facts)


def test_a_permission_is_written_read_and_named_by_the_hash_of_its_bytes(tmp_path: Path):
    path = record_permission(tmp_path / "permissions", GRANT, isatty=True)
    (read,) = load_permissions(tmp_path / "permissions", tmp_path / "missing")
    assert read == replace(GRANT, sha256=hashlib.sha256(path.read_bytes()).hexdigest())


def test_without_a_terminal_nothing_is_recorded(tmp_path: Path):
    with pytest.raises(TermsRefused) as caught:
        record_permission(tmp_path / "permissions", GRANT, isatty=False)
    assert caught.value.exit_code == 77
    assert not (tmp_path / "permissions").exists()


def test_a_recorded_permission_is_never_overwritten(tmp_path: Path):
    path = record_permission(tmp_path, GRANT, isatty=True)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match="another id"):
        record_permission(tmp_path, replace(GRANT, scope="more"), isatty=True)
    assert path.read_bytes() == before


def test_it_lifts_the_restriction_and_its_hash_is_in_the_verdict(tmp_path: Path):
    permission = recorded(tmp_path)
    verdict = ask(permission)
    assert verdict.permitted
    assert verdict.permission_sha256 == permission.sha256
    assert verdict.status == "restrict"
    assert not judge(
        SHIPPED,
        host="api.openai.com",
        model="gpt-5-mini",
        declared="",
        use="harvest",
        purpose="train",
        today=TODAY,
    ).permitted


@pytest.mark.parametrize(
    "more",
    [
        {"model": "gpt-4"},
        {"host": "api.anthropic.com"},
        {"today": date(2026, 5, 31)},
        {"today": date(2027, 6, 1)},
        {"purpose": "eval", "use": "train"},
        {"purpose": "eval", "use": "export"},
    ],
)
def test_it_covers_its_host_model_days_and_never_rows_for_evaluation(tmp_path: Path, more: dict[str, Any]):
    assert not ask(recorded(tmp_path), **more).permitted


@pytest.mark.parametrize("use", ["harvest", "seal", "train", "export"])
def test_it_covers_the_uses_it_names(tmp_path: Path, use: str):
    assert ask(recorded(tmp_path, uses=("harvest", "seal")), use=use).permitted == (
        use in {"harvest", "seal"}
    )


@pytest.mark.parametrize(("basis", "kept"), [("stated-exception", True), ("contract", False)])
def test_a_grant_frees_from_the_restriction_and_a_stated_exception_keeps_its_bounds(
    tmp_path: Path, basis: str, kept: bool
):
    permission = recorded(tmp_path, basis=basis, host="127.0.0.1", model="minimax-m3")
    verdict = ask(permission, host="127.0.0.1", model="minimax-m3", declared="minimax-m3")
    assert verdict.permitted
    assert ("noncommercial" in verdict.duties) == kept
    assert "display:Built with MiniMax M3" in verdict.duties


def test_a_permission_is_not_named_where_none_was_needed(tmp_path: Path):
    permission = recorded(tmp_path, host="api.deepseek.com", model="*")
    assert ask(permission, host="api.deepseek.com").permission_sha256 == ""


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"granted_by": " "}, "granted_by"),
        ({"evidence": ""}, "evidence"),
        ({"basis": "because"}, "basis"),
        ({"host": "*"}, "exact"),
        ({"uses": ("harvest", "everything")}, "uses"),
        ({"uses": ()}, "uses"),
        ({"expires": date(2026, 1, 1)}, "dates"),
        ({"id": "../escape"}, "id"),
        ({"id": "Upper"}, "id"),
    ],
)
def test_an_incomplete_or_boundless_permission_is_refused(tmp_path: Path, more: dict[str, Any], message: str):
    with pytest.raises(ConfigError, match=message):
        record_permission(tmp_path, replace(GRANT, **more), isatty=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("order-17", "order-18"), "equal the file's name"),
        (('granted_by = "OpenAI"\n', ""), "granted_by"),
        (("granted_on = 2026-06-01", 'granted_on = "June"'), "dates"),
        (("recorded_by", "sha256 = 'x'\nrecorded_by"), "sha256"),
        (("recorded_by", "sealed_by"), "sealed_by"),
        (("granted_by", "granted_by ="), "read as a permission"),
    ],
)
def test_a_hand_made_file_is_held_to_the_same_rules(tmp_path: Path, change: tuple[str, str], message: str):
    (tmp_path / "order-17.toml").write_text(as_toml(GRANT).replace(*change))
    with pytest.raises(ConfigError, match=message):
        load_permissions(tmp_path)


@given(text=st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip))
def test_any_words_survive_the_file(tmp_path_factory: pytest.TempPathFactory, text: str):
    folder = tmp_path_factory.mktemp("p")
    assert recorded(folder, scope=text, evidence=text).scope == text
