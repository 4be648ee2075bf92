"""Walk `trainer loop` with a mock teacher, real harvests and a tiny student; check what it chooses."""

from __future__ import annotations

import json
import shutil
import signal
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harvester.mock_teacher.running import RunningMock, start_in_thread
from harvester.mock_teacher.settings import EVERY_TASK, MockSettings
from harvester.quality.held_out import prompt_key
from harvester.quality.verifiers.settings import VerifierSection
from harvester.quality.verifiers.verifiers import Candidate, Verifiers
from harvester.store.reader import Corpus
from tests.trainer import tiny
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from trainer.config import DataSection
from trainer.errors import DataError
from trainer.experiments.loop import Loop
from trainer.experiments.loop_config import load_loop
from trainer.experiments.pool import PoolPrompt, choose_hard, choose_random, in_order, read_pool
from trainer.harvester_process import toml_text

ROUNDS, ROWS = 2, 12
PROMPTS = Path(__file__).parents[3] / "prompts"


def skill_lines(name: str, count: int) -> list[str]:
    """Lines of the task `count`, whose answers are small numbers that a tiny student can guess."""
    lines = (PROMPTS / name).read_text(encoding="utf-8").splitlines()
    return [line for line in lines if json.loads(line)["task"] == "count"][:count]


def experiment(folder: Path, base_url: str, **keys: Any) -> Path:
    """A loop.toml over a pool of 90 prompts, of which 6 are held out, and 16 held-out prompts."""
    held_out = skill_lines("skills-held-out.jsonl", 16)
    train = skill_lines("skills-train.jsonl", 90)
    leaked = [json.dumps({**json.loads(line), "split": "train"}) for line in held_out[:6]]
    (folder / "held-out.jsonl").write_text("\n".join(held_out) + "\n")
    (folder / "pool.jsonl").write_text("\n".join([*leaked, *train]) + "\n")
    (folder / "harvest.toml").write_text(
        f'[teacher]\nbase_url = "{base_url}"\nmodel = "mock-teacher"\nterms = "mock-teacher"\n'
        "[teacher.price]\ninput = 0.15\noutput = 0.60\nas_of = 2026-11-01\n"
        '[prompts]\nfiles = ["held-out.jsonl"]\n[sampling]\ntemperature = 0.0\nmax_tokens = 64\n'
    )
    tiny.train_toml(folder, [], train={"epochs": 12, "save_every": 50}, evaluate={"max_new_tokens": 4})
    shutil.rmtree(folder / "store")
    return loop_toml(folder, **keys)


def loop_toml(folder: Path, **keys: Any) -> Path:
    values = {
        **{"harvest": "harvest.toml", "train": "train.toml", "pool": ["pool.jsonl"]},
        **{"rounds": ROUNDS, "rows_per_round": ROWS, "candidates": 40, "resamples": 200},
        **keys,
    }
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items()]
    (folder / "loop.toml").write_text("\n".join(lines) + "\n")
    return folder / "loop.toml"


def chosen(folder: Path) -> dict[str, list[str]]:
    """The contents of the chosen prompts, by file."""
    return {
        path.stem: [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
        for path in sorted((folder / "loop" / "chosen").glob("*.jsonl"))
    }


def figures(folder: Path) -> Any:
    return json.loads((folder / "loop" / "loop.json").read_text())


@pytest.fixture(scope="module")
def teacher() -> Iterator[RunningMock]:
    with start_in_thread(MockSettings(accuracy={EVERY_TASK: 0.9})) as mock:
        yield mock


@pytest.fixture(scope="module")
def finished(tmp_path_factory, teacher, fork_server) -> Path:
    """Folder of a finished loop. Look, don't touch."""
    folder = tmp_path_factory.mktemp("loop")
    ended = fork_server("command", words=["loop", experiment(folder, teacher.base_url)])
    assert ended["code"] == 0, ended["err"]
    return folder


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the finished loop that a test may change."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


@pytest.mark.slow
def test_a_loop_of_one_round_asks_trains_and_scores(run_trainer, tmp_path, teacher):  # noqa: F811
    toml = experiment(tmp_path, teacher.base_url, rounds=1, choose="random", rows_per_round=10)
    code, out, err = run_trainer("loop", toml, "--json")
    assert code == 0, err
    loop = json.loads(out)
    assert [(row["choose"], row["rows"], row["asked"]) for row in loop["rounds"]] == [("random", 10, 0)]
    assert loop["differences"] == []
    assert len(chosen(tmp_path)["first"]) == 10
    assert Corpus.open(tmp_path / "store").count() == 16 + 10
    assert (tmp_path / "loop" / "loop.html").read_text().count("<svg") == 1
    [page] = (tmp_path / "loop").glob("trainings/*/train.html")
    assert 'data-state="complete"' in page.read_text()
    assert "tokens/s" in err


@pytest.mark.slow
def test_each_round_asks_new_prompts_of_the_pool_and_never_a_held_out_one(finished):
    files = chosen(finished)
    assert files.keys() == {"first", "hard-2", "random-2"}
    held_out = {json.loads(line)["prompt"] for line in (finished / "held-out.jsonl").read_text().splitlines()}
    for arm in ("hard", "random"):
        prompts = [*files["first"], *files[f"{arm}-2"]]
        assert len(prompts) == len(set(prompts)) == ROUNDS * ROWS
        assert held_out.isdisjoint(prompts)
    assert files["hard-2"] != files["random-2"]


@pytest.mark.slow
def test_hard_prompts_are_those_that_the_student_failed(finished):
    loop = figures(finished)
    scores = [json.loads(path.read_text()) for path in finished.glob("loop/scores/*.json")]
    answers = [score["values"] for score in scores if len(score["values"]) == 40]  # those of the pool
    hard = [row for row in loop["rounds"] if row["choose"] == "hard" and row["round"] > 1]
    assert sorted(row["failed"] for row in hard) == sorted(values.count(0.0) for values in answers)
    for row in hard:
        assert row["asked"] == 40
        assert row["filled"] == max(0, ROWS - row["failed"])
    assert all(0 < row["failed"] < 40 for row in hard)  # the student could answer some


@pytest.mark.slow
def test_the_rounds_are_counted_and_paid_alike(finished):
    loop = figures(finished)
    assert (loop["schema"], loop["ending"], loop["pool"]) == ("trainer.loop/1", "complete", 90)
    assert [(row["choose"], row["round"]) for row in loop["rounds"]] == [
        (arm, number) for arm in ("hard", "random") for number in (1, 2)
    ]
    stored = {
        prompt_key(s.messages): s
        for s in Corpus.open(finished / "store").samples()
        if s.metadata["split"] == "train"
    }
    files = chosen(finished)
    for row in loop["rounds"]:
        assert row["rows"] == row["round"] * ROWS
        names = ["first", *(f"{row['choose']}-{number}" for number in range(2, row["round"] + 1))]
        prompts = [text for name in names for text in files[name]]
        samples = [stored[prompt_key([{"role": "user", "content": text}])] for text in prompts]
        assert row["dollars"] == pytest.approx(sum(s.cost_microusd for s in samples) / 1e6)
        right = sum(s.completion.strip() == s.reference for s in samples)
        assert row["learned"] == right <= row["rows"]  # wrong answers are paid for and not learned
    assert loop["differences"][0] == {"round": 1, "value": 0.0, "low": 0.0, "high": 0.0}
    assert len(loop["differences"]) == ROUNDS


@pytest.mark.slow
def test_the_page_shows_both_ways_of_choosing(finished):
    page = (finished / "loop" / "loop.html").read_text()
    assert page.count("<svg") == 1
    assert page.count('class="point one"') == page.count('class="point two"') == ROUNDS
    assert "<script" not in page


@pytest.mark.slow
def test_a_finished_loop_asks_and_trains_nothing_again(run_trainer, copied, teacher):  # noqa: F811
    before, asked = figures(copied), len(teacher.ledger()["entries"])
    code, out, err = run_trainer("loop", copied / "loop.toml", "--json")
    assert code == 0, err
    assert len(teacher.ledger()["entries"]) == asked
    assert err.count("done before") == 2 * ROUNDS
    assert figures(copied) == before
    assert json.loads(out)["ending"] == "complete"


@pytest.mark.slow
def test_the_choice_does_not_depend_on_held_out_answers(run_trainer, copied):  # noqa: F811
    """Other references of the held-out prompts change the scores, and no chosen prompt."""
    before, scored = chosen(copied), figures(copied)
    lines = [json.loads(line) for line in (copied / "held-out.jsonl").read_text().splitlines()]
    changed = [json.dumps({**line, "reference": "7"}) for line in lines]
    (copied / "held-out.jsonl").write_text("\n".join(changed) + "\n")
    shutil.rmtree(copied / "loop" / "scores")  # the student answers the pool once more
    shutil.rmtree(copied / "loop" / "chosen")
    code, _, err = run_trainer("loop", copied / "loop.toml")
    assert code == 0, err
    assert chosen(copied) == before
    assert figures(copied)["teacher"] != scored["teacher"]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["checkpoint.before_rename:2", "stages.trained:3", "stages.scored:4"])
def test_a_killed_loop_goes_on_to_the_same_figures(fork_server, finished, teacher, tmp_path, place):
    toml = experiment(tmp_path, teacher.base_url)
    ended = fork_server("command", words=["loop", toml], env={"HARVESTER_FAILPOINT": place})
    assert ended["signal"] == signal.SIGKILL, ended["err"]
    assert not (tmp_path / "loop" / "loop.json").exists()
    asked = len(teacher.ledger()["entries"])
    stored = Corpus.open(tmp_path / "store").count()
    ended = fork_server("command", words=["loop", toml], env={"HARVESTER_FAILPOINT": ""})
    assert ended["code"] == 0, ended["err"]
    assert figures(tmp_path) == figures(finished)
    assert chosen(tmp_path) == chosen(finished)
    added = Corpus.open(tmp_path / "store").count() - stored
    assert len(teacher.ledger()["entries"]) == asked + added  # nothing was asked twice


@pytest.mark.slow
def test_a_signal_lets_the_harvest_finish_what_it_has_asked(fork_server, mock_teacher, tmp_path):
    mock = mock_teacher(latency_s=0.3, accuracy=1.0)
    toml = experiment(tmp_path, mock.base_url, rounds=1, choose="random", rows_per_round=10)
    command = {"what": "command", "words": ["loop", toml]}
    ended = fork_server(**command, signal_when=[tmp_path / "store" / "journal.db", signal.SIGTERM])
    assert ended["code"] == 143, ended["err"]
    assert len(mock.ledger()["entries"]) == Corpus.open(tmp_path / "store").count()
    ended = fork_server(**command)
    assert ended["code"] == 0, ended["err"]
    assert len(mock.ledger()["entries"]) == 16 + 10


@pytest.mark.slow
def test_the_budget_of_the_whole_loop_ends_it(run_trainer, copied, teacher):  # noqa: F811
    """The store's ledger has paid for two rounds; a third would exceed the ceiling."""
    spent = sum(s.cost_microusd for s in Corpus.open(copied / "store").samples()) / 1e6
    asked = len(teacher.ledger()["entries"])
    code, out, err = run_trainer("loop", loop_toml(copied, rounds=3, max_usd=round(spent, 6)), "--json")
    assert code == 0, err
    assert json.loads(out)["ending"] == "budget"
    assert len(teacher.ledger()["entries"]) == asked
    assert max(row["round"] for row in json.loads(out)["rounds"]) == ROUNDS


def test_a_harvest_that_fails_ends_the_loop_with_its_exit_code(run_trainer, tmp_path, teacher):  # noqa: F811
    toml = experiment(tmp_path, teacher.base_url)
    harvest = (
        (tmp_path / "harvest.toml").read_text().replace('terms = "mock-teacher"', 'terms = "unknown-terms"')
    )
    (tmp_path / "harvest.toml").write_text(harvest)
    code, _, err = run_trainer("loop", toml)
    assert code == 77
    assert "the harvest ended with exit code 77" in err


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rows_per_rond": 1}, "did you mean 'rows_per_round'"),
        ({"candidates": 3}, "fewer than rows_per_round"),
        ({"train": "absent.toml"}, "no such file"),
        ({"pool": ["absent.jsonl"]}, "the pool can't be read"),
    ],
)
def test_a_wrong_loop_is_refused_in_words(run_trainer, tmp_path, teacher, keys, message):  # noqa: F811
    code, _, err = run_trainer("loop", experiment(tmp_path, teacher.base_url, **keys))
    assert (code, message in err) == (2, True), err


def test_a_training_that_reads_another_store_is_refused(run_trainer, tmp_path, teacher):  # noqa: F811
    toml = experiment(tmp_path, teacher.base_url)
    train = (tmp_path / "train.toml").read_text().replace('corpus = "store"', 'corpus = "other"')
    (tmp_path / "train.toml").write_text(train)
    code, _, err = run_trainer("loop", toml)
    assert (code, "another store" in err) == (2, True)


def prompt(number: int) -> PoolPrompt:
    return PoolPrompt(f"{number:064x}", f'{{"prompt": "{number}"}}', (), Candidate(None, "missing", "1"))


@settings(max_examples=100)
@given(
    passed=st.dictionaries(st.integers(0, 29), st.sampled_from([0.0, 1.0, None]), max_size=30),
    count=st.integers(1, 35),
)
def test_hard_prompts_come_first_and_random_ones_fill_up(passed, count):
    ordered = [prompt(number) for number in range(30)]
    choice = choose_hard(ordered, {f"{n:064x}": value for n, value in passed.items()}, count)
    keys = [int(each.key, 16) for each in choice.prompts]
    failed = [n for n in range(30) if passed.get(n) == 0.0]
    assert len(set(keys)) == len(keys) == min(count, 30)
    assert keys[: len(failed)] == failed[:count]
    assert choice.filled == len(keys) - min(count, len(failed))


@given(order=st.permutations(range(12)), taken=st.sets(st.integers(0, 11)), seed=st.integers(0, 3))
def test_the_order_of_the_pool_is_a_function_of_content_and_seed(order, taken, seed):
    keys = {f"{number:064x}" for number in taken}
    sorted_pool = in_order([prompt(number) for number in range(12)], keys, seed)
    assert in_order([prompt(number) for number in order], keys, seed) == sorted_pool
    assert keys.isdisjoint(each.key for each in sorted_pool)
    assert choose_random(sorted_pool, 3).prompts == tuple(sorted_pool[:3])


def read(tmp_path: Path, *lines: Any) -> list[PoolPrompt]:
    path = tmp_path / "pool.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    verifiers = Verifiers({"*": VerifierSection(kind="exact")}, tmp_path)
    return read_pool([path], "Be brief.", DataSection(corpus="c", eval_share=0.0), verifiers)


def test_the_pool_leaves_out_what_can_not_be_chosen(tmp_path):
    good = {"prompt": "one", "reference": "1"}
    prompts = read(
        tmp_path,
        good,
        {"prompt": "one", "reference": "1", "id": "again"},
        {"prompt": "of another split", "reference": "1", "split": "test"},
        {"prompt": "nobody can judge it"},
        {"prompt": "with a tool", "reference": "1", "tools": [{"type": "function"}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}], "reference": "1"},
        {
            "messages": [{"role": "system", "content": "Own."}, {"role": "user", "content": "two"}],
            "reference": "2",
        },
    )
    assert [json.loads(each.line) == good for each in prompts] == [True, False]
    assert [each.messages[0]["content"] for each in prompts] == ["Be brief.", "Own."]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (['{"prompt": '], "no JSON object"),
        (["[1]"], "no JSON object"),
        ([{"prompt": 3}], "neither a prompt nor messages"),
        ([{"prompt": "nobody can judge it"}], "none of 1 prompts"),
    ],
)
def test_a_pool_that_can_not_be_used_is_refused_with_its_place(tmp_path, lines, message):
    with pytest.raises(DataError, match=message) as caught:
        read(tmp_path, *lines)
    assert "pool.jsonl" in caught.value.place


VALUES = st.booleans() | st.integers(-(2**60), 2**60) | st.text() | st.floats(-1e9, 1e9) | st.dates()
LISTS = st.lists(VALUES, max_size=3) | st.lists(st.lists(VALUES, max_size=2), max_size=2)
TABLES = st.dictionaries(st.text(), VALUES | LISTS, max_size=3)


def test_answers_that_where_leaves_out_for_their_outcome_were_asked_and_paid(tmp_path):
    """Those of another teacher were not: their prompts may be chosen from the pool."""
    rows = [replace(row, cost_microusd=100, source_file="own.jsonl") for row in tiny.skill(6, held_out=1)]
    rows[:2] = [replace(row, outcome="truncated") for row in rows[:2]]
    rows[2:4] = [replace(row, tags=("other",)) for row in rows[2:4]]
    toml = experiment(tmp_path, "http://127.0.0.1:9/v1")
    tiny.corpus(tmp_path / "store", rows)
    train = (tmp_path / "train.toml").read_text()
    for where, counted in (
        ('{outcome = "ok", not = {tags = "other"}}', [0, 1, 4, 5]),
        ('{not = {tags = "other", outcome = "truncated"}}', [0, 1, 2, 3, 4, 5]),
    ):
        (tmp_path / "train.toml").write_text(train.replace("[data]", f"[data]\nwhere = {where}"))
        found, held_out = Loop(load_loop(toml))._read_store()
        assert {row.key for row in found} == {rows[number].key for number in counted}
        assert held_out == {prompt_key(rows[-1].messages)}


@settings(max_examples=50)
@given(st.dictionaries(st.text(min_size=1), VALUES | LISTS | TABLES | st.dictionaries(st.text(), TABLES)))
def test_a_configuration_survives_being_written(table):
    assert tomllib.loads(toml_text(table)) == table


def test_a_pool_prompt_is_judged_as_its_row_will_be():
    held = replace(prompt(1), messages=({"role": "user", "content": "x"},)).as_held_out()
    assert (held.split, held.teacher, held.reference) == ("pool", None, "1")
