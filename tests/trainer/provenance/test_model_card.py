"""Check the documents and the hash tree of a trained student, in the adapter and in the merged folder."""

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


def taught_by(lineage, rows):
    columns = {
        name: lineage[name]
        for name in ("run_id", "terms_id", "mock", "purpose", "permission_sha256", "teacher_id")
    }
    return [replace(row, **columns) for row in rows]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path, Path]:
    """train.toml, adapter and merged folder of a student of two teachers."""
    root = tmp_path_factory.mktemp("documents")
    path = tiny.train_toml(root, tiny.skill(16), out={"path": "out", "name": "Llama-tiny"})
    rows = tiny.skill(16)
    (root / "store" / "shards" / "00000.parquet").unlink()
    tiny.corpus(root / "store", taught_by(LLAMA, rows[:8]), [LLAMA])
    (root / "store" / "shards" / "00000.parquet").rename(root / "store" / "shards" / "00001.parquet")
    tiny.corpus(root / "store", taught_by(GEMMA, rows[8:]), [GEMMA])
    (root / "base" / "README.md").write_text('---\nlicense: "mit"\n---\n# A base\n', encoding="utf-8")
    config = settings.load(path)
    train(config)
    export.export_merged(config, root / "merged")
    return path, config.out_path / "adapter", root / "merged"


def front_matter(card: str) -> dict[str, object]:
    return yaml.safe_load(card.split("---\n", 2)[1])


@pytest.mark.parametrize("merged", [False, True])
def test_the_card_meets_every_duty(folders, merged):
    folder = folders[2] if merged else folders[1]
    card = (folder / "README.md").read_text(encoding="utf-8")
    header = front_matter(card)
    assert header["base_model"] == "base"
    assert header["base_model_relation"] == ("finetune" if merged else "adapter")
    assert header["library_name"] == ("transformers" if merged else "peft")
    assert header["license"] == "gemma"
    assert header["datasets"] == ["store"]
    assert re.match(r"# Llama-tiny\n\n\*\*Built with Llama\*\*", card.split("---\n", 2)[2])
    for text in (
        "meta-llama/Llama-3.1-8B-Instruct",
        "google/gemma-3-4b-it",
        "16 answers",
        "not legal advice",
    ):
        assert text in card
    assert str(folders[0].parent) not in card, "a path of this machine"


@pytest.mark.parametrize("merged", [False, True])
def test_the_documents_in_the_folder_are_complete(folders, merged):
    folder = folders[2] if merged else folders[1]
    text = (folder / "NOTICE").read_text(encoding="utf-8")
    for duty in ("Gemma is provided under", "ai.google.dev/gemma/prohibited_use_policy", "Built with Llama"):
        assert duty in text
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


def test_rows_of_both_folders_are_traced_to_request_teacher_and_terms(folders, run_trainer):  # noqa: F811
    path, adapter, merged = folders
    store = path.parent / "store"
    for folder in (adapter, merged):
        code, out, _ = run_trainer("trace", folder, "--corpus", store, "--json")
        assert code == 0, out
        assert json.loads(out)["rows"] == 16
        code, out, _ = run_trainer("trace", folder, "p3", "--corpus", store, "--json")
        assert code == 0
        origin = json.loads(out)
        assert (origin["terms_id"], origin["lineage"]["run_id"]) == ("llama-3.1", "run-2")
        assert origin["lineage"]["duties"] == LLAMA["duties"]


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
        content = (folder / name).read_bytes()
        at = len(content) // 2
        (folder / name).write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        try:
            code, _, err = run_trainer("trace", folder)
            assert code == 1, err
        finally:
            (folder / name).write_bytes(content)


def test_an_adapter_whose_lineage_was_edited_is_not_exported(folders, tmp_path):
    path, adapter, _ = folders
    lineage = adapter / "lineage.json"
    content = lineage.read_text()
    edited = json.loads(content)
    for stored in edited["lineages"]:
        stored["duties"] = []
    lineage.write_text(json.dumps(edited))
    try:
        with pytest.raises(FindingsError, match=r"lineage\.json was changed"):
            export.export_merged(settings.load(path), tmp_path / "merged")
    finally:
        lineage.write_text(content)
    assert not (tmp_path / "merged").exists()
