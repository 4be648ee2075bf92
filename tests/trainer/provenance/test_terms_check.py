"""Check that the terms are verified before a corpus is learned, and again before a student is exported."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from harvester.errors import TermsRefused
from tests.trainer import tiny
from trainer import config as settings
from trainer.data import dataset
from trainer.publish import export
from trainer.training.train import train


def configured(folder, lineages, **sections):
    path = tiny.train_toml(folder, tiny.skill(8), **sections)
    lineage = lineages[0] if lineages else tiny.lineage()
    columns = {
        name: lineage[name] for name in ("terms_id", "mock", "purpose", "permission_sha256", "teacher_id")
    }
    tiny.corpus(folder / "store", [replace(row, **columns) for row in tiny.skill(8)], lineages)
    return settings.load(path)


LLAMA_31 = tiny.lineage(model="meta-llama/Llama-3.1-8B-Instruct", terms_id="llama-3.1", mock=False)


@pytest.mark.parametrize(
    ("lineages", "reason"),
    [
        ([], "carry no lineage"),
        ([tiny.lineage(terms_id="")], "terms_id missing"),
        ([tiny.lineage(run_id="another")], "carry no lineage"),
        ([tiny.lineage(purpose="eval")], "evaluation"),
        ([tiny.lineage(terms_id="no-such-record")], "no-such-record"),
        ([tiny.lineage(), tiny.lineage(run_id="run-2", purpose="eval")], "evaluation"),
        ([LLAMA_31], "begin with 'Llama'"),
        ([tiny.lineage(duties=["sing"])], "unknown duty"),
    ],
)
def test_a_corpus_that_terms_do_not_permit_is_not_learned_from(tmp_path, lineages, reason):
    config = configured(tmp_path, lineages)
    with pytest.raises(TermsRefused, match=reason) as caught:
        train(config)
    assert caught.value.exit_code == 77
    assert not (config.out_path / "adapter").exists()


def test_a_duty_is_met_by_name_and_licence(tmp_path):
    config = configured(tmp_path / "met", [LLAMA_31], out={"name": "Llama-small"})
    assert dataset.read(config).train
    wrong = configured(
        tmp_path / "unmet", [tiny.lineage(duties=["noncommercial"])], out={"licence": "Apache-2.0"}
    )
    with pytest.raises(TermsRefused, match="non-commercial"):
        dataset.read(wrong)


@pytest.mark.parametrize(
    ("base", "permitted"),
    [
        ("Llama-2-7b-hf", True),
        ("llama-2-7b/qwen-tiny", False),
        ("models--meta-llama--Llama-2-7b-hf/snapshots/0123abcd", True),
        ("models--me--qwen/snapshots/llama-2-7b", False),
    ],
)
def test_llama_2_may_teach_llama_2_recognised_by_the_name_of_the_base_not_its_path(tmp_path, base, permitted):
    llama = tiny.lineage(model="meta-llama/Llama-2-7b-chat-hf", terms_id="llama-2", mock=False)
    config = configured(tmp_path, [llama], student={"base": base})
    if permitted:
        assert dataset.read(config).train
        return
    with pytest.raises(TermsRefused, match="of the line llama-2"):
        dataset.read(config)


def test_export_checks_the_terms_again(tmp_path):
    config = configured(tmp_path, [tiny.lineage()])
    train(config)
    lineage = config.out_path / "adapter" / "lineage.json"
    edited = json.loads(lineage.read_text())
    edited["lineages"][0]["terms_id"] = "withdrawn"
    lineage.write_text(json.dumps(edited))
    with pytest.raises(TermsRefused, match="withdrawn"):
        export.export_merged(config, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
