"""Test the gate: the worst layer decides; unknown, expired, changed or absent records refuse."""

from __future__ import annotations

from datetime import date, timedelta
from itertools import product
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester import errors
from harvester.terms import gate
from harvester.terms.records import SEVERITY, Registry, TermsRecord
from tests.harvester.terms.judging import judge

TODAY = date(2026, 11, 24)
HOST = "api.example.com"


def record(name: str, **more: Any) -> TermsRecord:
    facts: dict[str, Any] = {
        "id": name,
        "layer": "weights",
        "host": ("*",),
        "model": ("model*",),
        "verdict": "permit",
        "gist": f"gist of {name}",
        "url": f"https://example.com/{name}",
        "licence": "Apache-2.0",
        "source": "the text",
        "seen": date(2026, 10, 1),
        "review_after": date(2027, 4, 1),
        "established": "primary",
        **more,
    }
    return TermsRecord(**facts)


def ask(*records: TermsRecord, **more: Any) -> gate.Verdict:
    facts: dict[str, Any] = {
        "host": HOST,
        "model": "model-1",
        "declared": "weights",
        "use": "harvest",
        "purpose": "train",
        "today": TODAY,
        **more,
    }
    return judge(Registry({r.id: r for r in records}), **facts)


SERVICE = record("service", layer="service", host=(HOST,), provider="example")


@pytest.mark.parametrize(("weights", "service"), list(product(SEVERITY, SEVERITY)))
def test_the_verdict_is_the_worst_of_the_layers(weights: str, service: str):
    verdict = ask(
        record("weights", verdict=weights), record("service", layer="service", host=(HOST,), verdict=service)
    )
    assert verdict.status == max(weights, service, key=SEVERITY.index)
    assert verdict.permitted == (verdict.status in {"permit", "duties"})


def test_duties_of_all_layers_are_united():
    verdict = ask(
        record("weights", verdict="duties", duties=("display:Built with X", "notice:N")),
        record(
            "service", layer="service", host=(HOST,), verdict="duties", duties=("notice:N", "noncommercial")
        ),
    )
    assert verdict.permitted
    assert verdict.duties == ("display:Built with X", "notice:N", "noncommercial")


def test_loopback_with_undeclared_weights_is_unknown():
    for host in ("127.0.0.1", "localhost", "::1"):
        verdict = ask(record("weights"), host=host, declared="")
        assert (verdict.permitted, verdict.status) == (False, "unknown")
        assert "weights of model-1 on this machine" in verdict.reasons[0]
    assert ask(record("weights"), host="127.0.0.1").permitted


def test_a_host_without_a_record_is_unknown():
    verdict = ask(record("weights"))
    assert (verdict.permitted, verdict.status) == (False, "unknown")
    assert HOST in verdict.reasons[0]


def test_a_restriction_counts_although_only_a_kinder_record_was_declared():
    verdict = ask(record("weights"), record("other", verdict="restrict"), host="127.0.0.1")
    assert not verdict.permitted
    assert set(verdict.record_ids) == {"weights", "other"}


@pytest.mark.parametrize(
    ("days", "permitted", "warned"), [(0, True, False), (1, True, True), (90, True, True), (91, False, True)]
)
def test_a_reading_warns_after_its_review_day_and_blocks_ninety_days_later(
    days: int, permitted: bool, warned: bool
):
    verdict = ask(record("weights", review_after=TODAY - timedelta(days=days)), host="127.0.0.1")
    assert (verdict.permitted, bool(verdict.warnings)) == (permitted, warned)
    assert verdict.status == ("permit" if permitted else "unknown")


def test_an_expired_reading_still_lets_paid_answers_be_sealed():
    old = record("weights", review_after=TODAY - timedelta(days=400))
    assert ask(old, host="127.0.0.1", use="seal").permitted
    for use in ("harvest", "train", "export"):
        assert not ask(old, host="127.0.0.1", use=use).permitted


def test_changed_terms_mean_no_until_read_again():
    verdict = ask(record("weights", changed=date(2026, 11, 1)), host="127.0.0.1")
    assert (verdict.permitted, verdict.status) == (False, "unknown")
    assert "changed on 2026-11-01" in verdict.reasons[0]


@pytest.mark.parametrize(
    ("declared", "message"),
    [("nobody", "there is no terms record 'nobody'"), ("elsewhere", "model* at other.example.com")],
)
def test_an_absent_or_foreign_record_means_no(declared: str, message: str):
    verdict = ask(record("elsewhere", host=("other.example.com",)), host="127.0.0.1", declared=declared)
    assert (verdict.permitted, verdict.status) == (False, "unknown")
    assert message in verdict.reasons[0]


def test_a_superseded_record_applies_to_old_rows_only():
    old, new = record("weights", superseded_by="newer"), record("newer", verdict="restrict")
    assert not ask(old, new, host="127.0.0.1").permitted
    assert ask(old, new, host="127.0.0.1", use="train").permitted


def test_the_mock_is_a_mock_on_loopback_only():
    shipped = gate.load_registry()
    facts: dict[str, Any] = {"declared": "mock-teacher", "use": "harvest", "purpose": "train", "today": TODAY}
    verdict = judge(shipped, host="127.0.0.1", model="mock-teacher-2", **facts)
    assert verdict.permitted
    assert verdict.mock
    for host, model in ((HOST, "mock-teacher"), ("127.0.0.1", "gpt-4"), ("localhost", "my-mock-teacher")):
        refused = judge(shipped, host=host, model=model, **facts)
        assert not refused.permitted
        assert not refused.mock


def test_a_service_that_covers_its_models_needs_no_record_of_weights():
    service = record("service", layer="service", host=(HOST,), covers_weights=True)
    assert ask(service, declared="").permitted


def test_a_router_needs_weights_and_host_and_gives_wire_fields():
    router = record("router", layer="router", host=("router.example",), verdict="duties")
    weights = record("weights")
    facts: dict[str, Any] = {"host": "router.example"}
    assert not ask(router, weights, SERVICE, **facts).permitted
    covering = record("service", layer="service", host=(HOST,), provider="example", covers_weights=True)
    assert not ask(router, weights, covering, **facts, declared="service").permitted
    verdict = ask(router, weights, SERVICE, **facts, declared="weights, service")
    assert verdict.permitted
    assert verdict.body == {
        "provider": {"enforce_distillable_text": True, "allow_fallbacks": False, "only": ["example"]}
    }
    assert ask(weights, SERVICE).body == {}


@pytest.mark.parametrize("use", ["harvest", "seal", "train", "export"])
def test_evaluation_may_harvest_where_training_is_restricted_and_nothing_else(use: str):
    weights = record("weights", verdict="restrict", evaluation=True)
    assert ask(weights, host="127.0.0.1", purpose="eval", use=use).permitted == (use in {"harvest", "seal"})
    assert not ask(weights, host="127.0.0.1", purpose="train", use=use).permitted


@pytest.mark.parametrize("use", ["train", "export"])
def test_rows_for_evaluation_are_never_trained_on_even_from_a_permitted_teacher(use: str):
    verdict = ask(record("weights"), host="127.0.0.1", purpose="eval", use=use)
    assert not verdict.permitted
    assert "evaluation" in verdict.reasons[0]


def test_evaluation_is_closed_where_one_layer_forbids_it_or_is_unknown():
    open_one = record("weights", verdict="restrict", evaluation=True)
    closed = record("service", layer="service", host=(HOST,), verdict="restrict")
    assert not ask(open_one, closed, purpose="eval").permitted
    assert not ask(open_one, purpose="eval").permitted


def test_weights_for_their_own_line_only():
    weights = record("weights", verdict="restrict", student_line="llama-2")
    assert not ask(weights, host="127.0.0.1").permitted
    verdict = ask(weights, host="127.0.0.1", student_base="meta-llama/Llama-2-7b-hf")
    assert verdict.permitted
    assert verdict.duties == ("same_line:llama-2",)
    assert not ask(weights, host="127.0.0.1", student_base="meta-llama/Llama-3.1-8B").permitted


def test_the_refusal_names_record_gist_address_day_and_remedies_and_exits_77():
    with pytest.raises(errors.TermsRefused) as caught:
        ask(record("weights", verdict="restrict", established="third_party"), host="127.0.0.1").require()
    text = str(caught.value)
    assert caught.value.exit_code == 77
    for part in ("weights", "gist of weights", "https://example.com/weights", "2026-10-01", "second-hand"):
        assert part in text
    for remedy in ("terms list", "terms record", 'purpose = "eval"'):
        assert remedy in text
    ask(record("weights"), host="127.0.0.1").require()


SEVERITIES = st.sampled_from(SEVERITY)


@st.composite
def layers(draw: st.DrawFn, name: str, kinds: tuple[str, ...] = ("weights",)) -> TermsRecord:
    return record(
        name,
        layer=draw(st.sampled_from(kinds)),
        host=draw(st.sampled_from([("*",), (HOST,), ("127.0.0.1",)])),
        verdict=draw(SEVERITIES),
        evaluation=draw(st.booleans()),
        review_after=TODAY + timedelta(days=draw(st.integers(-200, 200))),
        changed=draw(st.sampled_from([None, TODAY])),
        student_line=draw(st.sampled_from(["", "llama-2"])),
    )


@given(
    weights=layers("weights"),
    added=layers("added", ("weights", "service")),
    purpose=st.sampled_from(["train", "eval"]),
    use=st.sampled_from(["harvest", "seal", "train", "export"]),
    base=st.sampled_from(["", "meta-llama/Llama-2-7b-hf"]),
)
def test_a_further_layer_never_improves_the_verdict(
    weights: TermsRecord, added: TermsRecord, purpose: str, use: str, base: str
):
    facts: dict[str, Any] = {"host": "127.0.0.1", "purpose": purpose, "use": use, "student_base": base}
    few = ask(weights, **facts)
    for declared in ("weights", "weights,added"):
        more = ask(weights, added, **facts, declared=declared)
        assert SEVERITY.index(more.status) >= SEVERITY.index(few.status)
        assert few.permitted or not more.permitted
        assert set(few.duties) <= set(more.duties)
