"""Score answers of base, student and teacher as texts: against references, and against the teacher.

The teacher's second answer to a prompt, where the corpus has one, is a model of its own here, named "repeat":
no student can be expected to agree with the teacher more than the teacher agrees with itself.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from harvester.quality.verifiers.refusals import is_refusal
from harvester.quality.verifiers.verifiers import Candidate
from trainer.data.held_out import HeldOut
from trainer.evaluation import intervals, on_demand, text_metrics
from trainer.evaluation.scorecard import FEWEST_PROMPTS, MOST_TAGS, wilson_interval

# Texts of the held-out prompts by model; None: that model has no answer.
Texts = Mapping[str, Sequence[str | None]]
# Differences that are shown with paired intervals.
DIFFERENCES = (("student", "base"), ("student", "teacher"))
# What an answer may do instead of answering.
_HABITS: Mapping[str, Callable[[str], bool]] = {
    "refusals": is_refusal,
    "empty": lambda text: not text.strip(),
    "loops": text_metrics.ends_in_loop,
}

# Values of prompts by metric and model; NaN: the metric does not apply.
Columns = dict[tuple[str, str], NDArray[np.float64]]


class Grouped(Protocol):
    """Something with a task and tags, such as a prompt."""

    @property
    def task(self) -> str:
        """Its task."""

    @property
    def tags(self) -> tuple[str, ...]:
        """Its tags."""


def repeats(held_out: Sequence[HeldOut]) -> Sequence[str | None]:
    """Return the teacher's second usable answer to each prompt; None where there is none."""
    return on_demand.mapped(held_out, lambda held: _second(held.candidates))


def _second(candidates: Sequence[Candidate]) -> str | None:
    usable = [c.text for c in candidates if c.outcome == "ok" and c.text is not None]
    return usable[1] if len(usable) > 1 else None


def reference_scores(held_out: Sequence[HeldOut], texts: Texts, resamples: int) -> dict[str, Any]:
    """Compare all models with the references, by every metric that applies.

    Returns:
        `prompts` with a reference; `metrics.<metric>.<model>` {value, low, high} with the differences
        `student_minus_base` and `student_minus_teacher`; and the same by `tasks.<task>` and `tags.<tag>`.
        A missing answer counts 0. Intervals are bootstrapped; those of fewer than `intervals.FEW` prompts, or
        of prompts that all have the same value, are those of shares and of their paired differences.
    """
    references = on_demand.mapped(held_out, lambda held: held.reference)
    return _compare(held_out, texts, references, resamples)


def agreement(held_out: Sequence[HeldOut], texts: Texts, resamples: int) -> dict[str, Any]:
    """Compare base, student and the teacher's repeat with the teacher's first answer, in the same shape."""
    models = {name: texts[name] for name in texts if name != "teacher"}
    return _compare(held_out, models, on_demand.mapped(held_out, lambda held: held.teacher), resamples)


def _compare(
    held_out: Sequence[HeldOut], texts: Texts, references: Sequence[str | None], resamples: int
) -> dict[str, Any]:
    numbers = [n for n, reference in enumerate(references) if reference is not None]
    if not numbers:
        return {"prompts": 0, "metrics": {}, "tasks": {}, "tags": {}}
    columns = _columns(texts, references, numbers)
    prompts = on_demand.some(held_out, numbers)
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


def _columns(texts: Texts, references: Sequence[str | None], numbers: Sequence[int]) -> Columns:
    """Return the values of some prompts by metric and model, and the differences of models."""
    metrics = text_metrics.available_metrics()
    columns: Columns = {(metric, model): np.empty(len(numbers)) for metric in metrics for model in texts}
    for place, number in enumerate(numbers):
        reference = references[number] or ""
        answers = {model: of_model[number] for model, of_model in texts.items()}
        for metric, compare in metrics.items():
            # Right answers of several models are the same pair of texts.
            compare_once = cache(compare)
            for model, answer in answers.items():
                value = _value(compare_once, model, answer, reference)
                columns[metric, model][place] = np.nan if value is None else value
    found: Columns = {}
    for metric in metrics:
        found |= {
            (metric, model): columns[metric, model]
            for model in texts
            if not np.isnan(columns[metric, model]).all()
        }
        for first, second in DIFFERENCES:
            if (metric, first) in found and (metric, second) in found:
                found[metric, f"{first}_minus_{second}"] = found[metric, first] - found[metric, second]
    return found


def _value(compare: text_metrics.Metric, model: str, answer: str | None, reference: str) -> float | None:
    if answer is not None:
        return compare(answer, reference)
    # A prompt that was asked once has no repeat; any other missing answer is a failure.
    return None if model == "repeat" or compare("", reference) is None else 0.0


def _metrics(columns: Columns, group: Sequence[int], resamples: int) -> dict[str, Any]:
    places = slice(group.start, group.stop) if isinstance(group, range) else np.asarray(group)
    named = {f"{metric}/{model}": values[places] for (metric, model), values in columns.items()}
    metrics: dict[str, Any] = {}
    for name, value in intervals.means(named, resamples).items():
        metric, model = name.split("/")
        if value is not None:
            values = named[name][~np.isnan(named[name])]
            if len(values) < intervals.FEW or intervals.is_point(value["low"], value["high"]):
                mean_of = intervals.mean_of_differences if "_minus_" in model else intervals.mean_of_points
                value = mean_of(values.tolist())
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
    groups: dict[str, list[int]] = {tag: [] for tag in shown}
    for place, held in enumerate(held_out if shown else ()):
        for tag in set(held.tags) & groups.keys():
            groups[tag].append(place)
    return groups


def behaviour(
    held_out: Sequence[HeldOut], texts: Texts, cut: Mapping[str, Sequence[bool]], resamples: int
) -> dict[str, Any]:
    """Describe how each model answers, without a reference.

    Returns:
        By model: `answers`, and the shares `refusals`, `empty`, `loops` (it repeats itself to the end) and
        `cut` (by the token limit; base and student only) as {value, low, high}; and `length_ratio`, all
        characters of its answers over all of the teacher's, on the prompts that both answered.
    """
    facts: dict[str, Any] = {}
    for model, answers in texts.items():
        counts: Counter[str] = Counter()
        lengths: list[tuple[int, int]] = []
        for answer, held in zip(answers, held_out, strict=True):
            if answer is None:
                continue
            counts.update(["answers", *(name for name, is_so in _HABITS.items() if is_so(answer))])
            if held.teacher is not None:
                lengths.append((len(answer), len(held.teacher)))
        if not (given := counts["answers"]):
            continue
        facts[model] = {
            "answers": given,
            **{name: _share(counts[name], given) for name in _HABITS},
            "length_ratio": intervals.ratio([a for a, _ in lengths], [b for _, b in lengths], resamples),
        }
        if model in cut:
            facts[model]["cut"] = _share(sum(map(bool, cut[model])), len(cut[model]))
    return facts


def _share(count: int, of: int) -> dict[str, float]:
    interval = wilson_interval(count, of)
    return {"value": interval["accuracy"], "low": interval["low"], "high": interval["high"]}
