"""The papers of a real student, adapter and merged, read as their readers would; the trace through both."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from harvester.system.files import sha256_of
from tests.trainer import tiny
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from tests.trainer.provenance.test_student_documents import CYCLONEDX
from trainer import config as settings
from trainer.errors import FindingsError
from trainer.provenance import fingerprint
from trainer.publish import export
from trainer.training.train import train

LLAMA = tiny.lineage(
    run_id="run-2",
    model="meta-llama/Llama-3.1-8B-Instruct",
    terms_id="llama-3.1",
    mock=False,
    teacher_id="http://127.0.0.1/v1|llama",
    duties=["name_prefix:Llama", "display:Built with Llama"],
)
GEMMA = tiny.lineage(
    run_id="run-3",
    model="google/gemma-3-4b-it",
    terms_id="gemma-1-to-3",
    mock=False,
    teacher_id="http://127.0.0.1/v1|gemma",
)


def of(lineage, rows):
    same = {
        name: lineage[name]
        for name in ("run_id", "terms_id", "mock", "purpose", "permission_sha256", "teacher_id")
    }
    return [replace(row, **same) for row in rows]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path, Path]:
    """train.toml, adapter and merged folder of a student of two teachers."""
    root = tmp_path_factory.mktemp("papers")
    path = tiny.train_toml(root, tiny.skill(16), out={"path": "out", "name": "Llama-tiny"})
    rows = tiny.skill(16)
    (root / "store" / "shards" / "00000.parquet").unlink()
    tiny.corpus(root / "store", of(LLAMA, rows[:8]), [LLAMA])
    (root / "store" / "shards" / "00000.parquet").rename(root / "store" / "shards" / "00001.parquet")
    tiny.corpus(root / "store", of(GEMMA, rows[8:]), [GEMMA])
    (root / "base" / "README.md").write_text('---\nlicense: "mit"\n---\n# A base\n', encoding="utf-8")
    config = settings.load(path)
    train(config)
    export.export_merged(config, root / "merged")
    return path, config.out_path / "adapter", root / "merged"


def head(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n", 2)[1])


@pytest.mark.parametrize("merged", [False, True])
def test_the_card_pays_every_duty_where_a_reader_looks(folders, merged):
    folder = folders[2] if merged else folders[1]
    card = (folder / "README.md").read_text(encoding="utf-8")
    told = head(card)
    assert told["base_model"] == "base"
    assert told["base_model_relation"] == ("finetune" if merged else "adapter")
    assert told["library_name"] == ("transformers" if merged else "peft")
    assert told["license"] == "gemma"
    assert told["datasets"] == ["store"]
    assert re.match(r"# Llama-tiny\n\n\*\*Built with Llama\*\*", card.split("---\n", 2)[2])
    for said in (
        "meta-llama/Llama-3.1-8B-Instruct",
        "google/gemma-3-4b-it",
        "16 answers",
        "not legal advice",
    ):
        assert said in card
    assert str(folders[0].parent) not in card, "a path of this machine"


@pytest.mark.parametrize("merged", [False, True])
def test_notice_bill_and_summary_lie_beside_the_weights(folders, merged):
    folder = folders[2] if merged else folders[1]
    text = (folder / "NOTICE").read_text(encoding="utf-8")
    for said in ("Gemma is provided under", "ai.google.dev/gemma/prohibited_use_policy", "Built with Llama"):
        assert said in text
    bom = json.loads((folder / "bom.cdx.json").read_text(encoding="utf-8"))
    assert [error.message for error in CYCLONEDX.iter_errors(bom)] == []
    (weights,) = folder.glob("*.safetensors")
    hashes = bom["metadata"]["component"]["hashes"]
    assert hashes == [{"alg": "SHA-256", "content": sha256_of(weights)}]
    data = next(each for each in bom["components"] if each["bom-ref"] == "data")
    assert data["components"][0]["hashes"][0]["content"] == sha256_of(folder / fingerprint.ROWS_FILE)
    summary = (folder / "EU_SUMMARY.md").read_text(encoding="utf-8")
    assert "2.5. Synthetic data" in summary
    assert "google/gemma-3-4b-it" in summary


def test_both_folders_lead_back_to_request_teacher_and_terms(folders, run_trainer):  # noqa: F811
    path, adapter, merged = folders
    store = path.parent / "store"
    for folder in (adapter, merged):
        code, out, _ = run_trainer("trace", folder, "--corpus", store, "--json")
        assert code == 0, out
        assert json.loads(out)["rows"] == 16
        code, out, _ = run_trainer("trace", folder, "p3", "--corpus", store, "--json")
        assert code == 0
        told = json.loads(out)
        assert (told["terms_id"], told["lineage"]["run_id"]) == ("llama-3.1", "run-2")
        assert told["lineage"]["duties"] == LLAMA["duties"]


@pytest.mark.parametrize(
    "name",
    [
        "lineage.json",
        "NOTICE",
        "bom.cdx.json",
        "tokenizer.json",
        fingerprint.TREE_FILE,
        fingerprint.ROWS_FILE,
    ],
)
def test_a_byte_flipped_in_either_folder_is_found(folders, run_trainer, name):  # noqa: F811
    for folder in folders[1:]:
        whole = (folder / name).read_bytes()
        at = len(whole) // 2
        (folder / name).write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        try:
            code, _, err = run_trainer("trace", folder)
            assert code == 1, err
        finally:
            (folder / name).write_bytes(whole)


def test_an_adapter_whose_lineage_was_edited_is_not_exported(folders, tmp_path):
    path, adapter, _ = folders
    lineage = adapter / "lineage.json"
    whole = lineage.read_text()
    told = json.loads(whole)
    for each in told["lineages"]:
        each["duties"] = []
    lineage.write_text(json.dumps(told))
    try:
        with pytest.raises(FindingsError, match=r"lineage\.json is not the file"):
            export.export_merged(settings.load(path), tmp_path / "merged")
    finally:
        lineage.write_text(whole)
    assert not (tmp_path / "merged").exists()
