"""Read what a judge said of the answers of a corpus, and filter rows by it.

A judge is a teacher whose configuration has `[judge]`. Its store holds its replies like any answers; here
they become a score of each row, or which of two answers won. Only replies to the present rubric, scale and
model count: earlier ones stay in the store.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from harvester.config import config as settings
from harvester.config.config import HarvestConfig
from harvester.config.judge_section import JudgeSection
from harvester.errors import ConfigError
from harvester.export.drops import Drop, Filter
from harvester.quality.verifiers.wilson import wilson_limits
from harvester.store import terms_check
from harvester.store.reader import Corpus, holds_answers
from harvester.store.shards.schema import Sample
from harvester.system.command_line.shell_words import shell_word
from harvester.system.files import sha256_of

# Field of a judge's prompt that says what it judges; it is metadata, which is never sent.
FIELD = "judges"
Order = Literal["", "ab", "ba"]
Winner = Literal["win", "tie", "loss"]
_COLUMNS = ("key", "completion", "outcome", "metadata_json", "request_model", "sample_index")
_DECODER = json.JSONDecoder()
# Places of a reply where an object may begin; the rest of a reply with more is not looked at.
_MOST_TRIES = 1000
_WINNERS: Mapping[str, Mapping[Order, Winner]] = {
    "A": {"ab": "win", "ba": "loss"},
    "B": {"ab": "loss", "ba": "win"},
    "TIE": {"ab": "tie", "ba": "tie"},
}
_POINTS: Mapping[Winner, int] = {"win": 1, "tie": 0, "loss": -1}
_FILTER_REMEDY = '{judge = {config = "judge.toml", at_least = 7}}, or keep = ["win", "tie"] for pairs'


@dataclass(frozen=True, slots=True)
class Task:
    """What one prompt of the judge asks.

    Attributes:
        row: key of the row that is judged, in hexadecimal digits.
        order: of the two answers: "ab" shows the row's own first, "ba" second; "" for a score.
        rubric: see `rubric_id`.
        is_repair: whether it asks once more, after a reply that named no verdict.
    """

    row: str
    order: Order
    rubric: str
    is_repair: bool = False

    @property
    def prompt_id(self) -> str:
        """The id of the prompt line."""
        return ".".join(
            [self.row, self.order or "score", self.rubric, *(["repair"] if self.is_repair else [])]
        )

    def as_field(self) -> dict[str, Any]:
        """Return it as metadata of the prompt line."""
        return {"row": self.row, "order": self.order, "rubric": self.rubric, "repair": self.is_repair}

    @classmethod
    def of(cls, sample: Sample) -> Task | None:
        """Return what a row of the judge's store answers, None if it is no reply of a judge."""
        value = sample.metadata.get(FIELD)
        if not isinstance(value, dict):
            return None
        row, order, rubric = value.get("row"), value.get("order"), value.get("rubric")
        if not isinstance(row, str) or not isinstance(rubric, str) or order not in ("", "ab", "ba"):
            return None
        return cls(row, order, rubric, value.get("repair") is True)


def rubric_id(section: JudgeSection, root: Path) -> str:
    """Return 16 hexadecimal digits over everything that gives a reply its meaning: rubric, scale, way.

    Raises:
        ConfigError: the rubric can't be read.
    """
    path = section.rubric_path(root)
    try:
        content = sha256_of(path)
    except OSError as error:
        raise ConfigError(
            f"the rubric can't be read: {error.strerror}",
            place=str(path),
            remedy="[judge] rubric names a jinja2 file beside the configuration; leave it out for the "
            "shipped one",
        ) from None
    way = [content, section.lowest, section.highest, section.compares]
    return hashlib.sha256(json.dumps(way).encode()).hexdigest()[:16]


def read_reply(text: str, section: JudgeSection, order: Order) -> float | Winner | None:
    """Return the score or the winner that a reply names; None if it names none.

    The reply is the JSON object that was asked for, also in a code block or after some words; of several the
    last one counts. A score outside the scale is none.
    """
    member = "winner" if order else "score"
    named = [value[member] for value in _objects(text) if member in value]
    if not named:
        return None
    value = named[-1]
    if order:
        return _WINNERS.get(value.strip().upper(), {}).get(order) if isinstance(value, str) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if section.lowest <= value <= section.highest else None


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects in a text, from the first on; none that lies within another."""
    at, tries = text.find("{"), 0
    while at >= 0 and tries < _MOST_TRIES:
        tries += 1
        try:
            value, end = _DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            end = at + 1
        else:
            if isinstance(value, dict):
                yield value
        at = text.find("{", end)


@dataclass(slots=True)
class _Replies:
    """All that was said of one row."""

    score: float | None = None
    winners: dict[Order, Winner] = field(default_factory=dict)


@dataclass(slots=True)
class Verdicts:
    """What a judge said of the rows of a corpus.

    Attributes:
        unreadable: tasks whose reply names no verdict, also after a repair.
        repaired: replies that were read only after the judge was asked for JSON once more.
        firsts, seconds: how often the answer shown first, or second, won.
    """

    unreadable: set[Task] = field(default_factory=set)
    repaired: int = 0
    firsts: int = 0
    seconds: int = 0
    _rows: dict[str, _Replies] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(self.score(row) is not None or self.winner(row) is not None for row in self._rows)

    def score(self, row: str) -> float | None:
        """Return the score of a row; None without one."""
        replies = self._rows.get(row)
        return replies.score if replies else None

    def winner(self, row: str) -> Winner | None:
        """Return how the row's answer did against the other one; None unless both orders were judged.

        An answer that wins in one order and loses in the other ties; one that wins and ties wins.
        """
        replies = self._rows.get(row)
        if replies is None or len(replies.winners) < 2:
            return None
        total = sum(_POINTS[winner] for winner in replies.winners.values())
        return "tie" if total == 0 else ("win" if total > 0 else "loss")

    def orders(self, row: str) -> dict[Order, Winner]:
        """Return how the row's answer did in each order that was judged."""
        replies = self._rows.get(row)
        return dict(replies.winners) if replies else {}

    def add(self, task: Task, verdict: float | Winner) -> None:
        """Note one verdict."""
        replies = self._rows.setdefault(task.row, _Replies())
        if isinstance(verdict, float):
            replies.score = verdict
            return
        replies.winners[task.order] = verdict
        if verdict != "tie":
            is_first = (verdict == "win") == (task.order == "ab")
            self.firsts += is_first
            self.seconds += not is_first

    def facts(self) -> dict[str, Any]:
        """Return counts for people and cards: scores or wins, and with pairs the bias to a position."""
        facts: dict[str, Any] = {
            "judged": len(self),
            "unreadable": len(self.unreadable),
            "repaired": self.repaired,
        }
        scores = sorted(score for row in self._rows if (score := self.score(row)) is not None)
        if scores:
            facts["mean_score"] = round(sum(scores) / len(scores), 4)
            facts["scores"] = dict(sorted(Counter(math.floor(score) for score in scores).items()))
        winners = Counter(winner for row in self._rows if (winner := self.winner(row)) is not None)
        if winners:
            facts |= {"win": winners["win"], "tie": winners["tie"], "loss": winners["loss"]}
            facts["first_wins"] = _share(self.firsts, self.firsts + self.seconds)
            facts["order_decided"] = sum(self._is_decided_by_order(row) for row in self._rows)
        return facts

    def _is_decided_by_order(self, row: str) -> bool:
        """Whether the answer shown first, or the one shown second, won in both orders."""
        return set(self._rows[row].winners.values()) == {"win", "loss"}


def _share(count: int, total: int) -> dict[str, float] | None:
    """Return a share with its 95 % interval (Wilson 1927); None of nothing."""
    if not total:
        return None
    low, high = wilson_limits(count, total)
    return {"share": round(count / total, 4), "low": round(low, 4), "high": round(high, 4)}


def read_verdicts(config: HarvestConfig, root: Path) -> Verdicts:
    """Read the store of a judge. In memory there are the verdicts of each row.

    Raises:
        ConfigError: no `[judge]`, or the rubric can't be read. StoreError: the store can't be read.
    """
    section = required_section(config)
    verdicts, rubric = Verdicts(), rubric_id(section, root)
    store = root / config.store.path
    if not holds_answers(store):
        return verdicts
    repaired: dict[Task, float | Winner] = {}
    for task, sample in _replies(Corpus.open(store), rubric, config.teacher.model):
        verdict = None
        if sample.outcome == "ok" and sample.completion:
            verdict = read_reply(sample.completion, section, task.order)
        if task.is_repair:
            if verdict is not None:
                repaired[replace(task, is_repair=False)] = verdict
        elif verdict is None:
            verdicts.unreadable.add(task)
        else:
            verdicts.add(task, verdict)
    for task, verdict in repaired.items():
        verdicts.add(task, verdict)
    verdicts.repaired = len(repaired)
    verdicts.unreadable -= repaired.keys()
    return verdicts


def _replies(corpus: Corpus, rubric: str, model: str) -> Iterator[tuple[Task, Sample]]:
    """Yield the replies to this rubric by this model."""
    for sample in corpus.samples(_COLUMNS):
        task = Task.of(sample)
        if task is not None and task.rubric == rubric and sample.request_model == model:
            yield task, sample


def required_section(config: HarvestConfig) -> JudgeSection:
    """Return `[judge]`.

    Raises:
        ConfigError: the configuration has none.
    """
    if config.judge is None:
        raise ConfigError(
            "the configuration has no table [judge]",
            place="judge",
            remedy='[judge] corpus = "store" names the answers to judge',
        )
    return config.judge


@dataclass(frozen=True, slots=True)
class JudgeFilter:
    """The filter `judge` of a curate.toml.

    Attributes:
        check: the filter itself.
        facts: who judged by which rubric, and what came out; for curation.json and the cards.
    """

    check: Filter
    facts: Mapping[str, Any]


def judge_filter(value: Any, root: Path) -> JudgeFilter:
    """Build the filter from its table: `config` of the judge, and `at_least` or `keep`.

    Args:
        root: folder of curate.toml, which `config` is relative to.

    Raises:
        ConfigError: a table of another form, or a judge that has not judged.
        TermsRefused: the terms of the judge do not permit that training rests on its verdicts.
    """
    names = {"config", "at_least", "keep"}
    if not isinstance(value, dict) or not isinstance(value.get("config"), str) or set(value) - names:
        raise ConfigError("filter 'judge' needs the configuration of the judge", remedy=_FILTER_REMEDY)
    path = root / value["config"]
    config = settings.load(path)
    section = required_section(config)
    wanted = "keep" if section.compares else "at_least"
    if set(value) - {"config", wanted} or wanted not in value:
        raise ConfigError(f"filter 'judge' needs {wanted!r} for this judge", remedy=_FILTER_REMEDY)
    at_least, keep = value.get("at_least"), value.get("keep", [])
    if wanted == "at_least" and (isinstance(at_least, bool) or not isinstance(at_least, int | float)):
        raise ConfigError("filter 'judge': 'at_least' is a score", remedy=_FILTER_REMEDY)
    if not isinstance(keep, list) or not all(kept in _POINTS for kept in keep):
        raise ConfigError("filter 'judge': 'keep' lists win, tie or loss", remedy=_FILTER_REMEDY)
    verdicts = read_verdicts(config, path.parent)
    if not len(verdicts):
        remedy = f"run `harvester judge {shell_word(path)}` first"
        raise ConfigError("the judge has judged no answer by this rubric", place=str(path), remedy=remedy)
    store = path.parent / config.store.path
    terms_check.require_permitted(Corpus.open(store), "train", path.parent)
    facts = {
        "judge": config.teacher.teacher_id,
        "rubric_sha256": sha256_of(section.rubric_path(path.parent)),
        wanted: value[wanted],
        **verdicts.facts(),
    }
    return JudgeFilter(judged(verdicts, at_least=at_least, keep=frozenset(keep)), facts)


def judged(verdicts: Verdicts, *, at_least: float | None, keep: frozenset[Winner]) -> Filter:
    """Build a filter that keeps rows with a score of `at_least`, or whose comparison ended as `keep` says.

    Rows without a verdict are dropped under a reason of their own.
    """

    def check(sample: Sample) -> Drop | None:
        if at_least is not None:
            score = verdicts.score(sample.key)
            if score is None:
                return Drop("not_judged")
            return None if score >= at_least else Drop("judged_too_low", f"{score:g}")
        winner = verdicts.winner(sample.key)
        if winner is None:
            return Drop("not_judged")
        return None if winner in keep else Drop(f"judged_{winner}")

    return check
