"""Rank rows by how suspicious they are: wrong answers come first (`trainer audit`).

A row is judged by a student that never saw it: the corpus is divided into folds by prompt, a student is
trained on all but one fold, and reads that one (cross-fitting; the idea of confident learning, Northcutt et
al. 2021, arXiv 1911.00068). A row whose answer such a student finds improbable contradicts what all others
teach, or is hard. The loss of the finished student says less: given enough epochs it knows wrong answers by
heart.

Forgetting events (Toneva et al. 2019) are not counted. They are defined for examples with one right class:
how often a learned example turns from right to wrong. A text has no such class. Whether greedy decoding gives
all of its tokens depends on its length more than on its truth, and trainings of few epochs have few events.
They would also cost a reading of all rows in every epoch, while a row that no student saw can't have been
learned by heart in the first place.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from harvester.store.shards.schema import Sample
from trainer.config import OutSection, TrainConfig
from trainer.data import dataset
from trainer.data.chat_template import Example, Renderer
from trainer.data.conversation import conversation_of
from trainer.data.spread import spread
from trainer.data.ties import places_of_ties
from trainer.data.tokens.builder import Progress, no_progress
from trainer.data.tokens.row_texts import RowTexts
from trainer.data.tokens.selection import places_by_prompt
from trainer.errors import DataError
from trainer.evaluation import audited_rows, likelihood, neighbours, on_demand, text_metrics
from trainer.evaluation.audited_rows import AuditedRows, Prompts
from trainer.evaluation.learned_texts import prompt_text
from trainer.evaluation.likelihood import Values
from trainer.evaluation.row_page import RowCard, RowPage, Text
from trainer.model import model, weights
from trainer.process import lock_output_folder
from trainer.publish.adapter import check_same_base, check_same_tokens
from trainer.training.reporter import Callbacks
from trainer.training.train import train

# Rows on the page, and rows shown below each. A similarity from which a prompt counts as nearly the same.
MOST_ROWS, NEAREST, NEAR = 100, 3, 0.9
FOLDER = "audit"
# Bytes of a prompt's hash from which its fold is drawn.
_FOLD_BYTES = 6

Note = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class AuditedRow:
    """Hold what is known of a row that can be learned. Losses are nats per token of its answer.

    Attributes:
        unseen: loss of a student that did not learn the row's prompt; None without folds.
        before: loss of the base. after: loss of the finished student; None if there is none.
        disagreement: 1 - the mean token F1 with the other answers to the same prompt; None without others.
    """

    key: str
    prompt_id: str
    task: str
    tokens: int
    before: float
    after: float | None
    unseen: float | None
    disagreement: float | None

    @property
    def score(self) -> float:
        """How suspicious the row is: the loss of a student that did not see it, else of the finished one."""
        return next(loss for loss in (self.unseen, self.after, self.before) if loss is not None)


def audit(
    config: TrainConfig, folds: int, on_note: Note = lambda _: None, on_progress: Progress = no_progress
) -> dict[str, Any]:
    """Measure every row that can be learned; write audit.jsonl and audit.html into `[out] path`/audit.

    Trainings of folds are kept there: the same command resumes, or repeats none.

    Args:
        folds: 0: no training; the finished student judges.
        on_progress: called while the token store of a large corpus is made, because there is none.

    Returns:
        `rows`, `folds`, the files, and the keys of the worst rows.

    Raises:
        StoreLocked: another process audits this student. DataError: too few rows.
        What `dataset.read` and `trainer.training.train.train` raise.
    """
    dataset.require_folder(config)
    with lock_output_folder(config.out_path / FOLDER, "`trainer audit`"):
        return _audit(config, folds, on_note, on_progress)


def _audit(config: TrainConfig, folds: int, on_note: Note, on_progress: Progress) -> dict[str, Any]:
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    rows = audited_rows.read(config, renderer, on_progress)
    if len(rows) < max(2, folds):
        raise DataError(
            f"too few rows to audit: {len(rows)}", place=str(config.corpus), remedy="harvest more"
        )
    before, after = _losses_of_student(config, renderer, rows.examples, on_note)
    unseen = _unseen_losses(config, rows, folds, on_note) if folds else None
    folder = config.out_path / FOLDER
    audited = _Measures(rows, before, after, unseen, _tasks_and_disagreements(rows, folder))
    order = audited.order()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "audit.jsonl"
    with file.open("w", encoding="utf-8") as lines:
        for place in order:
            lines.write(f"{json.dumps(asdict(audited.row(int(place))))}\n")
    worst = order[:MOST_ROWS].tolist()
    page = _page(audited, worst, config.name).write(folder / "audit.html")
    return {
        "rows": len(rows),
        "folds": folds,
        "file": str(file),
        "page": str(page),
        "worst": [rows.names(place)[0] for place in worst],
    }


@dataclass(frozen=True, slots=True)
class _Texts:
    """What the texts of the rows say: the number of each row's task, and how much its answer differs.

    Attributes:
        tasks: [rows] numbers in `names`.
        disagreements: [rows] 1 - the mean token F1; empty where no prompt has several answers.
        has_others: [rows] whether its prompt has another answer.
    """

    tasks: NDArray[np.int32]
    names: Sequence[str]
    disagreements: Values
    has_others: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Unseen:
    """Losses of students that did not learn a row, and whether there was such a student."""

    losses: Values
    is_known: NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Measures:
    """What is known of all rows, in arrays by their place: some tens of bytes a row."""

    rows: AuditedRows
    before: Values
    after: Values | None
    unseen: _Unseen | None
    texts: _Texts

    def row(self, place: int) -> AuditedRow:
        """Return what is known of one row."""
        key, prompt_id = self.rows.names(place)
        unseen, texts = self.unseen, self.texts
        return AuditedRow(
            key,
            prompt_id,
            texts.names[texts.tasks[place]],
            self.rows.examples[place].supervised,
            float(self.before[place]),
            None if self.after is None else float(self.after[place]),
            float(unseen.losses[place]) if unseen is not None and unseen.is_known[place] else None,
            float(texts.disagreements[place]) if texts.has_others[place] else None,
        )

    def scores(self) -> Values:
        """Return how suspicious each row is, see `AuditedRow.score`."""
        seen = self.before if self.after is None else self.after
        return seen if self.unseen is None else np.where(self.unseen.is_known, self.unseen.losses, seen)

    def order(self) -> NDArray[np.int32]:
        """Return the places of all rows, the most suspicious first; rows with one score by their key."""
        scores = self.scores()
        order = np.argsort(-scores, kind="stable").astype(np.int32)
        is_tie = scores[order[1:]] == scores[order[:-1]]
        if is_tie.any():
            at = places_of_ties(is_tie)
            places = order[at]
            order[at] = places[np.lexsort((self.rows.keys(places), -scores[places]))]
        return order


def _losses_of_student(
    config: TrainConfig, renderer: Renderer, examples: Sequence[Example], on_note: Note
) -> tuple[Values, Values | None]:
    """Return the loss of each row by the base and by the finished student; None if there is none."""
    model.set_threads(config.train)
    device = model.select_device(config.train)
    adapter = config.student_path
    if not adapter.is_dir():
        on_note("there is no finished student: rows have no loss after training")
        return likelihood.losses(model.load_base_of(config, device), examples, config), None
    weights.check_trained(adapter, full=config.is_full)
    check_same_base(config, adapter)
    check_same_tokens(config, renderer, adapter)
    student = model.load_trained_student(config, adapter, device)
    with student.disable_adapter():
        before = likelihood.losses(student, examples, config)
    return before, likelihood.losses(student, examples, config)


def _folds(rows: AuditedRows, folds: int) -> NDArray[np.int64]:
    """Return the fold of each row, drawn from its prompt's content, so that a prompt is in one fold only."""
    hashes = rows.prompts().view(np.uint8).reshape(len(rows), -1)
    number = np.zeros(len(rows), dtype=np.int64)
    for column in range(_FOLD_BYTES):
        number = number << 8 | hashes[:, column]
    return np.asarray(number % folds)


def _unseen_losses(config: TrainConfig, rows: AuditedRows, folds: int, on_note: Note) -> _Unseen:
    """Train a student for each fold on all other folds, and let it read that fold."""
    found = _Unseen(np.zeros(len(rows)), np.zeros(len(rows), dtype=bool))
    fold_of = _folds(rows, folds)
    for fold in range(folds):
        is_held = fold_of == fold
        held = np.flatnonzero(is_held)
        if len(held) in {0, len(rows)}:
            continue
        out = config.out_path / FOLDER / f"fold-{fold + 1}-of-{folds}"
        part = config.model_copy(
            update={
                "out": OutSection(path=str(out), name=config.name, licence=config.out.licence),
                "evaluate": config.evaluate.model_copy(update={"every": 0}),
                "train": config.train.model_copy(update={"soft_targets": "off"}),
            }
        )
        taught = len(rows) - len(held)
        on_note(f"fold {fold + 1} of {folds}: {taught:,} rows teach, {len(held):,} are judged")
        callbacks = Callbacks(
            on_step=lambda log: on_note(f"step {log.step} of {log.steps}, loss {log.loss:.3f}")
        )
        with rows.without(is_held, part) as others:
            train(part, callbacks, rows=others)
        student = model.load_trained_student(part, part.student_path, model.select_device(config.train))
        found.losses[held] = likelihood.losses(student, on_demand.some(rows.examples, held), config)
        found.is_known[held] = True
    return found


def _tasks_and_disagreements(rows: AuditedRows, folder: Path) -> _Texts:
    """Read the texts of all rows once: their tasks, and how much each answer differs from others.

    Args:
        folder: for the answers of prompts with several, while they are sorted.
    """
    prompts = rows.prompts()
    several = _places_of_several(prompts)
    has_others = np.zeros(len(rows), dtype=bool)
    has_others[several] = True
    tasks = np.zeros(len(rows), dtype=np.int32)
    disagreements = np.zeros(len(rows) if len(several) else 0)
    numbers: dict[str, int] = {}
    with RowTexts(folder, len(rows)) as answers:
        for place, sample in rows.samples():
            task = str(sample.metadata.get("task") or "")
            tasks[place] = numbers.setdefault(task, len(numbers))
            if has_others[place]:
                answers.add(place, (sample.completion or "").encode("utf-8", "surrogatepass"))
        for at in places_by_prompt(prompts[several]):
            places = several[at].tolist()
            texts = [answers.read(place).decode("utf-8", "surrogatepass") for place in places]
            for ours, place in enumerate(places):
                scores = [text_metrics.token_f1(texts[ours], t) for n, t in enumerate(texts) if n != ours]
                disagreements[place] = 1 - sum(scores) / len(scores)
    return _Texts(tasks, list(numbers), disagreements, has_others)


def _places_of_several(prompts: Prompts) -> NDArray[np.int64]:
    """Return the places of the rows whose prompt has another one, rising."""
    order = np.argsort(prompts, kind="stable")
    return np.sort(order[places_of_ties(prompts[order[1:]] == prompts[order[:-1]])])


def _page(audited: _Measures, worst: Sequence[int], name: str) -> RowPage:
    rows = audited.rows
    numbers = spread(range(len(rows)), neighbours.MOST_ROWS)
    place_of = {number: place for place, number in enumerate(numbers)}
    compared = [neighbours.NOTHING] * len(numbers)
    for number, sample in rows.samples(numbers):
        compared[place_of[number]] = neighbours.windows(prompt_text(conversation_of(sample)))
    index = neighbours.TextIndex(compared)
    shown = dict(rows.samples(worst))
    near = {
        place: index.nearest(prompt_text(conversation_of(sample)), NEAREST + 1)
        for place, sample in shown.items()
    }
    like = dict(rows.samples(sorted({numbers[each.place] for few in near.values() for each in few})))
    cards = [
        _card(audited.row(place), shown[place], [(each, like[numbers[each.place]]) for each in near[place]])
        for place in worst
    ]
    found = sum(any("nearly the same prompt" in fact for fact in card.facts) for card in cards)
    return RowPage(
        f"Rows of {name} that a student finds improbable",
        f"Learned rows by the loss of {_judge(audited)} comes first. Wrong answers are among them, and rows "
        "that are only hard. audit.jsonl has all rows in this order.",
        [
            (f"{len(rows):,}", "rows"),
            (f"{len(cards):,}", "shown"),
            (f"{np.median(audited.scores()):.3f}", "median loss"),
            (f"{found:,}", "of those shown have a near duplicate with another answer"),
        ],
        cards,
        like_heading="rows with the most similar prompts",
    )


def _judge(audited: _Measures) -> str:
    """Say whose loss orders the rows, and what that puts first."""
    if audited.unseen is not None and audited.unseen.is_known.any():
        return "a student that did not learn them, in nats a token: what contradicts the other rows"
    if audited.after is not None:
        return "the finished student, which learned them, in nats a token: what it still finds improbable"
    return "the untrained base, in nats a token: what it finds improbable"


def _card(row: AuditedRow, sample: Sample, nearest: Sequence[tuple[neighbours.Neighbour, Sample]]) -> RowCard:
    prompt = prompt_text(conversation_of(sample))
    facts = [
        row.task,
        _fact("unseen", row.unseen),
        _fact("after training on it", row.after),
        _fact("of the base", row.before),
    ]
    if row.disagreement is not None:
        facts.append(f"disagrees with its other samples {row.disagreement:.2f}")
    like: list[Text] = []
    for neighbour, other in nearest:
        if other.key == sample.key or len(like) == NEAREST:
            continue
        if neighbour.similarity >= NEAR and other.completion != sample.completion:
            facts.append(f"nearly the same prompt as {other.prompt_id}, with another answer")
        text = f"{prompt_text(conversation_of(other))}\n→ {other.completion or ''}"
        like.append(Text(f"{other.prompt_id}, similarity {neighbour.similarity:.2f}", text, "like"))
    answer = sample.completion or ""
    texts = [Text("prompt", prompt), Text("answer", answer)]
    if sample.reference is not None:
        is_right = text_metrics.available_metrics()["normalised"](answer, sample.reference) == 1.0
        texts[1] = Text("answer", answer, "good" if is_right else "bad")
        texts.append(Text("reference", sample.reference))
    return RowCard(row.prompt_id, [fact for fact in facts if fact], texts, like)


def _fact(name: str, loss: float | None) -> str:
    return "" if loss is None else f"{name} {loss:.3f} nats a token"


def auroc(scores: Sequence[float], is_positive: Sequence[bool]) -> float:
    """Return the chance that a positive row has a higher score than another one; ties count half.

    Raises:
        ValueError: all rows are alike.
    """
    values, flags = np.asarray(scores, dtype=np.float64), np.asarray(is_positive, dtype=bool)
    positives, others = values[flags], np.sort(values[~flags])
    if not len(positives) or not len(others):
        raise ValueError("AUROC needs rows of both kinds")
    below = np.searchsorted(others, positives, side="left")
    below_or_equal = np.searchsorted(others, positives, side="right")
    return float((below + below_or_equal).sum() / 2 / len(positives) / len(others))
