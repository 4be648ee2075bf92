"""Test the audit of rows: planted wrong answers are found, the page names them, and it resumes."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from harvester_data import __file__ as data_file

from harvester.store.shards.schema import Sample
from tests.trainer import tiny
from tests.trainer.command_line import lines, run_trainer  # noqa: F401 - a fixture
from tests.trainer.data.test_token_store import mixed_rows, write_shards
from tests.trainer.evaluation.test_evaluated_rows import never_read
from trainer import config as settings
from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.evaluation.audit import audit, auroc
from trainer.evaluation.row_page import RowCard, RowPage, Text

BASE = Path(data_file).parent / "base"


def test_the_auroc_is_the_share_of_pairs_in_order():
    assert auroc([3, 1, 2, 0], [True, False, True, False]) == 1.0
    assert auroc([1, 1], [True, False]) == 0.5
    assert auroc([0.2, 0.9, 0.5], [True, False, False]) == 0.0
    with pytest.raises(ValueError, match="both kinds"):
        auroc([1, 2], [True, True])


def test_without_folds_the_finished_student_judges(run_trainer, learned, tmp_path):  # noqa: F811
    config, _ = learned
    shutil.copytree(config.root, tmp_path / "copy")
    code, out, err = run_trainer("audit", tmp_path / "copy" / "train.toml", "--folds", 0, "--json")
    assert code == 0, err
    result = json.loads(out)
    rows = lines(Path(result["file"]))
    assert (result["rows"], len(rows)) == (40, 40)
    assert [row["after"] for row in rows] == sorted((row["after"] for row in rows), reverse=True)
    assert all(row["unseen"] is None and row["before"] > 0 for row in rows)
    page = Path(result["page"]).read_text()
    assert page.index(f"<h2>{rows[0]['prompt_id']}</h2>") < page.index(f"<h2>{rows[1]['prompt_id']}</h2>")
    assert "by the loss of the finished student, which learned them" in page
    assert "did not learn them" not in page
    code, _, err = run_trainer("audit", tmp_path / "copy" / "train.toml", "--folds", 1)
    assert code == 2
    assert "one fold" in err


def test_a_page_of_rows_hides_private_data(tmp_path):
    secret = f"ghp_{'a1' * 18}"
    texts = [
        Text("answer", f"the key is {secret}, ask ann@example.org"),
        Text("long", "x" * 1490 + f" {secret}"),
    ]
    card = RowCard("p1", [], texts, [Text("p2", secret, "like")])
    page = RowPage("Rows", "All rows.", [], [card]).write(tmp_path / "page.html").read_text()
    assert "the key is [GITHUB_TOKEN], ask [EMAIL]" in page
    assert "ghp_" not in page
    assert "Private data is hidden on this page" in page


def upper_rows(count: int, wrong: set[int]) -> list[Sample]:
    """Rows that say a word in capitals; the wrong ones have the answer of another row."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghijklmnop", k=5)) for _ in range(count)]
    answers = [words[(n + 1) % count] if n in wrong else words[n] for n in range(count)]
    return [
        tiny.sample(n, f"Write {word} in capitals.", answer.upper(), metadata_json='{"task": "upper"}')
        for n, (word, answer) in enumerate(zip(words, answers, strict=True))
    ]


def results_of(config: TrainConfig) -> dict[str, object]:
    """What an audit wrote: its rows and page, and of each fold's student the weights and what it learned."""
    folder = config.out_path / "audit"
    texts: dict[str, object] = {name: (folder / name).read_text() for name in ("audit.jsonl", "audit.html")}
    for adapter in sorted(folder.glob("*/adapter")):
        tree = json.loads((adapter / "hash_tree.json").read_text())
        weights = (adapter / "adapter_model.safetensors").read_bytes()
        # README.md and notices name the day.
        texts[adapter.parent.name] = (weights, tree["rows"], (adapter / "hash_tree.rows.jsonl").read_text())
    return texts


@pytest.mark.parametrize(
    "data",
    [pytest.param({}, marks=pytest.mark.slow), {"answers": "majority", "weights": "agreement"}],
    ids=["all", "majority"],
)
def test_an_audit_from_the_store_equals_one_in_memory(data, tmp_path, monkeypatch):
    faulty = {"p101", "p104", "p106", "p108"}  # for which a training refuses the corpus
    rows = [row for row in mixed_rows() if row.prompt_id not in faulty]
    taught = [row for row in rows if "held_out" not in row.metadata_json and row.outcome == "ok"]
    again = [
        replace(row, key=f"{700 + n:064x}", sample_index=1, completion=f"{row.completion} or {n}")
        for n, row in enumerate(taught[:9])
    ]
    toml = tiny.train_toml(tmp_path, [], data={**data, "eval_share": 0.0}, train={"epochs": 2})
    write_shards(tmp_path / "store", [*again, *rows[20:]], rows[:20])
    config = settings.load(toml)
    found = audit(config, 2)
    expected = results_of(config)
    lines_of = str(expected["audit.jsonl"]).splitlines()
    assert len(lines_of) == found["rows"] > 30
    assert "similarity" in str(expected["audit.html"])
    assert '"disagreement": 0.' in str(expected["audit.jsonl"])
    shutil.rmtree(config.out_path)
    monkeypatch.setattr(dataset, "STORED_ROWS", 0)
    monkeypatch.setattr("trainer.data.tokens.row_ranges.PART_ROWS", 16)
    monkeypatch.setattr(dataset, "read", never_read)
    progress: list[tuple[int, int, str]] = []
    assert audit(config, 2, on_progress=lambda *step: progress.append(step)) == found
    assert results_of(config) == expected
    assert {doing for _, _, doing in progress} == {"tokenising", "choosing rows"}
    assert not list((config.out_path / "audit").glob(".*")), "nothing is left of the folds' choices"


@pytest.mark.slow
def test_a_tenth_of_wrong_answers_is_found(run_trainer, tmp_path):  # noqa: F811
    wrong = set(random.Random(2).sample(range(300), 30))
    rows = upper_rows(300, wrong)
    twice = replace(rows[0], key=f"{5000:064x}", sample_index=1, completion="NO")
    tiny.corpus(tmp_path / "store", [*rows, twice])
    (tmp_path / "train.toml").write_text(
        f"[student]\nbase = {json.dumps(str(BASE))}\n[data]\ncorpus = 'store'\neval_share = 0.0\n"
        "[train]\nepochs = 6\nbatch_tokens = 1024\nmax_length = 128\nlr = 3e-3\nthreads = 1\n"
    )
    code, out, err = run_trainer("audit", tmp_path / "train.toml", "--json")
    assert code == 0, err
    result = json.loads(out)
    found = lines(Path(result["file"]))
    assert len(found) == 301
    assert "did not learn them" in Path(result["page"]).read_text()
    wrong_ids = {f"p{n}" for n in wrong}
    scores = [row["unseen"] for row in found if row["key"] != twice.key]
    flags = [row["prompt_id"] in wrong_ids for row in found if row["key"] != twice.key]
    assert auroc(scores, flags) >= 0.9
    [again] = [row for row in found if row["key"] == twice.key]
    assert again["disagreement"] == 1.0
    # All rows of a prompt are in one fold, and trainings that are done are not repeated.
    code, out, err = run_trainer("audit", tmp_path / "train.toml", "--json")
    assert code == 0
    assert "step " not in err
    assert lines(Path(json.loads(out)["file"])) == found
