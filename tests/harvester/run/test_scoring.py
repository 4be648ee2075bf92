"""Test `harvester run` with [score]: probes, cache, kills, terms and budget, over real sockets."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harvester.store.reader import Corpus
from tests.journey.run_process import harvester, running
from trainer import config as train_config
from trainer.data import dataset

TEACHER = Path(__file__).resolve().parents[3] / "data" / "skills" / "mock-teacher"
CONFIG = """\
[teacher]
base_url = "{base_url}"
model = "mock-teacher"
terms = "{terms}"
[prompts]
files = ["texts.jsonl"]
[score]
via = "{via}"
{more}
"""


def write(root, base_url, rows=3, *, via="auto", terms="mock-teacher", more=""):
    lines = []
    for number in range(rows):
        turns = [
            {"role": "user", "content": f"What is {number} + 30?"},
            {"role": "assistant", "content": str(number + 30)},
        ]
        question = f"<|im_start|>user\n{turns[0]['content']}<|im_end|>\n"
        text = f"{question}<|im_start|>assistant\n{number + 30}<|im_end|>"
        lines.append(json.dumps({"id": f"t{number}", "messages": turns, "text": text}) + "\n")
    (root / "texts.jsonl").write_text("".join(lines))
    path = root / "harvest.toml"
    path.write_text(CONFIG.format(base_url=base_url, via=via, terms=terms, more=more))
    return path


def scored(root):
    return [s for s in Corpus.open(root / "store").samples() if not s.prompt_id.startswith("score-probe")]


@pytest.mark.parametrize(
    ("way", "via", "listed"),
    [
        ("prompt_logprobs", "auto", 4),
        ("echo", "auto", 0),
        ("generate", "generate", 4),
        ("chat", "chat", 4),
        pytest.param("echo", "echo", 4, marks=pytest.mark.slow),
        pytest.param("generate", "auto", 0, marks=pytest.mark.slow),
        pytest.param("chat", "auto", 0, marks=pytest.mark.slow),
    ],
)
def test_the_way_that_a_server_offers_is_found_and_asked_once(tmp_path, mock_teacher, way, via, listed):
    served = mock_teacher(model_folder=TEACHER, scores=(way,))
    path = write(tmp_path, served.base_url, via=via)
    if listed:
        path.write_text(path.read_text().replace("[score]", f"[score]\ntop_logprobs = {listed}"))
    done = harvester("run", path, "--json")
    assert done.returncode == 0, done.stderr
    rows = scored(tmp_path)
    assert len(rows) == 3
    model = AutoModelForCausalLM.from_pretrained(TEACHER, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TEACHER)
    texts = (tmp_path / "texts.jsonl").read_text().splitlines()
    lines = {line["id"]: line for line in map(json.loads, texts)}
    for row in rows:
        assert row.outcome == "scored"
        line = lines[row.prompt_id]
        text = line["messages"][-1]["content"] if way == "chat" else line["text"]
        assert row.completion == text
        spelled = b"".join(token["bytes"] for token in row.logprobs)
        assert spelled.startswith(text.encode())
        ids = tokenizer(line["text"], add_special_tokens=False)["input_ids"]
        with torch.inference_mode():
            every = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        expected = every[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).tolist()
        answer = [t["logprob"] for t in row.logprobs if t["bytes"] != b"\n"][-2:]
        # float16 in shards: 11 significant bits.
        assert answer == pytest.approx(expected[-2:], rel=1e-3, abs=1e-3)
        tops = [t["top"] for t in row.logprobs if t["bytes"] != b"\n"][-2:]
        for top, values in zip(tops, every[-3:-1], strict=True):
            likeliest = values.topk(listed).values.tolist()
            assert sorted((t["logprob"] for t in top), reverse=True)[:listed] == pytest.approx(
                likeliest, rel=1e-3, abs=1e-3
            )
            assert len(top) in ((listed, listed + 1) if listed else (0,))

    sent = served.state()["received"]
    again = harvester("run", path, "--json")
    assert again.returncode == 0
    assert served.state()["received"] == sent
    assert harvester("verify", tmp_path / "store").returncode == 0


def test_a_server_without_any_way_is_named_with_what_was_tried(tmp_path, mock_teacher):
    for served in (mock_teacher(model_folder=TEACHER, scores=()), mock_teacher()):
        root = tmp_path / str(served.base_url.rpartition(":")[2].partition("/")[0])
        root.mkdir()
        done = harvester("run", write(root, served.base_url))
        assert done.returncode == 4
        for way in ("prompt_logprobs", "echo", "generate", "chat"):
            assert f"{way}: " in done.stderr
        assert scored(root) == []


@pytest.mark.parametrize(
    "fault",
    [
        {"action": "choice", "value": {"logprobs": {"tokens": ["The"], "token_logprobs": [-1]}}},
        {"action": "patch", "value": {"choices": None}},
    ],
)
def test_a_reply_of_another_length_is_no_proof(tmp_path, mock_teacher, fault):
    served = mock_teacher(model_folder=TEACHER, faults=[fault])
    done = harvester("run", write(tmp_path, served.base_url, via="echo"))
    assert done.returncode == 4
    assert sum(served.fired().values()) >= 1
    assert "echo: " in done.stderr


def test_a_kill_loses_nothing_that_was_recorded(tmp_path, mock_teacher):
    served = mock_teacher(model_folder=TEACHER, latency_s=0.05)
    path = write(tmp_path, served.base_url, 40, via="echo", more="[teacher.limits]\nmax_concurrency = 2\n")
    with running(path) as process:
        process.until(lambda status: status["answers_stored"] >= 5 and status["rows_total"] == 40)
        process.signal(signal.SIGKILL)
        process.process.wait()
    done = harvester("run", path, "--json")
    assert done.returncode == 0, done.stderr
    assert len(scored(tmp_path)) == 40
    entries = served.ledger()["entries"]
    # The probe, every text once, and at most those in flight at the kill twice.
    assert 41 <= len(entries) <= 41 + 2


def test_terms_that_permit_no_training_permit_no_scores(tmp_path, mock_teacher):
    served = mock_teacher(model_folder=TEACHER)
    done = harvester("run", write(tmp_path, served.base_url, terms="openai"))
    assert done.returncode == 77
    assert served.state()["received"] == 0


def test_scores_count_against_the_budget(tmp_path, mock_teacher):
    served = mock_teacher(model_folder=TEACHER)
    path = write(tmp_path, served.base_url, 30, more="[budget.store]\ntokens = 300\n")
    assert harvester("run", path).returncode == 10
    assert served.totals()["total_tokens"] <= 300
    assert len(scored(tmp_path)) < 30


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ("[sampling]\ntemperature = 1.0\n", "temperature"),
        ("[accept]\nper_prompt = 1\nof = 2\n[verify.sum]\nkind = 'exact'\n", "accept"),
    ],
)
def test_settings_for_answers_are_refused(tmp_path, more, named):
    done = harvester("run", write(tmp_path, "http://127.0.0.1:9/v1", more=more))
    assert done.returncode == 2
    assert named in done.stderr


def test_scored_texts_are_no_answers_to_anyone(tmp_path, mock_teacher):
    served = mock_teacher(model_folder=TEACHER)
    path = write(tmp_path, served.base_url, 25, via="echo")
    assert harvester("run", path).returncode == 0
    (tmp_path / "prompts.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{n} + 1?", "reference": str(n + 1)}) + "\n" for n in range(4))
    )
    text = path.read_text().replace("texts.jsonl", "prompts.jsonl")
    text = text.replace('[score]\nvia = "echo"', "[sampling]")
    answers = tmp_path / "answers.toml"
    answers.write_text(text.replace("[sampling]", "[sampling]\nmax_tokens = 16"))
    plan = json.loads(harvester("plan", answers, "--json").stdout)
    assert (plan["rows"], plan["cached"]) == (4, 0)
    assert harvester("run", answers).returncode == 0
    (tmp_path / "verify.toml").write_text('[verify."*"]\nkind = "exact"\n')
    judged = harvester("score", tmp_path / "store", "--verify", tmp_path / "verify.toml", "--json")
    tallies = list(json.loads(judged.stdout)["tasks"].values())
    assert [tally["answers"] for tally in tallies] == [4]

    config = train_config.parse(
        {"student": {"base": str(TEACHER)}, "data": {"corpus": "store", "eval_share": 0.0}},
        root=tmp_path,
        place="test",
    )
    rows = dataset.read(config)
    assert len(rows.train) + sum(rows.excluded.values()) == 4
    assert rows.held_out == ()
