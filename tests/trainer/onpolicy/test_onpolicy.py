"""Walk `trainer onpolicy` with a neural mock teacher, real scoring runs and a small student."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harvester.mock_teacher.running import RunningMock, start_in_thread
from harvester.mock_teacher.settings import MockSettings
from harvester.store.reader import Corpus
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from trainer.config import DataSection
from trainer.errors import ConfigError
from trainer.experiments.harvest_file import teacher_id
from trainer.onpolicy.config import load_onpolicy
from trainer.onpolicy.prompts import of_round, read_prompts, sample_seed

ROOT = Path(__file__).parents[3]
SKILLS, PROMPTS = ROOT / "data" / "skills", ROOT / "prompts"
TEACHER = SKILLS / "mock-teacher"


def experiment(
    folder: Path,
    base_url: str,
    *,
    base: str = "weaker/mock-teacher",
    terms: str = "mock-teacher",
    **keys: Any,
) -> Path:
    """An onpolicy.toml over 200 prompts to learn from and 24 held-out ones."""
    learned = (PROMPTS / "skills-train.jsonl").read_text(encoding="utf-8").splitlines()[:200]
    held_out = (PROMPTS / "skills-held-out.jsonl").read_text(encoding="utf-8").splitlines()[:24]
    (folder / "prompts.jsonl").write_text("\n".join([*learned, *held_out]) + "\n")
    (folder / "harvest.toml").write_text(
        f'[teacher]\nbase_url = "{base_url}"\nmodel = "mock-teacher"\nterms = "{terms}"\n'
        "[teacher.price]\ninput = 0.15\noutput = 0.60\nas_of = 2026-11-01\n"
        '[prompts]\nfiles = ["prompts.jsonl"]\n[sampling]\ntemperature = 0.0\nmax_tokens = 64\n'
    )
    (folder / "train.toml").write_text(
        f'[student]\nbase = "{SKILLS / base}"\n[data]\ncorpus = "store"\n[lora]\nrank = 8\nalpha = 16\n'
        '[train]\nlr = 2e-3\nmax_length = 128\nthreads = 1\ndevice = "cpu"\n'
    )
    return onpolicy_toml(folder, **keys)


def onpolicy_toml(folder: Path, **keys: Any) -> Path:
    values = {
        **{"harvest": "harvest.toml", "train": "train.toml", "prompts": ["prompts.jsonl"]},
        **{"teacher_tokenizer": str(TEACHER), "via": "prompt_logprobs", "max_new_tokens": 16},
        **{"rounds": 1, "prompts_per_round": 8, "samples": 2, "held_out_samples": 1, "resamples": 200},
        **keys,
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items() if value != ""]
    (folder / "onpolicy.toml").write_text("\n".join(lines) + "\n")
    return folder / "onpolicy.toml"


def figures(folder: Path) -> Any:
    result = json.loads((folder / "onpolicy" / "onpolicy.json").read_text())
    del result["adapter"]  # its place
    return result


@pytest.fixture(scope="module")
def teacher() -> Iterator[RunningMock]:
    with start_in_thread(MockSettings(model_folder=TEACHER)) as mock:
        yield mock


@pytest.mark.slow
def test_a_round_answers_scores_and_learns_and_is_not_repeated(run_trainer, tmp_path, teacher):  # noqa: F811
    toml = experiment(tmp_path, teacher.base_url)
    harvest = tmp_path / "harvest.toml"
    # Tables that scoring doesn't read need not be right.
    wrong = harvest.read_text().partition("[prompts]")[0] + "[accept]\nof = 0\n[sampling]\nsamples = -1\n"
    harvest.write_text(wrong)
    code, out, err = run_trainer("onpolicy", toml, "--json")
    assert code == 0, err
    result = json.loads(out)
    assert (result["schema"], result["ending"]) == ("trainer.onpolicy/1", "complete")
    assert (result["prompts"], result["held_out_prompts"]) == (200, 24)
    assert [row["round"] for row in result["held_out"]] == [0, 1]
    [row] = result["rounds"]
    assert (row["answers"], row["unscored_answers"]) == (16, 0)
    assert row["scored_tokens"] == row["tokens"] > 16  # equal tokenizers: every token has a score
    assert row["gradient_norm"] > 0
    for each in result["held_out"]:
        assert each["low"] <= each["reverse_kl"] <= each["high"]
    assert result["dollars"] > 0
    assert (tmp_path / "onpolicy" / "onpolicy.html").read_text().count("<svg") == 1
    lineage = json.loads((tmp_path / "onpolicy" / "adapter" / "lineage.json").read_text())
    assert "1 steps on 16 of the student's own answers" in lineage["on_policy"]
    stored = {s.key: s.outcome for s in Corpus.open(tmp_path / "store").samples()}
    assert set(stored.values()) == {"scored"}
    assert lineage["teachers"][0]["rows"] <= len(stored)

    sent, before = teacher.state()["received"], figures(tmp_path)
    code, _, err = run_trainer("onpolicy", toml)
    assert code == 0, err
    assert teacher.state()["received"] == sent
    assert figures(tmp_path) == before


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher, fork_server) -> Path:
    """Folder of a finished distillation of two rounds from listed tokens. Look, don't touch."""
    folder = tmp_path_factory.mktemp("onpolicy")
    toml = experiment(folder, teacher.base_url, rounds=2, top_logprobs=5)
    ended = fork_server("command", words=["onpolicy", toml])
    assert ended["code"] == 0, ended["err"]
    for row in figures(folder)["rounds"]:
        assert row["listed_tokens"] == row["scored_tokens"] == row["tokens"]  # equal tokenizers
        assert row["reverse_kl"] > 0
    return folder


@pytest.mark.parametrize(
    "place",
    [
        pytest.param("onpolicy.learned:2", marks=pytest.mark.slow),
        *(
            pytest.param(place, marks=pytest.mark.long)
            for place in ("onpolicy.answered:2", "onpolicy.scored:4", "checkpoint.before_rename:2")
        ),
    ],
)
def test_a_killed_distillation_goes_on_with_the_same_bits(fork_server, finished, teacher, tmp_path, place):
    """The scores of the finished one are in the store, so nothing is sent and all bits are comparable."""
    toml = experiment(tmp_path, teacher.base_url, rounds=2, top_logprobs=5)
    shutil.copytree(finished / "store", tmp_path / "store")
    sent = len(teacher.ledger()["entries"])
    ended = fork_server("command", words=["onpolicy", toml], env={"HARVESTER_FAILPOINT": place})
    assert ended["signal"] == signal.SIGKILL, ended["err"]
    assert not (tmp_path / "onpolicy" / "onpolicy.json").exists()
    ended = fork_server("command", words=["onpolicy", toml], env={"HARVESTER_FAILPOINT": ""})
    assert ended["code"] == 0, ended["err"]
    assert figures(tmp_path) == figures(finished)
    weights = "onpolicy/adapter/adapter_model.safetensors"
    assert (tmp_path / weights).read_bytes() == (finished / weights).read_bytes()
    assert len(teacher.ledger()["entries"]) == sent


@pytest.mark.long
def test_further_rounds_go_on_from_those_that_are_done(run_trainer, finished, tmp_path):  # noqa: F811
    shutil.copytree(finished, tmp_path / "copy")
    before = figures(finished)
    code, _, err = run_trainer("onpolicy", onpolicy_toml(tmp_path / "copy", rounds=3, top_logprobs=5))
    assert code == 0, err
    assert "2 rounds are done before" in err
    assert figures(tmp_path / "copy")["rounds"][:2] == before["rounds"]


@pytest.mark.long
@pytest.mark.parametrize("how", [{"baseline": "mean"}, {"top_logprobs": 20}], ids=["sampled", "listed"])
def test_the_reverse_kl_falls_on_held_out_prompts(run_trainer, tmp_path, teacher, how):  # noqa: F811
    keys = {"rounds": 6, "prompts_per_round": 64, "samples": 4, "held_out_every": 0, "held_out_samples": 8}
    toml = experiment(tmp_path, teacher.base_url, base="student", **keys, **how)
    code, out, err = run_trainer("onpolicy", toml, "--json")
    assert code == 0, err
    first, last = json.loads(out)["held_out"]
    assert last["reverse_kl"] < first["reverse_kl"]


@pytest.mark.slow
def test_a_student_with_other_tokens_is_scored_by_bytes(run_trainer, tmp_path, teacher):  # noqa: F811
    toml = experiment(tmp_path, teacher.base_url, base="student_bpe", top_logprobs=5)
    code, out, err = run_trainer("onpolicy", toml, "--json")
    assert code == 0, err
    [row] = json.loads(out)["rounds"]
    assert row["scored_tokens"] / row["tokens"] > 0.95
    assert 0 < row["listed_tokens"] < row["scored_tokens"]


@pytest.mark.long
def test_a_server_can_put_the_chat_into_its_own_template(run_trainer, tmp_path, teacher):  # noqa: F811
    """The scores are those of the texts that are rendered here."""
    by_way = {}
    for via in ("chat", "prompt_logprobs"):
        folder = tmp_path / via
        folder.mkdir()
        tokenizer = "" if via == "chat" else str(TEACHER)
        toml = experiment(folder, teacher.base_url, via=via, teacher_tokenizer=tokenizer, rounds=1)
        code, _, err = run_trainer("onpolicy", toml)
        assert code == 0, err
        by_way[via] = figures(folder)["held_out"][0]
    chat, text = by_way["chat"], by_way["prompt_logprobs"]
    assert chat["answers"] == text["answers"]
    if chat["unscored_answers"] == text["unscored_answers"]:
        assert chat["reverse_kl"] == pytest.approx(text["reverse_kl"], abs=1e-2)


@pytest.mark.slow
def test_terms_that_permit_no_training_end_it_with_their_code(run_trainer, tmp_path, teacher):  # noqa: F811
    sent = teacher.state()["received"]
    code, _, err = run_trainer("onpolicy", experiment(tmp_path, teacher.base_url, terms="unknown-terms"))
    assert code == 77, err
    assert teacher.state()["received"] == sent


@pytest.mark.slow
def test_a_budget_that_allows_no_round_says_so(run_trainer, tmp_path, teacher):  # noqa: F811
    code, _, err = run_trainer("onpolicy", experiment(tmp_path, teacher.base_url, max_tokens=200))
    assert (code, "raise max_usd or max_tokens" in err) == (2, True), err


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"round": 1}, "did you mean 'rounds'"),
        ({"teacher_tokenizer": ""}, "set teacher_tokenizer"),
        ({"train": "absent.toml"}, "no such file"),
        ({"prompts": ["absent.jsonl"]}, "can't be read"),
        ({"out": "out"}, "output folder of train.toml"),
        ({"top_logprobs": 5, "baseline": "mean"}, "leave out baseline or top_logprobs"),
        ({"start": "absent"}, "absent"),
    ],
)
def test_a_wrong_onpolicy_toml_is_refused_in_words(run_trainer, tmp_path, keys, message):  # noqa: F811
    code, _, err = run_trainer("onpolicy", experiment(tmp_path, "http://127.0.0.1:9/v1", **keys))
    assert (code, message in err) == (2, True), err


def test_only_the_teacher_of_a_harvest_toml_is_looked_at(tmp_path):
    teacher = '[teacher]\nbase_url = "http://127.0.0.1:9/v1"\nmodel = "m"\nterms = "mock-teacher"\n'
    path = tmp_path / "harvest.toml"
    for rest in ("", "[prompts]\n", "[accept]\nof = 0\n[sampling]\nsamples = -1\n[canary]\nx = 1\n"):
        path.write_text(teacher + rest)
        assert teacher_id(path) == "http://127.0.0.1:9/v1|m"
    for text, message in (
        ("[prompts]\n", "teacher: is missing"),
        (teacher.replace("model = ", "modle = "), "unknown key 'teacher.modle'"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            teacher_id(path)


def test_held_out_prompts_are_never_learned_from(tmp_path):
    toml = experiment(tmp_path, "http://127.0.0.1:9/v1")
    last = json.loads((tmp_path / "prompts.jsonl").read_text().splitlines()[-1])
    leaked = json.dumps({**last, "split": "train"})
    with (tmp_path / "prompts.jsonl").open("a") as file:
        file.write(leaked + "\n")
    files = load_onpolicy(toml)
    assert files.train.data == DataSection(corpus="store")
    learned, held_out = read_prompts(files)
    assert (len(learned), len(held_out)) == (200, 24)
    assert {prompt.key for prompt in learned}.isdisjoint(prompt.key for prompt in held_out)


def test_the_prompts_of_rounds_are_passes_over_all_in_orders_of_their_own(tmp_path):
    learned, _ = read_prompts(load_onpolicy(experiment(tmp_path, "http://127.0.0.1:9/v1")))
    few = learned[:10]
    rounds = [[prompt.key for prompt in of_round(few, number, 4, 0)] for number in range(1, 6)]
    first, second = [*rounds[0], *rounds[1], *rounds[2][:2]], [*rounds[2][2:], *rounds[3], *rounds[4]]
    assert set(first) == set(second) == {prompt.key for prompt in few}
    assert first != second
    assert [p.key for p in of_round(few[::-1], 3, 4, 0)] == rounds[2]
    assert sample_seed(0, 1, "a", 0) != sample_seed(0, 1, "a", 1) != sample_seed(0, 2, "a", 1)
