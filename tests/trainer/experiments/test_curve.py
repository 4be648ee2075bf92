"""Walk `trainer curve` through the command line: caches, kills, refusals, and what the files say."""

from __future__ import annotations

import json
import re
import shutil
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer import tiny
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from trainer import config as train_config
from trainer.data import dataset
from trainer.data.chat_template import Renderer
from trainer.data.held_out import held_out_examples
from trainer.evaluation import evaluate
from trainer.experiments import curve_report
from trainer.experiments.curve import measure_curve
from trainer.experiments.curve_config import load_curve
from trainer.experiments.subsets import PaidRows, nested_subsets, plan_curve
from trainer.model import model
from trainer.training.train import train

SIZES = (6, 12, 24, 48)
NAME = "<b>it's & me"


def experiment(folder: Path, **keys: object) -> Path:
    """A curve.toml over a small corpus of 48 rows at $0.00015 and 8 held-out prompts."""
    rows = [replace(row, cost_microusd=150) for row in tiny.skill(48, held_out=8)]
    settings = {"epochs": 2, "save_every": 2}
    tiny.train_toml(folder, rows, train=settings, out={"path": "unused", "name": NAME})
    return curve_toml(folder, **keys)


def curve_toml(folder: Path, **keys: object) -> Path:
    values = {"train": "train.toml", "rows": list(SIZES), "measure": "loss", "resamples": 200, **keys}
    lines = [f"{name} = {json.dumps(value)}" for name, value in values.items() if value is not None]
    (folder / "curve.toml").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder / "curve.toml"


def trainings(folder: Path) -> dict[str, int]:
    """When each training of an experiment was finished, in nanoseconds, by its folder's name."""
    return {
        path.parent.name: path.stat().st_mtime_ns for path in folder.glob("curve/trainings/*/trained.json")
    }


def scores(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("curve/scores/*.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """Folder of a finished experiment. Look, don't touch."""
    folder = tmp_path_factory.mktemp("curve")
    config, to_train, out = load_curve(experiment(folder))
    result = measure_curve(plan_curve(config, to_train, out))
    curve_report.write(result, out, to_train.name)
    return folder


@pytest.fixture
def copied(finished, tmp_path) -> Path:
    """A copy of the finished experiment that a test may change."""
    shutil.copytree(finished, tmp_path / "copy")
    return tmp_path / "copy"


def test_the_figures_are_those_of_evaluate_and_of_the_ledger(finished):
    curve = json.loads((finished / "curve" / "curve.json").read_text())
    assert curve["schema"] == "trainer.curve/1"
    assert [point["rows"] for point in curve["points"]] == list(SIZES)
    assert [point["dollars"] for point in curve["points"]] == pytest.approx([s * 150e-6 for s in SIZES])
    assert curve["price"] == {"dollars_per_row": pytest.approx(150e-6), "rows": 48, "unpriced": 0}
    assert curve["next"]["rows"] == pytest.approx(1 / 150e-6)
    assert curve["doubling"]["dollars"] == pytest.approx(48 * 150e-6)
    assert curve["held_out"] == {"split": "held_out", "prompts": 8, "scored": 8, "smallest_task": 8}
    config = train_config.load(finished / "train.toml")
    renderer = Renderer(model.load_tokenizer(config.base))
    examples = held_out_examples(dataset.read(config).held_out, renderer, config)
    base = model.load_base(config.base, model.select_device(config.train))
    assert curve["base"] == pytest.approx(evaluate.held_out_loss(base, examples, config), rel=1e-5)
    for point in curve["points"]:
        assert point["low"] <= point["score"] <= point["high"]
        assert 0 < point["score"] < curve["base"]
    assert len({point["steps"] for point in curve["points"]}) == 1  # sizes differ in their rows alone
    assert curve["points"][0]["steps"] > 1
    stops = curve["next"]["gain"]["low"] <= 0
    assert (curve["verdict"] == "stop here") is stops


def test_a_stage_scores_the_adapter_that_a_training_of_the_subset_makes(finished, tmp_path):
    """The largest subset is the whole corpus, so it is the same as `trainer train` without a curve."""
    config = train_config.load(finished / "train.toml")
    whole = config.model_copy(update={"out": train_config.OutSection(path=str(tmp_path / "out"))})
    trained = train(whole)
    student = model.load_trained_student(whole, Path(trained.adapter), model.select_device(config.train))
    renderer = Renderer(model.load_tokenizer(config.base))
    examples = held_out_examples(dataset.read(config).held_out, renderer, config)
    curve = json.loads((finished / "curve" / "curve.json").read_text())
    loss = evaluate.held_out_loss(student, examples, config)
    assert curve["points"][-1]["score"] == pytest.approx(loss, rel=1e-5)


def test_the_page_has_a_plot_and_no_markup_of_others(finished):
    page = (finished / "curve" / "curve.html").read_text()
    assert page.count("<svg") == 1
    assert page.count('class="point one"') == len(SIZES)
    assert "<b>it" not in page
    assert "&lt;b&gt;it&#39;s &amp; me" in page
    assert "<script" not in page
    assert "default-src 'none'" in page
    assert ("stop here" in page) or ("go on" in page)


def test_a_finished_curve_is_read_again_without_torch_work(run_trainer, copied):  # noqa: F811
    before, scored = trainings(copied), scores(copied)
    figures = (copied / "curve" / "curve.json").read_text()
    code, out, err = run_trainer("curve", copied / "curve.toml", "--json")
    assert code == 0, err
    assert err.count("done before") == len(SIZES)
    assert (trainings(copied), scores(copied)) == (before, scored)
    assert (copied / "curve" / "curve.json").read_text() == figures
    assert json.loads(out)["verdict"] in {"stop here", "go on"}


def test_a_change_repeats_only_what_depends_on_it(run_trainer, copied):  # noqa: F811
    before, scored = trainings(copied), scores(copied)
    curve_toml(copied, rows=[6, 12, 24, 36, 48], measure="accuracy", next_dollars=0.01, resamples=150)
    code, out, err = run_trainer("curve", copied / "curve.toml", "--json")
    assert code == 0, err
    added = trainings(copied).keys() - before.keys()
    assert len(added) == 1  # that of the new size
    assert {name: trainings(copied)[name] for name in before} == before
    assert len(scores(copied) - scored) == 6  # another measure: all are scored anew, and the base
    curve = json.loads(out)
    assert curve["measure"] == "accuracy"
    assert all(0 <= point["score"] <= 1 for point in curve["points"])
    assert curve["teacher"] == 1.0  # its answers are the references
    assert curve["next"]["dollars"] == pytest.approx(0.01)


def test_each_training_shows_its_view_and_is_the_same_without_it(run_trainer, copied):  # noqa: F811
    """The finished experiment was made without one: two of its trainings are made again with it."""
    folders = sorted((copied / "curve" / "trainings").iterdir())[:2]
    adapters = [folder / "adapter" / "adapter_model.safetensors" for folder in folders]
    before = [adapter.read_bytes() for adapter in adapters]
    for folder in folders:
        assert not (folder / "train.html").exists()
        shutil.rmtree(folder)
    points = json.loads((copied / "curve" / "curve.json").read_text())["points"]
    code, out, err = run_trainer("curve", copied / "curve.toml", "--json")
    assert code == 0, err
    assert [adapter.read_bytes() for adapter in adapters] == before
    assert json.loads(out)["points"] == points
    pages = [(folder / "train.html").read_text() for folder in folders]
    assert all('data-state="complete"' in page and "<svg" in page for page in pages)
    titles = {re.search(r"training \d of 4, \d+ rows, seed 0", page).group() for page in pages}
    assert len(titles) == 2
    for title in titles:
        assert re.search(
            rf"curve: (\d+)/\1 steps or prompts, {title}, epoch \d+, loss [\d.]+, [\d,]+ tokens/s", err
        )
    assert err.count("cpu, base float32") == 1  # a note of both


def test_steps_can_follow_the_rows_of_each_size(run_trainer, copied):  # noqa: F811
    before = trainings(copied)
    code, out, err = run_trainer("curve", curve_toml(copied, steps="epochs"), "--json")
    assert code == 0, err
    curve = json.loads(out)
    steps = [point["steps"] for point in curve["points"]]
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]
    assert len(trainings(copied)) == len(before) + len({s for s in steps if s < steps[-1]})
    assert "fewer rows had fewer steps" in (copied / "curve" / "curve.html").read_text()


def test_a_gain_below_the_least_gain_stops_too(run_trainer, copied):  # noqa: F811
    curve_toml(copied, least_gain=1000.0)
    code, out, err = run_trainer("curve", copied / "curve.toml")
    assert code == 0, err
    assert "stop here" in out.splitlines()[-2]


@pytest.mark.slow
def test_each_seed_has_a_chain_of_subsets_and_trainings(run_trainer, copied):  # noqa: F811
    before = trainings(copied)
    code, out, err = run_trainer("curve", curve_toml(copied, seeds=[0, 5]), "--json")
    assert code == 0, err
    curve = json.loads(out)
    assert len(trainings(copied)) == len(before) + len(SIZES)
    for point in curve["points"]:
        assert len(set(point["by_seed"])) == 2
        assert point["score"] == pytest.approx(sum(point["by_seed"]) / 2)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["checkpoint.before_rename:2", "stages.trained", "stages.scored"])
def test_a_killed_curve_goes_on(fork_server, finished, copied, place):
    """One stage of four is missing; the process is killed in it, and the next run makes it whole."""
    killed = oldest_training(copied)
    (copied / "curve" / "trainings" / killed / "trained.json").unlink()
    shutil.rmtree(copied / "curve" / "trainings" / killed / "adapter")
    score_of(copied, killed).unlink()
    (copied / "curve" / "curve.json").unlink()
    before = trainings(copied)
    command = {"what": "command", "words": ["curve", copied / "curve.toml"]}
    ended = fork_server(**command, env={"HARVESTER_FAILPOINT": place})
    assert ended["signal"] == signal.SIGKILL, ended["err"]
    assert not (copied / "curve" / "curve.json").exists()
    checkpoints = list((copied / "curve" / "trainings" / killed / "checkpoints").glob("step-*"))
    assert bool(checkpoints) is (place != "stages.scored")
    ended = fork_server(**command, env={"HARVESTER_FAILPOINT": ""})
    assert (ended["signal"], ended["code"]) == (0, 0), ended["err"]
    assert {name: trainings(copied)[name] for name in before} == before
    figures = [(folder / "curve" / "curve.json").read_text() for folder in (copied, finished)]
    assert figures[0] == figures[1]


def score_of(folder: Path, training: str) -> Path:
    """The file with the score of a training."""
    files = folder.glob("curve/scores/*.json")
    return next(f for f in files if (json.loads(f.read_text())["training"] or "").startswith(training))


def oldest_training(folder: Path) -> str:
    """The training that the command makes first."""
    done = trainings(folder)
    return min(done, key=lambda name: done[name])


@pytest.mark.parametrize(
    ("keys", "code", "message"),
    [
        ({"rows": [6, 12, 12, 24]}, 2, "4 different sizes at least, there are 3"),
        ({"rows": [6, 12, 24, 49]}, 2, "a size is 49, but the training split has 48 rows"),
        ({"seeds": [1, 1]}, 2, "a seed is named twice"),
        ({"meassure": "loss"}, 2, "did you mean 'measure'"),
        ({"train": "absent.toml"}, 2, "no such file"),
    ],
)
def test_a_wrong_curve_is_refused_in_words(run_trainer, copied, keys, code, message):  # noqa: F811
    curve_toml(copied, **keys)
    ended, _, err = run_trainer("curve", copied / "curve.toml")
    assert ended == code
    assert message in err
    assert "where" in err


def rerun(run_trainer, folder: Path, corpus: list, lineages: list | None = None, **keys: object):  # noqa: F811
    shutil.rmtree(folder / "store")
    tiny.corpus(folder / "store", corpus, lineages)
    return run_trainer("curve", curve_toml(folder, **keys))


def test_without_held_out_rows_it_is_refused(run_trainer, copied):  # noqa: F811
    code, _, err = rerun(run_trainer, copied, tiny.skill(48))
    assert (code, "no prompt is held out" in err) == (2, True)


def test_a_corpus_that_is_too_small_for_the_sizes_is_refused(run_trainer, copied):  # noqa: F811
    code, _, err = rerun(run_trainer, copied, tiny.skill(7, held_out=2), rows=None)
    assert (code, "too few for a curve" in err) == (2, True)


def test_terms_that_do_not_permit_training_are_refused(run_trainer, copied):  # noqa: F811
    rows = [replace(row, terms_id="unknown-terms") for row in tiny.skill(48, held_out=8)]
    lineages = [tiny.lineage(terms_id="unknown-terms")]
    code, _, err = rerun(run_trainer, copied, rows, lineages)
    assert code == 77
    assert "terms" in err


def test_rows_without_a_price_give_rows_instead_of_dollars(run_trainer, copied):  # noqa: F811
    rows = [replace(row, cost_microusd=150 * (n > 4)) for n, row in enumerate(tiny.skill(48, held_out=8))]
    before = trainings(copied)
    code, out, err = rerun(run_trainer, copied, rows, next_rows=30)
    assert code == 0, err
    assert trainings(copied) == before  # a price changes no training
    assert "5 of 48 rows have no cost" in out
    assert "the next 30 rows" in out
    assert "$" not in out


def paid_rows(answers: list[int]) -> PaidRows:
    keys = {f"prompt {n}": tuple(f"{n}/{k}" for k in range(count)) for n, count in enumerate(answers)}
    return PaidRows({key: 1 for of in keys.values() for key in of}, keys)


@settings(max_examples=50)
@given(
    answers=st.lists(st.integers(1, 5), min_size=4, max_size=40),
    seed=st.integers(0, 9),
    shares=st.sets(st.integers(1, 100), min_size=2, max_size=6),
)
def test_a_smaller_subset_is_contained_in_every_larger_one(answers, seed, shares):
    paid = paid_rows(answers)
    sizes = sorted({max(1, share * len(paid.costs) // 100) for share in shares})
    subsets = nested_subsets(paid, sizes, seed)
    for size, subset in zip(sizes, subsets, strict=True):
        assert size <= len(subset) < size + max(answers)
        for keys in paid.keys_by_prompt.values():
            assert subset.issuperset(keys) or subset.isdisjoint(keys)
    for smaller, larger in pairwise(subsets):
        assert smaller <= larger
    turned = PaidRows(paid.costs, dict(reversed(paid.keys_by_prompt.items())))
    assert nested_subsets(turned, sizes, seed) == subsets  # the order in the store does not matter


def test_another_seed_gives_another_order():
    paid = paid_rows([1] * 40)
    first, second = (nested_subsets(paid, [20], seed)[0] for seed in (0, 1))
    assert first != second


def test_held_out_prompts_are_in_no_subset(tmp_path):
    rows = tiny.skill(20, held_out=5)
    leaked = replace(rows[20], key=f"{900:064x}", metadata_json='{"task": "reverse", "split": "train"}')
    tiny.train_toml(tmp_path, [*rows, leaked])
    plan = plan_curve(*load_curve(curve_toml(tmp_path, rows=[2, 5, 10, 20])))
    assert plan.subsets[0][-1] == {row.key for row in rows[:20]}


def test_rows_that_where_leaves_out_are_neither_counted_nor_paid(tmp_path):
    rows = [replace(row, cost_microusd=100) for row in tiny.skill(20, held_out=5)]
    others = [
        replace(row, key=f"{900 + number:064x}", cost_microusd=9000, tags=("other",))
        for number, row in enumerate(rows)
    ]
    tiny.train_toml(tmp_path, [*rows, *others])
    toml = (tmp_path / "train.toml").read_text()
    (tmp_path / "train.toml").write_text(toml.replace("[data]", '[data]\nwhere = {not = {tags = "other"}}'))
    plan = plan_curve(*load_curve(curve_toml(tmp_path, rows=[2, 5, 10, 20])))
    assert [len(of) for of in plan.subsets[0]] == [2, 5, 10, 20]
    assert plan.subsets[0][-1] == {row.key for row in rows[:20]}
    assert plan.paid.dollars_per_row == pytest.approx(1e-4)


@pytest.mark.parametrize(
    "where",
    ['{not = {outcome = "truncated"}}', '{outcome = "ok"}', '{not = {model = "a", outcome = "truncated"}}'],
)
def test_rows_that_where_leaves_out_for_their_outcome_were_paid(tmp_path, where):
    rows = [replace(row, cost_microusd=100, request_model="a") for row in tiny.skill(40, held_out=5)]
    rows[20:40] = [replace(row, outcome="truncated", cost_microusd=9000) for row in rows[20:40]]
    tiny.train_toml(tmp_path, rows)
    toml = (tmp_path / "train.toml").read_text()
    (tmp_path / "train.toml").write_text(toml.replace("[data]", f"[data]\nwhere = {where}"))
    paid = plan_curve(*load_curve(curve_toml(tmp_path, rows=[5, 10, 20, 40]))).paid
    assert (len(paid.costs), paid.dollars_per_row) == (40, pytest.approx(0.00455))


@pytest.mark.parametrize(
    ("low", "shown"),
    [(0.000001, "+0.0001 points"), (0.0, "+0.00 to"), (-0.02, "-2.00 to +5.00"), (0.012, "+1.20 to +5.00")],
)
def test_a_gain_that_decides_the_verdict_is_not_shown_as_zero(low: float, shown: str) -> None:
    """ "go on: +0.00 (+0.00 to ...)" is no reason."""
    text = curve_report.gain_text({"value": max(low, 0.0), "low": low, "high": 0.05}, "accuracy")
    assert shown in text
