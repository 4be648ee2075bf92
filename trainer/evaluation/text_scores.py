"""Score answers of base, student and teacher as texts: against references, and against the teacher.

The teacher's second answer to a prompt, where the corpus has one, is a model of its own here, named "repeat":
no student can be expected to agree with the teacher more than the teacher agrees with itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

from harvester.quality.verifiers.refusals import is_refusal
from harvester.quality.verifiers.verifiers import Candidate
from trainer.data.dataset import HeldOut
from trainer.evaluation import intervals, text_metrics
from trainer.evaluation.scorecard import FEWEST_PROMPTS, MOST_TAGS, wilson_interval

# Texts of the held-out prompts by model; None: that model has no answer.
Texts = Mapping[str, Sequence[str | None]]
# Differences that are shown with paired intervals.
DIFFERENCES = (("student", "base"), ("student", "teacher"))


class Grouped(Protocol):
    """Something with a task and tags, such as a prompt."""

    @property
    def task(self) -> str:
        """Its task."""

    @property
    def tags(self) -> tuple[str, ...]:
        """Its tags."""


def repeats(held_out: Sequence[HeldOut]) -> list[str | None]:
    """Return the teacher's second usable answer to each prompt; None where there is none."""
    return [_second(held.candidates) for held in held_out]


def _second(candidates: Sequence[Candidate]) -> str | None:
    usable = [c.text for c in candidates if c.outcome == "ok" and c.text is not None]
    return usable[1] if len(usable) > 1 else None


def reference_scores(held_out: Sequence[HeldOut], texts: Texts, resamples: int) -> dict[str, Any]:
    """Compare all models with the references, by every metric that applies.

    Returns:
        `prompts` with a reference; `metrics.<metric>.<model>` {value, low, high} with the differences
        `student_minus_base` and `student_minus_teacher`; and the same by `tasks.<task>` and `tags.<tag>`.
        A missing answer counts 0.
    """
    references = [held.reference for held in held_out]
    return _compare(held_out, texts, references, resamples)


def agreement(held_out: Sequence[HeldOut], texts: Texts, resamples: int) -> dict[str, Any]:
    """Compare base, student and the teacher's repeat with the teacher's first answer, in the same shape."""
    models = {name: texts[name] for name in texts if name != "teacher"}
    return _compare(held_out, models, [held.teacher for held in held_out], resamples)


def _compare(
    held_out: Sequence[HeldOut], texts: Texts, references: Sequence[str | None], resamples: int
) -> dict[str, Any]:
    numbers = [n for n, reference in enumerate(references) if reference is not None]
    if not numbers:
        return {"prompts": 0, "metrics": {}, "tasks": {}, "tags": {}}
    columns: dict[tuple[str, str], list[float | None]] = {}
    for metric, compare in text_metrics.available_metrics().items():
        # Right answers of several models are the same pair of texts.
        compare_once = cache(compare)
        for model, answers in texts.items():
            values = [_value(compare_once, model, answers[n], references[n] or "") for n in numbers]
            if any(value is not None for value in values):
                columns[metric, model] = values
        for first, second in DIFFERENCES:
            if (metric, first) in columns and (metric, second) in columns:
                pairs = zip(columns[metric, first], columns[metric, second], strict=True)
                columns[metric, f"{first}_minus_{second}"] = [
                    None if a is None or b is None else a - b for a, b in pairs
                ]
    prompts = [held_out[n] for n in numbers]
    return {
        "prompts": len(numbers),
        "metrics": _metrics(columns, range(len(numbers)), resamples),
        **{
            kind: {
                name: {"prompts": len(group), "metrics": _metrics(columns, group, resamples)}
                for name, group in groups.items()
            }
            for kind, groups in (("tasks", by_task(prompts)), ("tags", by_tag(prompts)))
        },
    }


def _value(compare: text_metrics.Metric, model: str, answer: str | None, reference: str) -> float | None:
    if answer is not None:
        return compare(answer, reference)
    # A prompt that was asked once has no repeat; any other missing answer is a failure.
    return None if model == "repeat" or compare("", reference) is None else 0.0


def _metrics(
    columns: Mapping[tuple[str, str], Sequence[float | None]], group: Sequence[int], resamples: int
) -> dict[str, Any]:
    named = {f"{metric}/{model}": [values[n] for n in group] for (metric, model), values in columns.items()}
    metrics: dict[str, Any] = {}
    for name, value in intervals.means(named, resamples).items():
        metric, model = name.split("/")
        if value is not None:
            metrics.setdefault(metric, {})[model] = value
    return metrics


def by_task(held_out: Sequence[Grouped]) -> dict[str, list[int]]:
    """Return the places of the prompts by task."""
    groups: dict[str, list[int]] = {}
    for place, held in enumerate(held_out):
        groups.setdefault(held.task, []).append(place)
    return dict(sorted(groups.items()))


def by_tag(held_out: Sequence[Grouped]) -> dict[str, list[int]]:
    """Return the places of the prompts by tag: the commonest tags, in order of their names."""
    counts = Counter(tag for held in held_out for tag in held.tags)
    shown = sorted(tag for tag, count in counts.most_common(MOST_TAGS) if count >= FEWEST_PROMPTS)
    return {tag: [n for n, held in enumerate(held_out) if tag in held.tags] for tag in shown}


def behaviour(
    held_out: Sequence[HeldOut], texts: Texts, cut: Mapping[str, Sequence[bool]], resamples: int
) -> dict[str, Any]:
    """Describe how each model answers, without a reference.

    Returns:
        By model: `answers`, and the shares `refusals`, `empty`, `loops` (it repeats itself to the end) and
        `cut` (by the token limit; base and student only) as {value, low, high}; and `length_ratio`, all
        characters of its answers over all of the teacher's, on the prompts that both answered.
    """
    teacher = [held.teacher for held in held_out]
    facts: dict[str, Any] = {}
    for model, answers in texts.items():
        given = [answer for answer in answers if answer is not None]
        if not given:
            continue
        pairs = [
            (len(ours), len(theirs))
            for ours, theirs in zip(answers, teacher, strict=True)
            if ours is not None and theirs is not None
        ]
        facts[model] = {
            "answers": len(given),
            "refusals": _share(given, is_refusal),
            "empty": _share(given, lambda text: not text.strip()),
            "loops": _share(given, text_metrics.ends_in_loop),
            "length_ratio": intervals.ratio([a for a, _ in pairs], [b for _, b in pairs], resamples),
        }
        if model in cut:
            facts[model]["cut"] = _share(cut[model], bool)
    return facts


def _share(items: Sequence[Any], has: Callable[[Any], bool]) -> dict[str, float]:
    interval = wilson_interval(sum(bool(has(item)) for item in items), len(items))
    return {"value": interval["accuracy"], "low": interval["low"], "high": interval["high"]}
