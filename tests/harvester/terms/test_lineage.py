"""Test corpora that were tampered with or mixed: every check refuses their rows and says why."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.errors import StoreCorrupt, StoreFormatError, TermsRefused
from harvester.export import curate, export
from harvester.store.reader import Corpus
from harvester.store.shards.schema import LINEAGE_KEY, SCHEMA, Sample, to_table, with_added_columns
from harvester.terms.lineage import FACT_COLUMNS, REPEATED_COLUMNS, Lineage, disagreements
from trainer import config
from trainer.data import dataset

LINEAGE: Mapping[str, Any] = {
    "run_id": "run-1",
    "teacher_id": "http://127.0.0.1:1/v1|mock-teacher",
    "host": "127.0.0.1:1",
    "model": "mock-teacher",
    "terms_id": "mock-teacher",
    "permission_sha256": "",
    "purpose": "train",
    "mock": True,
    "duties": [],
}
EVAL = {**LINEAGE, "run_id": "run-2", "purpose": "eval"}
OPENAI = {
    **LINEAGE,
    "run_id": "run-2",
    "teacher_id": "https://api.openai.com/v1|gpt-5",
    "host": "api.openai.com",
    "model": "gpt-5",
    "terms_id": "openai-api-2026-01-01",
    "mock": False,
}


def rows(lineage: Mapping[str, Any], count: int = 3, **changes: Any) -> list[Sample]:
    same = {name: lineage[name] for name in ("run_id", *REPEATED_COLUMNS)}
    samples = [
        Sample(
            key=f"{hash(lineage['run_id']) % 997:032x}{number:032x}",
            prompt_id=f"p{number}",
            messages=[{"role": "user", "content": f"{number}?"}],
            completion=f"answer {number}",
            outcome="ok",
            finish_reason="stop",
            request_model=lineage["model"],
            response_model=lineage["model"],
            metadata_json='{"split": "train"}',
            **same,
        )
        for number in range(count)
    ]
    return [*samples[:-1], replace(samples[-1], **changes)]


def write(folder: Path, name: str, table: pa.Table, lineages: Sequence[Mapping[str, Any]] | bytes) -> None:
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    lineage_json = lineages if isinstance(lineages, bytes) else json.dumps(list(lineages)).encode()
    metadata = {**SCHEMA.metadata} | ({LINEAGE_KEY: lineage_json} if lineage_json else {})
    pq.write_table(table.replace_schema_metadata(metadata), folder / "shards" / f"{name}.parquet")


def check_export(folder: Path) -> None:
    export.export(folder / "store", folder / "out")


def check_curate(folder: Path) -> None:
    curate.curate(curate.CurateConfig(folder / "store", folder / "out", ()))


def check_train(folder: Path) -> None:
    settings = {"student": {"base": "base"}, "data": {"corpus": "store"}}
    dataset.read(config.parse(settings, root=folder, place="train.toml"))


CHECKS = [check_export, check_train]


def renamed(table: pa.Table, old: str, new: str) -> pa.Table:
    return table.rename_columns([new if name == old else name for name in table.column_names])


@pytest.mark.parametrize("check", [*CHECKS, check_curate])
def test_an_unchanged_corpus_passes(tmp_path: Path, check: Callable[[Path], None]):
    write(tmp_path / "store", "a", to_table(rows(LINEAGE)), [LINEAGE])
    check(tmp_path)


@pytest.mark.parametrize("check", [*CHECKS, check_curate])
@pytest.mark.parametrize(
    ("table", "lineages", "message"),
    [
        (to_table(rows(LINEAGE)), b"", "carries no lineage"),
        (to_table(rows(LINEAGE)), [], "carries no lineage"),
        (to_table(rows(LINEAGE)), [{}], "carries no lineage"),
        (to_table(rows(LINEAGE)), [{**LINEAGE, "run_id": ""}], "carries no lineage"),
        (to_table(rows(LINEAGE, run_id="")), [LINEAGE], "carry no lineage"),
        (to_table(rows(LINEAGE, run_id="run-9")), [LINEAGE], "carry no lineage"),
        (to_table(rows(EVAL)), [{**EVAL, "purpose": "train"}], "say purpose = 'eval'"),
        (to_table(rows(LINEAGE, purpose="eval")), [LINEAGE], "say purpose = 'eval'"),
        (to_table(rows(OPENAI)), [{**OPENAI, "terms_id": "mock-teacher"}], "say terms_id"),
        (to_table(rows(LINEAGE, terms_id="openai-api-2026-01-01")), [LINEAGE], "say terms_id"),
        (to_table(rows(LINEAGE, teacher_id=OPENAI["teacher_id"])), [LINEAGE], "say teacher_id"),
        (to_table(rows(LINEAGE, permission_sha256="f" * 64)), [LINEAGE], "say permission_sha256"),
        (to_table(rows(LINEAGE, mock=False)), [LINEAGE], "say mock = False"),
        (to_table(rows(LINEAGE, request_model="gpt-5")), [LINEAGE], "'gpt-5'"),
        (to_table(rows(LINEAGE)), [LINEAGE, {**LINEAGE, "duties": ["noncommercial"]}], "differ"),
    ],
)
def test_rows_and_lineage_have_to_agree(
    tmp_path: Path, check: Callable[[Path], None], table: pa.Table, lineages: Any, message: str
):
    write(tmp_path / "store", "a", table, lineages)
    with pytest.raises(TermsRefused, match=message) as caught:
        check(tmp_path)
    assert caught.value.exit_code == 77
    assert not list((tmp_path / "out").glob("**/*.parquet"))


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("second", "lineages", "message"),
    [
        (rows(EVAL), [EVAL], "evaluation"),
        (rows(OPENAI), [OPENAI], "may not develop models that compete"),
        (rows({**OPENAI, "run_id": "run-1"}), [{**OPENAI, "run_id": "run-1"}], "2 lineages that differ"),
        (rows(OPENAI), b"", "carries no lineage"),
        (rows({**LINEAGE, "run_id": "run-1"}), b"", "carries no lineage"),
    ],
)
def test_one_file_of_another_corpus_closes_the_whole(
    tmp_path: Path, check: Callable[[Path], None], second: list[Sample], lineages: Any, message: str
):
    write(tmp_path / "store", "a", to_table(rows(LINEAGE)), [LINEAGE])
    write(tmp_path / "store", "b", to_table(second), lineages)
    with pytest.raises(TermsRefused, match=message):
        check(tmp_path)


@pytest.mark.parametrize("check", [*CHECKS, check_curate])
@pytest.mark.parametrize("column", FACT_COLUMNS)
def test_a_renamed_column_is_missed(tmp_path: Path, check: Callable[[Path], None], column: str):
    lineage = {**EVAL, "providers": ["deepinfra"]}
    write(tmp_path / "store", "a", renamed(to_table(rows(EVAL)), column, f"old_{column}"), [lineage])
    with pytest.raises(StoreFormatError, match=f"lacks columns.*{column}"):
        check(tmp_path)


@pytest.mark.parametrize("check", [*CHECKS, check_curate])
@pytest.mark.parametrize("expected", [b"{", b"[3]", b"null", b'"x"', b"\xff"])
def test_a_lineage_that_is_none_is_named(tmp_path: Path, check: Callable[[Path], None], expected: bytes):
    write(tmp_path / "store", "a", to_table(rows(LINEAGE)), expected)
    with pytest.raises(StoreCorrupt, match="lineage"):
        check(tmp_path)


def test_evaluation_rows_stay_what_they_are_through_curation(tmp_path: Path):
    write(tmp_path / "store", "a", to_table(rows(EVAL)), [EVAL])
    check_curate(tmp_path)
    (tmp_path / "store").rename(tmp_path / "old")
    (tmp_path / "out").rename(tmp_path / "store")
    for check in CHECKS:
        with pytest.raises(TermsRefused, match="evaluation"):
            check(tmp_path)


QWEN = {
    **LINEAGE,
    "model": "Qwen/Qwen3-8B",
    "terms_id": "qwen3-apache",
    "mock": False,
    "teacher_id": "http://127.0.0.1:1/v1|Qwen/Qwen3-8B",
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("lineage", "answering", "permitted"),
    [
        (LINEAGE, "", True),
        (LINEAGE, "MOCK-teacher", True),
        (LINEAGE, "mock-teacher-2", True),
        (LINEAGE, "gpt-5", False),
        (LINEAGE, "meta-llama/Llama-2-7b-chat-hf", False),
        (QWEN, "/models/Qwen3-8B-Q4_K_M.gguf", True),
        (QWEN, "qwen3-8b", True),
        (QWEN, "claude-opus-5", False),
        (QWEN, "Qwen2.5-3B-Instruct", False),
        (QWEN, "Qwen3-8B-Opus", False),
        (QWEN, "\x1b[2Jqwen3-8b\u202e", False),
    ],
)
def test_another_model_that_answered_is_asked_for_too(
    tmp_path: Path, check: Callable[[Path], None], lineage: Mapping[str, Any], answering: str, permitted: bool
):
    write(tmp_path / "store", "a", to_table(rows(lineage, response_model=answering)), [lineage])
    if permitted:
        check(tmp_path)
        return
    with pytest.raises(TermsRefused, match="answered") as caught:
        check(tmp_path)
    assert "\x1b" not in str(caught.value)


HELD = {**LINEAGE, "providers": ["deepinfra/fp8", "google-ai-studio"]}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize(
    ("lineage", "provider", "permitted"),
    [
        (HELD, "DeepInfra", True),
        (HELD, "Google AI Studio", True),
        (HELD, "", True),
        (LINEAGE, "Novita", True),
        (HELD, "Novita", False),
        (HELD, "deepinfra2", False),
        (HELD, "\x1b[2J", False),
    ],
)
def test_rows_of_a_provider_the_router_was_not_held_to_go_no_further(
    tmp_path: Path, check: Callable[[Path], None], lineage: Mapping[str, Any], provider: str, permitted: bool
):
    write(tmp_path / "store", "a", to_table(rows(lineage, provider=provider)), [lineage])
    if permitted:
        check(tmp_path)
        return
    with pytest.raises(TermsRefused, match="deepinfra") as caught:
        check(tmp_path)
    assert "\x1b" not in str(caught.value)


def test_a_file_from_before_the_column_is_read_as_one_that_names_no_provider(tmp_path: Path):
    earlier = to_table(rows(LINEAGE)).drop_columns(["provider"])
    write(tmp_path / "store", "a", earlier, [LINEAGE])
    corpus = Corpus.open(tmp_path / "store")
    assert {fact["provider"] for fact in corpus.distinct(FACT_COLUMNS)} == {""}
    assert [sample.provider for sample in corpus.samples()] == ["", "", ""]
    assert corpus.verify() == []
    assert with_added_columns(earlier).equals(to_table(rows(LINEAGE)))
    check_export(tmp_path)


CHANGES = st.sampled_from(REPEATED_COLUMNS)


@given(st.lists(CHANGES, min_size=1, unique=True), st.booleans())
def test_any_change_on_one_side_is_a_disagreement(names: list[str], in_row: bool):
    fact = {**{name: LINEAGE[name] for name in ("run_id", *REPEATED_COLUMNS)}, "request_model": ""}
    assert disagreements([Lineage(LINEAGE)], [fact]) == []
    changed = {name: not LINEAGE[name] if name == "mock" else f"{LINEAGE[name]}x" for name in names}
    pair = (LINEAGE, {**fact, **changed}) if in_row else ({**LINEAGE, **changed}, fact)
    assert len(disagreements([Lineage(pair[0])], [pair[1]])) == len(names)
