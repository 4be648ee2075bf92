"""Measure what a student has forgotten: how likely it finds answers to general prompts, next to its base.

The built-in set is small and written for this program: it shows damage, not ability. A file of one's own says
more about what a student should keep.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from trainer.config import TrainConfig
from trainer.data import row_rules
from trainer.data.chat_template import Example, Renderer
from trainer.data.conversation import Conversation
from trainer.errors import DataError, FindingsError
from trainer.evaluation import intervals, likelihood
from trainer.evaluation.likelihood import Likelihood
from trainer.model import model, weights
from trainer.publish.adapter import check_same_base, check_same_tokens

_OWN_FILE = "general_prompts.jsonl"
_LINE = 'a line is {"prompt": "...", "answer": "..."}, or has "messages" in place of "prompt"'
_REMEDY = f"name a file of JSON lines in [evaluate] general_prompts: {_LINE}"


@dataclass(frozen=True, slots=True)
class GeneralSet:
    """Rendered general prompts with answers; `sizes` are the UTF-8 bytes of the answers."""

    examples: tuple[Example, ...]
    sizes: tuple[int, ...]


def load(config: TrainConfig, renderer: Renderer) -> GeneralSet:
    """Read `[evaluate] general_prompts`, or the built-in set; leave out what is longer than `max_length`.

    Raises:
        DataError: the file is missing or holds no prompt, or a line has no prompt with an answer.
    """
    path = config.general_prompts
    try:
        text = (
            files("trainer.evaluation").joinpath(_OWN_FILE).read_text(encoding="utf-8")
            if path is None
            else path.read_text(encoding="utf-8")
        )
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror or str(error) if isinstance(error, OSError) else "is not UTF-8 text"
        raise DataError(f"general prompts can't be read: {why}", place=str(path), remedy=_REMEDY) from None
    pairs = [_pair(line, n, path) for n, line in enumerate(text.splitlines(), start=1) if line.strip()]
    if not pairs:
        raise DataError("holds no prompt", place=str(path), remedy=_REMEDY)
    examples = renderer.examples(
        [conversation for conversation, _ in pairs],
        [answer for _, answer in pairs],
        [True] * len(pairs),
        [None] * len(pairs),
    )
    most = row_rules.longest_row(config)
    kept = [
        (example, len(answer.encode()))
        for example, (_, answer) in zip(examples, pairs, strict=True)
        if len(example.ids) <= most
    ]
    return GeneralSet(tuple(e for e, _ in kept), tuple(size for _, size in kept))


def _pair(line: str, number: int, path: Path | None) -> tuple[Conversation, str]:
    remedy = _LINE
    place = f"{path or _OWN_FILE}:{number}"
    try:
        row = json.loads(line)
        messages = row["messages"] if "messages" in row else [{"role": "user", "content": row["prompt"]}]
        answer = row["answer"]
        if not all(isinstance(m["role"], str) and isinstance(m["content"], str) for m in messages):
            raise TypeError("a message needs role and content")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"no general prompt: {error}", place=place, remedy=remedy) from None
    if not isinstance(answer, str) or not answer.strip():
        raise DataError("a general prompt needs an answer", place=place, remedy=remedy)
    return Conversation(tuple(messages)), answer


def facts(general: GeneralSet, base: Likelihood, student: Likelihood, resamples: int) -> dict[str, Any]:
    """Return bits per byte of base and student, and by what share the student's are higher.

    Returns:
        `answers`; `base` and `student` as `likelihood.summary`; `increase` {value, low, high}: 0.1 if the
        student needs 10 % more bits than its base, below 0 if it needs fewer. Paired over the prompts.
    """
    ratio = intervals.ratio(student.nats.tolist(), base.nats.tolist(), resamples)
    return {
        "answers": len(general.sizes),
        "base": likelihood.summary(base, general.sizes, resamples),
        "student": likelihood.summary(student, general.sizes, resamples),
        "increase": None if ratio is None else {name: value - 1 for name, value in ratio.items()},
    }


def measure(config: TrainConfig) -> dict[str, Any]:
    """Measure base and student on the general prompts.

    Raises:
        DataError: see `load`, or no prompt is short enough.
        StudentError, FindingsError: see `trainer.evaluation.evaluate.evaluate`.
    """
    adapter = config.student_path
    weights.check_trained(adapter, full=config.is_full)
    check_same_base(config, adapter)
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    check_same_tokens(config, renderer, adapter)
    general = load(config, renderer)
    model.set_threads(config.train)
    student = model.load_trained_student(config, adapter, model.select_device(config.train))
    with student.disable_adapter():
        of_base = likelihood.measure(student, general.examples, config)
    of_student = likelihood.measure(student, general.examples, config)
    if of_base is None or of_student is None:
        raise DataError(
            "no general prompt is short enough to measure forgetting with",
            place=str(config.general_prompts or _OWN_FILE),
            remedy="raise [train] max_length, or name another file in [evaluate] general_prompts",
        )
    return facts(general, of_base, of_student, config.evaluate.resamples)


def require_kept(config: TrainConfig) -> dict[str, Any] | None:
    """Refuse a student that has forgotten more than `[export] max_forgetting`.

    Returns:
        What was measured; None if the limit is not set.

    Raises:
        FindingsError: the student needs too many more bits than its base for the general answers.
    """
    most = config.export.max_forgetting
    if most is None:
        return None
    measured = measure(config)
    increase = measured["increase"]
    if increase is None or increase["value"] > most:
        shown = "an unknown share" if increase is None else f"{increase['value']:.1%}"
        interval = "" if increase is None else f" ({increase['low']:.1%} to {increase['high']:.1%})"
        raise FindingsError(
            f"the student has forgotten too much: it needs {shown}{interval} more bits than its base for "
            f"{measured['answers']} general answers; [export] max_forgetting is {most:.1%}",
            place=str(config.student_path),
            remedy="train with a lower lr, fewer epochs or a smaller rank, mix in general rows, or raise it",
        )
    return measured
