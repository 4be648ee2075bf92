"""Test `harvester terms`: what its commands print and write; no flag overrides the gate."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from datetime import date, timedelta
from pathlib import Path

import pytest

from harvester.errors import ConfigError, TermsRefused
from harvester.terms import gate, manage
from harvester.terms.records import parse
from tests.harvester.terms.judging import judge

TODAY = date(2026, 11, 24)
SHIPPED = gate.load_registry()


def check(host: str, model: str, declared: str, **more: object) -> gate.Verdict:
    facts: dict[str, object] = {"use": "harvest", "purpose": "train", "today": TODAY, **more}
    return judge(SHIPPED, host=host, model=model, declared=declared, **facts)  # type: ignore[arg-type]


def test_list_names_every_record_with_its_standing():
    rows = manage.listed(SHIPPED, TODAY)
    assert {row["id"] for row in rows} == set(SHIPPED.records)
    text = "\n".join(manage.table(rows))
    for part in ("deepseek-api-2026-04-29", "third_party", "2026-08-22", "not legal advice"):
        assert part in text


def test_due_records_are_those_past_their_review():
    rows = {row["id"]: row["state"] for row in manage.listed(SHIPPED, date(2027, 3, 1), only_due=True)}
    assert rows["deepseek-api-2026-04-29"] == "due"
    assert rows["qwen-studio-2026-05-19"] == "expired"
    assert "llama-2" not in rows


def test_show_says_everything_and_marks_second_hand_readings():
    second_hand = "\n".join(manage.shown(SHIPPED, "tencent-hunyuan", TODAY))
    assert "second-hand" in second_hand
    assert "https://" in second_hand
    assert "second-hand reading" not in "\n".join(manage.shown(SHIPPED, "llama-2", TODAY))
    with pytest.raises(ConfigError, match=r"llama-3\.1"):
        manage.shown(SHIPPED, "llama-9", TODAY)


def test_check_prints_duties_conditions_wire_fields_and_reasons():
    routed = check("openrouter.ai", "openai/gpt-oss-120b", "gpt-oss-apache,host-deepinfra-2026-08")
    assert "enforce_distillable_text" in "\n".join(manage.checked(routed))
    llama = manage.checked(check("127.0.0.1", "llama3.1:8b", "llama-3.1"))
    assert any("name_prefix:Llama" in line for line in llama)
    assert any("700 million" in line for line in llama)
    refused = check("api.openai.com", "gpt-5", "")
    assert any("3.3(e)" in line for line in manage.checked(refused))
    assert json.loads(json.dumps(manage.as_json(refused), default=str))["permitted"] is False


@pytest.mark.parametrize("record", SHIPPED.records.values(), ids=lambda r: r.id)
def test_a_record_survives_its_own_toml(record: gate.TermsRecord):
    assert parse(manage.record_toml(record), "own") == (record,)


def test_a_review_renews_or_closes_and_overlays_the_shipped_record(tmp_path: Path):
    record = SHIPPED.records["deepseek-api-2026-04-29"]
    late = date(2027, 8, 1)
    question = {"host": "api.deepseek.com", "model": "deepseek-chat", "declared": "", "use": "harvest"}
    assert not judge(SHIPPED, **question, purpose="train", today=late).permitted
    manage.write_review(tmp_path, manage.reviewed(record, "unchanged", late, isatty=True))
    renewed = gate.load_registry(tmp_path)
    assert judge(renewed, **question, purpose="train", today=late).permitted
    assert renewed.records[record.id].review_after == late + timedelta(days=182)
    manage.write_review(tmp_path, manage.reviewed(record, "changed", late, isatty=True))
    closed = judge(gate.load_registry(tmp_path), **question, purpose="train", today=late)
    assert (closed.permitted, closed.status) == (False, "unknown")


def test_a_script_can_neither_review_nor_record(tmp_path: Path):
    with pytest.raises(TermsRefused, match="person"):
        manage.reviewed(SHIPPED.records["llama-2"], "unchanged", TODAY, isatty=False)
    with pytest.raises(TermsRefused, match="terminal"):
        manage.ask_permission(tmp_path, lambda question: pytest.fail(question), isatty=False)
    assert list(tmp_path.iterdir()) == []


ANSWERS = {
    "id": "order-17",
    "granted_by": "OpenAI",
    "basis": "order-form",
    "scope": "training on outputs",
    "host": "api.openai.com",
    "model": "gpt-5*",
    "uses": "harvest, train",
    "evidence": "order form 17",
    "granted_on": "2026-06-01",
    "expires": "",
    "recorded_by": "A. Operator",
}


def test_the_interview_writes_a_permission_the_gate_accepts(tmp_path: Path):
    answers = iter(ANSWERS[name] for name, _ in manage.QUESTIONS)
    manage.ask_permission(tmp_path, lambda _: next(answers), isatty=True)
    permissions = gate.load_permissions(tmp_path)
    assert permissions[0].uses == ("harvest", "train")
    assert check("api.openai.com", "gpt-5", "", permissions=permissions).permitted


@pytest.mark.parametrize(
    ("name", "answer"), [("granted_on", "soon"), ("expires", "never"), ("basis", "hope")]
)
def test_an_impossible_answer_writes_nothing(tmp_path: Path, name: str, answer: str):
    settings = {**ANSWERS, name: answer}
    answers = iter(settings[each] for each, _ in manage.QUESTIONS)
    with pytest.raises(ConfigError, match=name):
        manage.ask_permission(tmp_path, lambda _: next(answers), isatty=True)
    assert list(tmp_path.iterdir()) == []


FLAG = re.compile(
    r"--[a-z-]*(force|override|ignore-terms|skip-terms|no-terms|accept|allow|unsafe|yes)[a-z-]*"
)


@pytest.mark.parametrize("module", ["harvester.cli.main", "trainer.cli.main"])
def test_no_command_has_a_flag_that_overrides(module: str):
    walk = (
        "import importlib, typer, json\n"
        f"app = importlib.import_module('{module}').app\n"
        "def flags(command):\n"
        "    yield from (o for p in command.params for o in [*p.opts, *p.secondary_opts])\n"
        "    for sub in getattr(command, 'commands', {}).values():\n"
        "        yield from flags(sub)\n"
        "print(json.dumps(list(flags(typer.main.get_command(app)))))\n"
    )
    done = subprocess.run([sys.executable, "-c", walk], capture_output=True, text=True, check=True)
    flags = json.loads(done.stdout)
    assert "--json" in flags
    # About a resumed training's settings and about faults in the data; the terms are checked before both.
    about_others = ("allow-change", "force-faults")
    flags = [flag for flag in flags if not flag.endswith(about_others)]
    assert [flag for flag in flags if FLAG.match(flag)] == []
