"""Find the rows of a corpus that are worth least: wrong answers above all (`trainer audit`).

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
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from harvester.quality.similarity.split import prompt_key
from harvester.store.shards.schema import Sample
from trainer.config import OutSection, TrainConfig
from trainer.data import dataset
from trainer.data.chat_template import Example, Renderer
from trainer.data.conversation import conversation_of
from trainer.errors import DataError
from trainer.evaluation import likelihood, neighbours, text_metrics
from trainer.evaluation.learned_texts import prompt_text
from trainer.evaluation.row_page import RowCard, RowPage, Text
from trainer.model import model, weights
from trainer.publish.adapter import check_same_base, check_same_tokens
from trainer.training.reporter import Callbacks
from trainer.training.train import train

# Rows on the page, and rows shown below each. A similarity from which a prompt counts as nearly the same.
MOST_ROWS, NEAREST, NEAR = 100, 3, 0.9
FOLDER = "audit"

Note = Callable[[str], None]
Losses = list[float | None]


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


def audit(config: TrainConfig, folds: int, on_note: Note = lambda _: None) -> dict[str, Any]:
    """Measure every row that can be learned; write audit.jsonl and audit.html into `[out] path`/audit.

    Trainings of folds are kept there: the same command resumes, or repeats none.

    Args:
        folds: 0: no training; the finished student judges.

    Returns:
        `rows`, `folds`, the files, and the keys of the worst rows.

    Raises:
        DataError: too few rows. What `dataset.read` and `trainer.training.train.train` raise.
    """
    rows = dataset.read(config, learns=False)
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    rendered = dataset.render_samples(rows.train, renderer, config.data)
    pairs = [
        (sample, example)
        for sample, example in zip(rows.train, rendered, strict=True)
        if len(example.ids) <= config.train.max_length and example.supervised > 0
    ]
    samples, examples = [sample for sample, _ in pairs], [example for _, example in pairs]
    if len(samples) < max(2, folds):
        raise DataError(
            f"too few rows to audit: {len(samples)}", place=str(config.corpus), remedy="harvest more"
        )
    before, after = _losses_of_student(config, renderer, examples, on_note)
    unseen = _unseen_losses(config, samples, examples, folds, on_note) if folds else [None] * len(samples)
    disagreements = _disagreements(samples)
    audited = [
        AuditedRow(
            sample.key,
            sample.prompt_id,
            str(sample.metadata.get("task") or ""),
            examples[n].supervised,
            before[n] or 0.0,
            after[n],
            unseen[n],
            disagreements[n],
        )
        for n, sample in enumerate(samples)
    ]
    order = sorted(range(len(audited)), key=lambda n: (-audited[n].score, audited[n].key))
    folder = config.out_path / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "audit.jsonl"
    file.write_text("".join(f"{json.dumps(asdict(audited[n]))}\n" for n in order), encoding="utf-8")
    page = _page(audited, samples, order, config.name).write(folder / "audit.html")
    return {
        "rows": len(audited),
        "folds": folds,
        "file": str(file),
        "page": str(page),
        "worst": [audited[n].key for n in order[:MOST_ROWS]],
    }


def _losses_of_student(
    config: TrainConfig, renderer: Renderer, examples: Sequence[Example], on_note: Note
) -> tuple[Losses, Losses]:
    """Return the loss of each row by the base and by the finished student, if there is one."""
    model.set_threads(config.train)
    device = model.select_device(config.train)
    adapter = config.student_path
    if not adapter.is_dir():
        on_note("there is no finished student: rows have no loss after training")
        return _losses(model.load_base_of(config, device), examples, config), [None] * len(examples)
    weights.check_trained(adapter, full=config.is_full)
    check_same_base(config, adapter)
    check_same_tokens(config, renderer, adapter)
    student = model.load_trained_student(config, adapter, device)
    with student.disable_adapter():
        before = _losses(student, examples, config)
    return before, _losses(student, examples, config)


def _losses(answering: Any, examples: Sequence[Example], config: TrainConfig) -> Losses:
    measured = likelihood.measure(answering, examples, config)
    return [] if measured is None else (measured.nats / measured.tokens).tolist()


def fold_of(sample: Sample, folds: int) -> int:
    """Return the fold of a row, drawn from its prompt's content, so that a prompt is in one fold only."""
    return int(prompt_key(sample.messages)[:12], 16) % folds


def _unseen_losses(
    config: TrainConfig, samples: Sequence[Sample], examples: Sequence[Example], folds: int, on_note: Note
) -> Losses:
    """Train a student for each fold on all other folds, and let it read that fold."""
    losses: Losses = [None] * len(samples)
    for fold in range(folds):
        held = [n for n, sample in enumerate(samples) if fold_of(sample, folds) == fold]
        others = [sample.key for sample in samples if fold_of(sample, folds) != fold]
        if not held or not others:
            continue
        out = config.out_path / FOLDER / f"fold-{fold + 1}-of-{folds}"
        part = config.model_copy(
            update={
                "out": OutSection(path=str(out), name=config.name, licence=config.out.licence),
                "evaluate": config.evaluate.model_copy(update={"every": 0}),
                "train": config.train.model_copy(update={"soft_targets": "off"}),
            }
        )
        on_note(f"fold {fold + 1} of {folds}: {len(others):,} rows teach, {len(held):,} are judged")
        callbacks = Callbacks(
            on_step=lambda log: on_note(f"step {log.step} of {log.steps}, loss {log.loss:.3f}")
        )
        train(part, callbacks, rows=dataset.read(part, only=set(others), learns=False))
        student = model.load_trained_student(part, part.student_path, model.select_device(config.train))
        for n, loss in zip(held, _losses(student, [examples[n] for n in held], config), strict=True):
            losses[n] = loss
    return losses


def _disagreements(samples: Sequence[Sample]) -> Losses:
    """Return how much each answer differs from the others to the same prompt."""
    by_prompt: dict[str, list[int]] = defaultdict(list)
    for n, sample in enumerate(samples):
        by_prompt[prompt_key(sample.messages)].append(n)
    found: Losses = [None] * len(samples)
    for numbers in by_prompt.values():
        for n in numbers if len(numbers) > 1 else ():
            ours = samples[n].completion or ""
            scores = [text_metrics.token_f1(ours, samples[m].completion or "") for m in numbers if m != n]
            found[n] = 1 - sum(scores) / len(scores)
    return found


def _page(
    audited: Sequence[AuditedRow], samples: Sequence[Sample], order: Sequence[int], name: str
) -> RowPage:
    numbers = neighbours.spread(len(samples))
    prompts = [prompt_text(conversation_of(samples[n])) for n in numbers]
    index = neighbours.TextIndex.of(prompts)
    cards = [_card(audited[n], samples[n], index, samples, numbers) for n in order[:MOST_ROWS]]
    near = sum(any("nearly the same prompt" in fact for fact in card.facts) for card in cards)
    scores = [row.score for row in audited]
    return RowPage(
        f"Rows of {name} that a student finds improbable",
        f"Learned rows by the loss of {_judge(audited)} comes first. Wrong answers are among them, and rows "
        "that are only hard. audit.jsonl has all rows in this order.",
        [
            (f"{len(audited):,}", "rows"),
            (f"{len(cards):,}", "shown"),
            (f"{np.median(scores):.3f}", "median loss"),
            (f"{near:,}", "of those shown have a near duplicate with another answer"),
        ],
        cards,
        like_heading="rows with the most similar prompts",
    )


def _judge(audited: Sequence[AuditedRow]) -> str:
    """Say whose loss orders the rows, and what that puts first."""
    if any(row.unseen is not None for row in audited):
        return "a student that did not learn them, in nats a token: what contradicts the other rows"
    if any(row.after is not None for row in audited):
        return "the finished student, which learned them, in nats a token: what it still finds improbable"
    return "the untrained base, in nats a token: what it finds improbable"


def _card(
    row: AuditedRow,
    sample: Sample,
    index: neighbours.TextIndex,
    samples: Sequence[Sample],
    numbers: Sequence[int],
) -> RowCard:
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
    for neighbour in index.nearest(prompt, NEAREST + 1):
        other = samples[numbers[neighbour.place]]
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
