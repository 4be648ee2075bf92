"""Evaluate base and student on the held-out prompts (`trainer evaluate`), next to the teacher's answers.

Every held-out prompt is answered, and the loss on the teacher's answers is always computed. Accuracy is
computed for the prompts that `[verify]` can judge; without that table, for those that have a reference.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from harvester.quality.verifiers.verifiers import Reason, Verifiers
from trainer.config import TrainConfig
from trainer.data import published_template
from trainer.data.chat_template import Example, Renderer
from trainer.data.held_out import HeldOut
from trainer.data.row_rules import INLINE_REASONING
from trainer.data.spread import spread
from trainer.data.tokens import builder
from trainer.data.tokens.row_texts import KeptTexts
from trainer.evaluation import (
    answers_file,
    evaluated_rows,
    explorer,
    forgetting,
    intervals,
    likelihood,
    on_demand,
    speed,
    text_metrics,
    text_scores,
)
from trainer.evaluation.forgetting import GeneralSet
from trainer.evaluation.judging import ceiling, judge_answers, judged_by, teacher_pass, verifiers_of
from trainer.evaluation.likelihood import Likelihood
from trainer.evaluation.scorecard import scorecard
from trainer.files import write_json
from trainer.model import generate, model, self_test, weights
from trainer.model.forward import lora_forward
from trainer.provenance import fingerprint
from trainer.publish import serving
from trainer.publish.adapter import check_same_base, check_same_tokens

# Called with the model that answers ("base" or "student"), the number of prompts and how many are answered.
Progress = Callable[[str, int, int], None]

# Reasons of an unverifiable answer that lie in the check itself, not in the prompt.
_CHECK_ENDED_BADLY = frozenset({Reason.TOO_SLOW, Reason.TOO_LARGE, Reason.RAISED, Reason.NOT_BOOLEAN})

# The page of the largest disagreements of student and teacher, in `[out] path`.
EXPLORER_FILE = "disagreements.html"

# Prompts or references that are made into tokens together.
_RENDERED_AT_ONCE = 1024

# Default limit of an answer in tokens, if all taught answers and references are shorter.
MIN_NEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Answers:
    """Hold the answers of one model to the held-out prompts, in their order.

    Attributes:
        texts: what is compared with the references.
        cut: whether each answer was cut by the token limit.
        likelihood: what the model thinks of the teacher's held-out answers; None if there are none.
        general: what it thinks of answers to general prompts; None if there are none.
        tokens: tokens of all answers, ends of turn included. seconds: time that they took in batches.
    """

    texts: Sequence[str]
    cut: tuple[bool, ...]
    likelihood: Likelihood | None
    general: Likelihood | None = None
    tokens: int = 0
    seconds: float = 0.0

    @property
    def loss(self) -> float | None:
        """Nats per supervised token of the teacher's held-out answers; None if there are none."""
        return None if self.likelihood is None else self.likelihood.loss


def evaluate(
    config: TrainConfig,
    on_batch: Progress = lambda _model, _total, _done: None,
    on_note: Callable[[str], None] = lambda _: None,
    on_progress: builder.Progress = builder.no_progress,
) -> dict[str, Any]:
    """Let base and student answer the held-out prompts; write scorecard.json and answers.jsonl.

    One model is loaded. It answers as the base with the adapter switched off.

    Args:
        on_batch: called when answers are complete.
        on_note: called with lines for the operator.
        on_progress: called while a large corpus is tokenised, unless the training has done it.

    Returns:
        The content of scorecard.json: see `scorecard.scorecard`, with `without_reference` (prompts that
        can't be judged), `unverifiable` (prompts whose check ended badly, by reason), `teacher_pass` (pass@1
        and pass@n of all the teacher's answers, by task), `loss` (nats per supervised token, by model) and
        `cut` (answers cut by the token limit, by model); the scores of texts (`_open_scores`) and `speed`.

    Raises:
        DataError: no prompt is held out.
        FindingsError: the adapter was changed after the training.
        StudentError: base or adapter can't be loaded, or the base is not the one the adapter was trained on.
        OutOfMemory: a single prompt does not fit.
    """
    model.set_threads(config.train)
    device = model.select_device(config.train)
    adapter = config.student_path
    weights.check_trained(adapter, full=config.is_full)
    if (adapter / fingerprint.TREE_FILE).exists():  # adapters of the first versions have none
        fingerprint.require_intact(adapter)
    check_same_base(config, adapter)
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    check_same_tokens(config, renderer, adapter)
    rows = evaluated_rows.read(config, renderer, on_progress)
    limit = answer_limit(config, rows.held_out, rows.taught, renderer)
    for note in limit_notes(limit, rows.held_out, rows.targets, renderer):
        on_note(note)
    general = forgetting.load(config, renderer)
    student = model.load_trained_student(config, adapter, device)
    test = HeldOutTest(config, renderer, rows.held_out, rows.targets, limit, general, rows.answered)
    count = len(rows.held_out)
    with student.disable_adapter():
        of_base = test.answers_of(student, on_note, partial(on_batch, "base", count))
    make_cheaper(student, config, device)
    of_student = test.answers_of(student, on_note, partial(on_batch, "student", count))
    answers = {"base": of_base, "student": of_student}
    card = make_card(test, answers)
    if config.evaluate.speed_prompts:
        card["speed"] = measure_speed(test, student, of_student, adapter)
    _write_results(test, card, answers)
    explorer.write_page(
        test.held_out,
        {name: each.texts for name, each in answers.items()},
        rows.learned,
        config.out_path / EXPLORER_FILE,
        config.name,
    )
    return card


def make_cheaper(student: Any, config: TrainConfig, device: torch.device) -> None:
    """Let a student answer with its adapter on in fewer operations; it can't be switched off any more.

    On the CPU the adapter is merged in fp32 and costs no time per token. A base in 16 bits would lose most of
    the adapter by rounding, so on CUDA its layers compute what they computed in the training, in fewer
    launches than PEFT's own forward takes.
    """
    if device.type == "cpu" and config.has_mergeable_base:
        student.merge_adapter()
    elif device.type != "cpu" and not config.is_full:
        lora_forward.replace_lora_forward(student)


def measure_speed(test: HeldOutTest, student: Any, answers: Answers, adapter: Path) -> dict[str, Any]:
    """Return what the student's answers take on this machine, and what the teacher's took.

    Args:
        student: the model whose answers are `answers`.
    """
    count = len(test.held_out)
    numbers = spread(range(count), test.config.evaluate.speed_prompts)
    prompts = test.prompts_of([test.held_out[n] for n in numbers])
    timings = speed.time_answers(student, prompts, test.limits)
    in_batches = speed.Timing(answers.seconds / count, answers.seconds, answers.tokens)
    price = test.config.evaluate.machine_usd_per_hour
    ours = speed.student_facts(student, timings, in_batches, test.config.base, adapter, price)
    asked = frozenset(held.prompt_id for held in test.held_out)
    return speed.compared(ours, speed.teacher_facts(test.config, asked))


@dataclass(frozen=True, slots=True)
class HeldOutTest:
    """Hold what every model is tested with.

    Attributes:
        targets: the teacher's answers as examples, for the loss.
        limit: tokens after which an answer is cut.
        general: answers to general prompts, for what the student has forgotten.
        answered: the prompt of each of `targets`; empty: losses are not split by task and tag.
    """

    config: TrainConfig
    renderer: Renderer
    held_out: Sequence[HeldOut]
    targets: Sequence[Example]
    limit: int
    general: GeneralSet = field(default_factory=lambda: GeneralSet((), ()))
    answered: Sequence[HeldOut] = ()

    def answers_of(
        self, answering: Any, on_note: Callable[[str], None], on_done: Callable[[int], None]
    ) -> Answers:
        """Let a model answer the held-out prompts, and compute its loss on the teacher's answers."""
        started = time.perf_counter()
        answers = generate_answers(self, answering, on_note, on_done)
        seconds = time.perf_counter() - started
        sets = (self.targets, self.general.examples)
        of_targets, of_general = likelihood.measure_parts(answering, sets, self.config)
        texts = (judged_text(self.renderer.decode(a.ids), self.renderer, self.config) for a in answers)
        return Answers(
            texts=KeptTexts(self.config.out_path, texts, len(answers)),
            cut=tuple(answer.is_cut for answer in answers),
            likelihood=of_targets,
            general=of_general,
            tokens=sum(len(answer.ids) + (not answer.is_cut) for answer in answers),
            seconds=seconds,
        )

    def prompts_of(self, held_out: Sequence[HeldOut]) -> Sequence[list[int]]:
        """Return the token ids of prompts, in 4 bytes each."""
        thinks = published_template.keeps_reasoning(self.config, self.renderer)
        found = []
        for begin in range(0, len(held_out), _RENDERED_AT_ONCE):
            conversations = [held.conversation for held in held_out[begin : begin + _RENDERED_AT_ONCE]]
            ids_of = self.renderer.prompts(conversations, [thinks] * len(conversations))
            found += [np.array(ids, dtype=np.int32) for ids in ids_of]
        return on_demand.mapped(found, lambda ids: ids.tolist())

    @property
    def limits(self) -> generate.Limits:
        """How answers end and are batched."""
        return generate.Limits(
            stop_id=self.renderer.chat_shape.stop_id,
            max_new_tokens=self.limit,
            batch=self.config.evaluate.batch,
            pad_id=self.renderer.tokenizer.pad_token_id,
            positions=self_test.position_limit(self.config.base),
            other_stops=serving.other_stops(self.config, self.renderer),
        )


def generate_answers(
    test: HeldOutTest,
    answering: Any,
    on_note: Callable[[str], None] = lambda _: None,
    on_done: Callable[[int], None] = lambda _: None,
) -> list[generate.Answer]:
    """Answer the held-out prompts greedily; see `trainer.model.generate`.

    Where the teacher's answer is long, the student's may be, so these begin first.
    """
    prompts = test.prompts_of(test.held_out)
    expected = [len(held.teacher or held.reference or "") for held in test.held_out]
    limits = replace(test.limits, expected=expected)
    return generate.generate(answering, prompts, limits, on_done=on_done, on_note=on_note)


def answer_limit(
    config: TrainConfig,
    held_out: Sequence[HeldOut],
    taught: Callable[[], Sequence[int]],
    renderer: Renderer,
) -> int:
    """Return the number of tokens after which an answer is cut.

    It is `[evaluate] max_new_tokens`, or else the longest taught answer, reasoning and end of turn included,
    and the longest reference, but at most `[train] max_length`.

    Args:
        taught: see `evaluated_rows.taught_lengths`.
    """
    if config.evaluate.max_new_tokens is not None:
        return config.evaluate.max_new_tokens
    longest = max([MIN_NEW_TOKENS, *taught(), *_reference_lengths(held_out, renderer)])
    return min(longest, max(config.train.max_length, MIN_NEW_TOKENS))


def limit_notes(
    limit: int, held_out: Sequence[HeldOut], targets: Sequence[Example], renderer: Renderer
) -> Iterator[str]:
    """Say how many references and teacher answers are longer than the limit, so that no model can match."""
    remedy = "raise [evaluate] max_new_tokens"
    references = _reference_lengths(held_out, renderer)
    if count := sum(length > limit for length in references):
        yield (
            f"{count:,} of {len(references):,} references need more than {limit:,} tokens and can't be "
            f"answered: {remedy}"
        )
    taught = [example.supervised for example in targets]
    if count := sum(length > limit for length in taught):
        yield f"{count:,} of {len(taught):,} teacher answers need more than {limit:,} tokens: {remedy}"


def _reference_lengths(held_out: Sequence[HeldOut], renderer: Renderer) -> list[int]:
    """Return the tokens of each reference and its end of turn."""
    lengths: list[int] = []
    for begin in range(0, len(held_out), _RENDERED_AT_ONCE):
        some = (held.reference for held in held_out[begin : begin + _RENDERED_AT_ONCE])
        if references := [reference for reference in some if reference is not None]:
            ids = renderer.tokenizer(references, add_special_tokens=False)["input_ids"]
            lengths += [len(row) + 1 for row in ids]
    return lengths


def judged_text(text: str, renderer: Renderer, config: TrainConfig) -> str:
    """Return the part of an answer that is judged: all but the reasoning that was taught with it."""
    if config.data.reasoning == "keep":
        return renderer.chat_shape.answer_in(text)
    if config.data.reasoning == "inline":
        _, mark, after = text.partition(INLINE_REASONING[1])
        return after if mark else text
    return text


def held_out_loss(answering: Any, examples: Sequence[Example], config: TrainConfig) -> float | None:
    """Compute the loss on the teacher's held-out answers.

    Returns:
        Nats per supervised token; None without examples.
    """
    measured = likelihood.measure(answering, examples, config)
    return None if measured is None else measured.loss


def make_card(test: HeldOutTest, answers: Mapping[str, Answers]) -> dict[str, Any]:
    """Return the content of scorecard.json."""
    verifiers = verifiers_of(test.config, test.held_out)
    judged, reasons = judge_answers(test.held_out, answers["base"].texts, answers["student"].texts, verifiers)
    card = scorecard(judged, resamples=test.config.evaluate.resamples)
    unverifiable = Counter({str(reason): n for reason, n in reasons.items() if reason in _CHECK_ENDED_BADLY})
    card["without_reference"] = len(test.held_out) - len(judged) - unverifiable.total()
    card["unverifiable"] = dict(sorted(unverifiable.items()))
    card["teacher_pass"] = teacher_pass(test.held_out, card["split"], verifiers)
    losses = {name: each.loss for name, each in answers.items()}
    card["loss"] = {**losses, "tokens": sum(e.supervised for e in test.targets)}
    cut = {name: sum(each.cut) for name, each in answers.items()}
    card["cut"] = {**cut, "answers": len(test.held_out), "max_new_tokens": test.limit}
    return {**card, **_open_scores(test, answers, card["split"], verifiers)}


def _open_scores(
    test: HeldOutTest, answers: Mapping[str, Answers], split: str, verifiers: Verifiers
) -> dict[str, Any]:
    """Return the scores that need no verifier, of the prompts of one split; likelihoods of all splits."""
    resamples = test.config.evaluate.resamples
    numbers = [n for n, held in enumerate(test.held_out) if held.split == split] or range(len(test.held_out))
    held_out = on_demand.some(test.held_out, numbers)
    texts: dict[str, Sequence[str | None]] = {
        **{name: on_demand.some(each.texts, numbers) for name, each in answers.items()},
        "teacher": on_demand.mapped(held_out, lambda held: held.teacher),
    }
    second = text_scores.repeats(held_out)
    if any(text is not None for text in second):
        texts["repeat"] = second
    cut = {name: [each.cut[n] for n in numbers] for name, each in answers.items()}
    return {
        "judged_by": judged_by(held_out, verifiers),
        "references": text_scores.reference_scores(held_out, texts, resamples),
        "agreement": text_scores.agreement(held_out, texts, resamples),
        "behaviour": text_scores.behaviour(held_out, texts, cut, resamples),
        "ceiling": ceiling(held_out, second, verifiers),
        "likelihood": _likelihoods(test, answers, resamples),
        "calibration": {
            name: likelihood.calibration(each.likelihood, resamples)
            for name, each in answers.items()
            if each.likelihood is not None
        },
        "forgetting": _forgetting(test, answers),
        "missing_packages": text_metrics.missing_metrics(),
    }


def _forgetting(test: HeldOutTest, answers: Mapping[str, Answers]) -> dict[str, Any] | None:
    base, student = answers["base"].general, answers["student"].general
    if base is None or student is None:
        return None
    return forgetting.facts(test.general, base, student, test.config.evaluate.resamples)


def _likelihoods(test: HeldOutTest, answers: Mapping[str, Answers], resamples: int) -> dict[str, Any]:
    measured = {name: each.likelihood for name, each in answers.items() if each.likelihood is not None}
    if not measured:
        return {}
    ends = len(test.renderer.chat_shape.end_of_turn)
    sizes = [
        len(test.renderer.decode(e.ids[e.prompt_length : len(e.ids) - ends].tolist()).encode())
        for e in test.targets
    ]
    facts = {name: likelihood.summary(each, sizes, resamples) for name, each in measured.items()}
    fewer_bits = (measured["student"].nats - measured["base"].nats) / math.log(2)
    return {
        **facts,
        "answers": len(sizes),
        "bytes": sum(sizes),
        "student_minus_base": {"bits_per_byte": intervals.ratio(fewer_bits.tolist(), sizes, resamples)},
        **{
            kind: {
                name: likelihood.compared(measured, sizes, numbers, resamples)
                for name, numbers in groups.items()
            }
            for kind, groups in (
                ("tasks", text_scores.by_task(test.answered)),
                ("tags", text_scores.by_tag(test.answered)),
            )
        },
    }


def _write_results(test: HeldOutTest, card: dict[str, Any], answers: Mapping[str, Answers]) -> None:
    out = test.config.out_path
    answers_file.write(
        out,
        (
            {
                "prompt_id": held.prompt_id,
                "task": held.task,
                "tags": held.tags,
                "split": held.split,
                "messages": held.conversation.messages,
                "reference": held.reference,
                "base": answers["base"].texts[i],
                "student": answers["student"].texts[i],
                "teacher": held.teacher,
                "base_cut": answers["base"].cut[i],
                "student_cut": answers["student"].cut[i],
            }
            for i, held in enumerate(test.held_out)
        ),
    )
    write_json(out / "scorecard.json", card)
