"""Let a judge compare the answers of student and base with the teacher's (`[evaluate] judge`).

A judge is a teacher: `harvester judge` asks it, as a process, with its own configuration, limits, budget,
store and checks of terms, so that nothing is asked twice. Each pair is shown in both orders: an answer that
wins in one order and loses in the other ties. The pairs come from answers.jsonl, so the judge can go on, or
judge anew, without the models.
"""

from __future__ import annotations

import json
import os
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from harvester.quality.verifiers.wilson import wilson_limits
from harvester.store.reader import Corpus
from harvester.system.toml_file import read_toml
from trainer.config import TrainConfig
from trainer.data.spread import spread
from trainer.errors import ConfigError, DataError, HarvestFailed
from trainer.evaluation import intervals, text_scores
from trainer.evaluation.answers_file import WrittenAnswers
from trainer.files import read_json, write_json, write_lines, write_text
from trainer.harvester_process import DONE, ending_of, run_harvester, toml_text

KEY = "preferences"
FOLDER = "judge"
MODELS = ("student", "base")
_HOW_TO_GO_ON = "`trainer evaluate --judge-only` goes on, without the models"
# Keys of [judge] that hold for any pairs.
_KEPT_KEYS = frozenset({"pairs", "rubric", "lowest", "highest"})
# What an answer gets for the verdict on its pair.
_POINTS = {"win": 1.0, "tie": 0.5, "loss": 0.0}


@dataclass(frozen=True, slots=True)
class JudgedPair:
    """An answer beside the teacher's to the same prompt.

    Attributes:
        model: whose answer it is, "student" or "base".
        prompt: number of the prompt in answers.jsonl.
        winner: "win" if the answer was preferred to the teacher's; None: not judged.
        reason: why the judge was not asked: "equal", "blank"; "" if it was.
        key: of the pair in verdicts.jsonl; orders: the winner in each order that was judged.
    """

    model: str
    prompt: int
    task: str
    tags: tuple[str, ...]
    winner: str | None = None
    reason: str = ""
    key: str = ""
    orders: tuple[tuple[str, str], ...] = ()

    @property
    def points(self) -> float | None:
        """1 for a win, 0.5 for a tie, 0 for a loss; None: not judged."""
        return None if self.winner is None else _POINTS[self.winner]


def judge(config: TrainConfig) -> dict[str, Any]:
    """Ask the judge about the answers of the last evaluation, and add the result to scorecard.json.

    Returns:
        The whole scorecard. Its "preferences" are what `facts` returns, with `judge`, who it is;
        `is_teacher`, whether it answered the corpus, too; `ending`, `detail` (why) and `exit_code` of its
        harvest.

    Raises:
        ConfigError: no judge is named, or its configuration can't be used.
        DataError: there is no evaluation, or one of an earlier version.
        HarvestFailed: the judge could not be asked at all.
    """
    table, path = judge_table(config)
    scorecard = config.out_path / "scorecard.json"
    card = read_json(scorecard)
    rows = WrittenAnswers(config.out_path)
    if not isinstance(card, dict) or not rows:
        raise DataError("there is no scorecard", place=str(scorecard), remedy="run `trainer evaluate` first")
    chosen = _chosen(rows, str(card.get("split", "")), config.evaluate.judge_prompts)
    folder = config.out_path / FOLDER
    pairs_file, verdicts_file = folder / "pairs.jsonl", folder / "verdicts.jsonl"
    write_lines(pairs_file, map(json.dumps, _lines(rows, chosen)))
    verdicts_file.unlink(missing_ok=True)
    own = path.with_name(f"{path.stem}.evaluate.toml")
    section = {**table.get("judge", {}), "pairs": os.path.relpath(pairs_file, path.parent)}
    own_table = {**table, "judge": {key: value for key, value in section.items() if key in _KEPT_KEYS}}
    write_text(own, f"# Written by `trainer evaluate`, and overwritten by it.\n{toml_text(own_table)}")
    code, summary = run_harvester("judge", own, "--verdicts", verdicts_file)
    if not verdicts_file.is_file():
        raise HarvestFailed(code, _HOW_TO_GO_ON, *ending_of(summary))
    judged = _with_verdicts(_pairs(rows, chosen), verdicts_file)
    identity = str(summary.get("judge", ""))
    card[KEY] = {
        "judge": identity,
        "is_teacher": identity in {lineage.teacher_id for lineage in Corpus.open(config.corpus).lineages()},
        **facts(judged),
        "repaired": summary.get("repaired", 0),
        "ending": summary.get("ending", "complete"),
        "detail": summary.get("detail", ""),
        "exit_code": code,
    }
    write_json(scorecard, card)
    return card


def require_complete(card: Mapping[str, Any], how_to_go_on: str = _HOW_TO_GO_ON) -> None:
    """Do nothing if the judge was asked about all pairs.

    Raises:
        HarvestFailed: it ended early; has its exit code.
    """
    code = int(card[KEY]["exit_code"])
    if code not in DONE:
        raise HarvestFailed(code, how_to_go_on, *ending_of(card[KEY]))


def judge_table(config: TrainConfig) -> tuple[dict[str, Any], Path]:
    """Return the judge's configuration without its prompts, and the path of its file.

    Raises:
        ConfigError: no judge is named; it is broken, shares the store of the corpus, or scores single answers
            by a rubric of its own.
    """
    if not config.evaluate.judge:
        raise ConfigError(
            "no judge is named",
            place="evaluate.judge",
            remedy='set [evaluate] judge = "judge.toml", the configuration of a teacher that judges',
        )
    path = config.root / config.evaluate.judge
    table = read_toml(path, "[evaluate] judge names a harvest.toml whose teacher judges").table
    prompts, store, section = (table.get(name, {}) for name in ("prompts", "store", "judge"))
    if not all(isinstance(each, dict) for each in (prompts, store, section)):
        raise ConfigError(
            "[prompts], [store] and [judge] are tables",
            place=str(path),
            remedy='write [store] on a line of its own, then path = "judged"',
        )
    if (path.parent / str(store.get("path", "store"))).resolve() == config.corpus.resolve():
        raise ConfigError(
            "the judge would write into the corpus",
            place=str(path),
            remedy='give it a store of its own: [store] path = "judged"',
        )
    if "rubric" in section and "corpus" in section and "against" not in section:
        raise ConfigError(
            "the judge's rubric scores single answers, and pairs are to be compared",
            place=str(path),
            remedy="name a configuration without [judge] rubric, or with a rubric for pairs and no corpus",
        )
    kept = {key: value for key, value in prompts.items() if key == "system"}
    table = {key: value for key, value in table.items() if key != "prompts"}
    return table | ({"prompts": kept} if kept else {}), path


def _chosen(rows: Sequence[Mapping[str, Any]], split: str, most: int) -> list[int]:
    """Return the numbers of the prompts to judge: those of the split that the teacher answered."""
    answered, of_split, has_split = array("q"), array("q"), False
    for number, row in enumerate(rows):
        is_of_split = row["split"] == split
        has_split = has_split or is_of_split
        if (row["teacher"] or "").strip():
            answered.append(number)
            if is_of_split:
                of_split.append(number)
    numbers = of_split if has_split else answered
    return spread(numbers, most or len(numbers))


def _pairs(
    rows: Sequence[Mapping[str, Any]], chosen: Sequence[int]
) -> Iterator[tuple[JudgedPair, Mapping[str, Any]]]:
    """Yield each pair with its line; those that need no judge have their winner. A blank answer loses."""
    for n in chosen:
        row = rows[n]
        for model in MODELS:
            pair = JudgedPair(model, n, row["task"], tuple(row["tags"]))
            if row[model].strip() == row["teacher"].strip():
                yield replace(pair, winner="tie", reason="equal"), row
            elif not row[model].strip():
                yield replace(pair, winner="loss", reason="blank"), row
            else:
                yield pair, row


def _lines(rows: Sequence[Mapping[str, Any]], chosen: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield the lines for `harvester judge`: the pairs that need a judge."""
    for pair, row in _pairs(rows, chosen):
        if not pair.reason:
            yield {
                "id": _id(pair),
                "messages": row["messages"],
                "answer": row[pair.model],
                "other": row["teacher"],
                "reference": row["reference"],
                "metadata": {"task": row["task"], "tags": row["tags"]},
            }


def _id(pair: JudgedPair) -> str:
    return f"{pair.model} {pair.prompt}"


def _with_verdicts(
    pairs: Iterator[tuple[JudgedPair, Mapping[str, Any]]], verdicts_file: Path
) -> list[JudgedPair]:
    """Return the pairs with what the judge said of them."""
    verdicts = {}
    with verdicts_file.open(encoding="utf-8") as lines:
        for line in lines:
            if line.strip():
                verdict = json.loads(line)
                orders = tuple(sorted(verdict["orders"].items()))
                verdicts[verdict["id"]] = (verdict["winner"], verdict["key"], orders)
    judged = []
    for pair, _ in pairs:
        if (verdict := verdicts.get(_id(pair))) is not None:
            winner, key, orders = verdict
            pair = replace(pair, winner=winner, key=key, orders=orders)
        judged.append(pair)
    return judged


def facts(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """Count verdicts by model, task and tag, and measure the bias to a position.

    Returns:
        `pairs.student_vs_teacher` and `pairs.base_vs_teacher`, each with `prompts`, `win`, `tie`, `loss`, of
        these `equal` and `blank` without asking, `not_judged`, and `win_rate` {value, low, high}; the same by
        `tasks.<task>` and `tags.<tag>`. `student_minus_base`, the paired difference of their win rates.
        `position`: see `_position`.
    """
    by_model = {model: [pair for pair in pairs if pair.model == model] for model in MODELS}
    points = {model: {pair.prompt: pair.points for pair in of_model} for model, of_model in by_model.items()}
    prompts = sorted(points["student"])
    return {
        "pairs": {
            f"{model}_vs_teacher": {
                **_counts(of_model),
                **{
                    kind: {name: _counts([of_model[n] for n in group]) for name, group in groups.items()}
                    for kind, groups in (
                        ("tasks", text_scores.by_task(of_model)),
                        ("tags", text_scores.by_tag(of_model)),
                    )
                },
            }
            for model, of_model in by_model.items()
        },
        "student_minus_base": intervals.difference_of_points(
            [points["student"][n] for n in prompts], [points["base"][n] for n in prompts]
        ),
        "position": _position(pairs),
    }


def _counts(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    points = [pair.points for pair in pairs if pair.points is not None]
    return {
        "prompts": len(pairs),
        **{winner: sum(pair.winner == winner for pair in pairs) for winner in _POINTS},
        **{reason: sum(pair.reason == reason for pair in pairs) for reason in ("equal", "blank")},
        "not_judged": len(pairs) - len(points),
        "win_rate": win_rate(points),
    }


def win_rate(points: Sequence[float]) -> dict[str, float] | None:
    """Return the mean of points with its 95 % interval; None without any.

    The interval is Wilson's for as many wins as there are points. Ties vary less than wins and losses do, so
    with ties it is wider than it need be; unlike a bootstrap it is no single point where all pairs tie.
    """
    if not points:
        return None
    low, high = wilson_limits(sum(points), len(points))
    return {"value": sum(points) / len(points), "low": low, "high": high}


def _position(pairs: Sequence[JudgedPair]) -> dict[str, Any]:
    """Return how much the order decides.

    Returns:
        `comparisons`, replies with a verdict, each pair in two orders; `decided`, those that are no tie;
        `first_wins` {value, low, high}, the share of these that the answer shown first won: 0.5 is fair;
        `order_decided`, pairs in which the same place won in both orders, of `pairs`.
    """
    asked = {pair.key: pair.orders for pair in pairs if pair.key}
    replies = [reply for orders in asked.values() for reply in orders]
    decided = [(order, winner) for order, winner in replies if winner != "tie"]
    firsts = sum((winner == "win") == (order == "ab") for order, winner in decided)
    places = [{winner for _, winner in orders} for orders in asked.values()]
    return {
        "pairs": len(asked),
        "comparisons": len(replies),
        "decided": len(decided),
        "first_wins": win_rate([1.0] * firsts + [0.0] * (len(decided) - firsts)),
        "order_decided": places.count({"win", "loss"}),
    }


def lines(preferences: Mapping[str, Any]) -> list[str]:
    """Return what the judge said, for people."""
    shown = []
    for model in MODELS:
        counts = preferences["pairs"][f"{model}_vs_teacher"]
        if rate := counts["win_rate"]:
            shown.append(
                f"judge: {model} against the teacher {rate['value']:.1%} "
                f"({rate['low']:.0%}–{rate['high']:.0%}; {counts['win']:,} won, {counts['tie']:,} tied, "
                f"{counts['loss']:,} lost; ties count half)"
            )
        if counts["not_judged"]:
            shown.append(f"judge: {counts['not_judged']:,} answers of the {model} are not judged")
    position = preferences["position"]
    if first := position["first_wins"]:
        shown.append(
            f"judge: the answer shown first won {first['value']:.1%} of the decided comparisons "
            f"({first['low']:.0%}–{first['high']:.0%}; 50 % is fair); {position['order_decided']:,} of "
            f"{position['pairs']:,} pairs were decided by the order alone and count as ties"
        )
    if preferences["is_teacher"]:
        shown.append("judge: it is the teacher itself, and models tend to prefer their own answers")
    return shown
