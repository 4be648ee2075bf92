"""Judge the answers of base, student and teacher to the held-out prompts by their verifiers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from harvester.quality.verifiers.pass_rates import TaskTally
from harvester.quality.verifiers.verifiers import AnswerVerdict, Reason, Verifiers
from trainer.config import TrainConfig
from trainer.data.held_out import HeldOut
from trainer.evaluation import comparison_choice
from trainer.evaluation.scorecard import JudgedPrompt, wilson_interval


def judged_by(held_out: Sequence[HeldOut], verifiers: Verifiers) -> dict[str, str]:
    """Return by task the kind of verifier that judges its prompts, "none" without one."""
    return {held.task: verifiers.kind_for(held.candidates[0]) or "none" for held in held_out}


def ceiling(
    held_out: Sequence[HeldOut], second: Sequence[str | None], verifiers: Verifiers
) -> dict[str, Any] | None:
    """Return how often the teacher's first and second answer pass, on the prompts where both can be judged.

    A student can't be expected to score higher than the teacher's repeat.

    Returns:
        None without such a prompt.
    """
    passed = []
    for held, text in zip(held_out, second, strict=True):
        if text is None or held.teacher is None:
            continue
        like = held.candidates[0]
        verdicts = [
            verifiers.judge(replace(like, text=each, outcome="ok")).verdict for each in (held.teacher, text)
        ]
        if AnswerVerdict.UNVERIFIABLE not in verdicts:
            passed.append([verdict == AnswerVerdict.PASSED for verdict in verdicts])
    if not passed:
        return None
    first, repeated = (sum(column) for column in zip(*passed, strict=True))
    return {
        "prompts": len(passed),
        "teacher": wilson_interval(first, len(passed)),
        "repeat": wilson_interval(repeated, len(passed)),
        "recovery": repeated / first if first else None,
    }


def verifiers_of(config: TrainConfig, held_out: Sequence[HeldOut] = ()) -> Verifiers:
    """Return the verifiers of `[verify]`; without that table, answers are compared with the reference.

    Args:
        held_out: prompts whose teacher answers decide how: see `comparison_choice`. Without them: exactly.

    Raises:
        ConfigError: a function of a verifier can't be imported.
    """
    chosen = config.verify or comparison_choice.choose(h.candidates[0] for h in held_out if h.candidates)
    verifiers = Verifiers(chosen, config.root)
    verifiers.require_functions()
    return verifiers


def judge_answers(
    held_out: Sequence[HeldOut], base: Sequence[str], student: Sequence[str], verifiers: Verifiers
) -> tuple[list[JudgedPrompt], Counter[Reason]]:
    """Judge the answers to held-out prompts. A missing teacher answer counts as wrong.

    Returns:
        The prompts whose three answers could be verified; and why the others could not, one reason a prompt.
    """
    judged: list[JudgedPrompt] = []
    reasons: Counter[Reason] = Counter()
    for held, of_base, of_student in zip(held_out, base, student, strict=True):
        like, texts = held.candidates[0], (of_base, of_student, held.teacher)
        judgements = [
            verifiers.judge(replace(like, text=text, outcome="ok" if text is not None else "missing"))
            for text in texts
        ]
        unverifiable = [j.reason for j in judgements if j.verdict == AnswerVerdict.UNVERIFIABLE]
        if unverifiable:
            reasons[unverifiable[0]] += 1
            continue
        base_passed, student_passed, teacher_passed = (
            judgement.verdict == AnswerVerdict.PASSED for judgement in judgements
        )
        judged.append(
            JudgedPrompt(
                held.prompt_id,
                held.task,
                held.split,
                base_passed,
                student_passed,
                teacher_passed,
                held.tags,
            )
        )
    return judged, reasons


def teacher_pass(held_out: Sequence[HeldOut], split: str, verifiers: Verifiers) -> dict[str, Any]:
    """Return by task how many of all the teacher's answers pass, and pass@1 and pass@n: see `TaskTally`."""
    tasks: dict[str, TaskTally] = {}
    for number, held in enumerate(held_out):
        if held.split != split:
            continue
        tally = tasks.setdefault(held.task, TaskTally())
        for candidate in held.candidates:
            tally.add(str(number), verifiers.judge(candidate))
    return {task: tally.facts() for task, tally in sorted(tasks.items())}
