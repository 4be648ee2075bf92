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
from trainer.evaluation.audit import auroc
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
