"""Show where student and teacher disagree most, with the rows of the corpus nearest to each prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from trainer.data.held_out import HeldOut
from trainer.data.spread import spread
from trainer.evaluation import neighbours, text_metrics
from trainer.evaluation.learned_texts import LearnedText, LearnedTexts, prompt_text
from trainer.evaluation.row_page import RowCard, RowPage, Text

# Prompts on the page, and rows shown below each.
MOST_PROMPTS, NEAREST = 100, 3


def disagreements(held_out: Sequence[HeldOut], student: Sequence[str]) -> list[tuple[float, int]]:
    """Return (disagreement, place) of the prompts that the teacher answered, the largest first.

    Disagreement is 1 - the token F1 of the two answers, 0 if they are equal once normalised.
    """
    metrics = text_metrics.available_metrics()
    found = []
    for place, (held, answer) in enumerate(zip(held_out, student, strict=True)):
        if held.teacher is not None:
            is_equal = metrics["normalised"](answer, held.teacher) == 1.0
            found.append((0.0 if is_equal else 1 - text_metrics.token_f1(answer, held.teacher), place))
    return sorted(found, key=lambda pair: (-pair[0], pair[1]))


def write_page(
    held_out: Sequence[HeldOut],
    answers: dict[str, Sequence[str]],
    learned: LearnedTexts,
    path: Path,
    name: str,
) -> Path:
    """Write the page of the largest disagreements.

    Args:
        answers: of base and student, in the order of `held_out`.
        learned: rows that were learned; at most `neighbours.MOST_ROWS` of them are searched.
        name: of the student.

    Raises:
        StoreError: the disk refuses.
    """
    ordered = disagreements(held_out, answers["student"])
    shown = [(amount, place) for amount, place in ordered if amount > 0][:MOST_PROMPTS]
    asked = [prompt_text(held_out[place].conversation) for _, place in shown]
    likes = _nearest(asked, learned)
    cards = []
    for (amount, place), like in zip(shown, likes, strict=True):
        held = held_out[place]
        cards.append(
            RowCard(
                held.prompt_id,
                [held.task, held.split, f"disagreement {amount:.2f}"],
                _texts(held, answers["base"][place], answers["student"][place]),
                like,
            )
        )
    equal = sum(amount == 0 for amount, _ in ordered)
    mean = f"{np.mean([amount for amount, _ in ordered]):.3f}" if ordered else "–"
    page = RowPage(
        f"Where {name} and its teacher disagree",
        "Held-out prompts by how much the student's answer differs from the teacher's: 1 - the token F1 of "
        "the two. Below each are the learned rows whose prompts are most like it: what may have taught it. "
        "answers.jsonl has all answers. Green equals the reference once normalised, red does not.",
        [
            (f"{len(ordered):,}", "prompts with a teacher's answer"),
            (f"{equal:,}", "answered alike"),
            (mean, "mean disagreement"),
            (f"{len(cards):,}", "shown"),
        ],
        cards,
        like_heading="learned rows with the most similar prompts",
    )
    return page.write(path)


def _nearest(prompts: Sequence[str], learned: LearnedTexts) -> list[list[Text]]:
    """Return for each prompt the learned rows with the most similar ones.

    The rows are read twice: for what is compared of them, and then those that are shown.
    """
    if not prompts:
        return []
    numbers = spread(range(len(learned)), neighbours.MOST_ROWS)
    place_of = {number: place for place, number in enumerate(numbers)}
    compared = [neighbours.NOTHING] * len(numbers)
    for number, text in learned.read(numbers):
        compared[place_of[number]] = neighbours.windows(text.prompt)
    index = neighbours.TextIndex(compared)
    near = [index.nearest(prompt, NEAREST) for prompt in prompts]
    shown = sorted({numbers[neighbour.place] for few in near for neighbour in few})
    texts = dict(learned.read(shown))
    return [[_like(texts[numbers[n.place]], n.similarity) for n in few] for few in near]


def _like(row: LearnedText, similarity: float) -> Text:
    return Text(f"{row.prompt_id}, similarity {similarity:.2f}", f"{row.prompt}\n→ {row.answer}", "like")


def _texts(held: HeldOut, base: str, student: str) -> list[Text]:
    answers = {"teacher": held.teacher or "", "student": student, "base": base}
    prompt = Text("prompt", prompt_text(held.conversation))
    if held.reference is None:
        return [prompt, *(Text(name, text) for name, text in answers.items())]
    normalised = text_metrics.available_metrics()["normalised"]
    judged = [
        Text(name, text, "good" if normalised(text, held.reference) == 1.0 else "bad")
        for name, text in answers.items()
    ]
    return [prompt, *judged, Text("reference", held.reference)]
