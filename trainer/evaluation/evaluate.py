"""Evaluate base and student on the held-out prompts (`trainer evaluate`), next to the teacher's answers.

Every held-out prompt is answered, and the loss on the teacher's answers is always computed. Accuracy is
computed for the prompts that `[verify]` can judge; without that table, for those that have a reference.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from harvester.verify.pass_rates import TaskTally
from harvester.verify.settings import EVERY_TASK, VerifierSection
from harvester.verify.verifiers import AnswerVerdict, Reason, Verifiers
from trainer.config import TrainConfig
from trainer.data import dataset, published_template
from trainer.data.chat_template import Example, Renderer
from trainer.data.dataset import INLINE_REASONING, HeldOut, Rows
from trainer.data.packing import pack
from trainer.errors import DataError
from trainer.evaluation.scorecard import JudgedPrompt, scorecard
from trainer.model import generate, model, self_test, weights
from trainer.provenance import fingerprint
from trainer.publish.adapter import check_same_base, check_same_tokens
from trainer.training.forward import pack_losses

# Called with the model that answers ("base" or "student"), the number of prompts and how many are answered.
Progress = Callable[[str, int, int], None]

# Reasons of an unverifiable answer that lie in the check itself, not in the prompt.
_CHECK_ENDED_BADLY = frozenset({Reason.TOO_SLOW, Reason.TOO_LARGE, Reason.RAISED, Reason.NOT_BOOLEAN})

# Default limit of an answer in tokens, if all taught answers and references are shorter.
MIN_NEW_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Answers:
    """Hold the answers of one model to the held-out prompts, in their order.

    Attributes:
        texts: what is compared with the references.
        cut: whether each answer was cut by the token limit.
        loss: nats per supervised token of the teacher's held-out answers; None if there are none.
    """

    texts: tuple[str, ...]
    cut: tuple[bool, ...]
    loss: float | None


def evaluate(
    config: TrainConfig,
    on_batch: Progress = lambda _model, _total, _done: None,
    on_note: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Let base and student answer the held-out prompts; write scorecard.json and answers.jsonl.

    One model is loaded. It answers as the base with the adapter switched off.

    Args:
        on_batch: called after each batch of answers.
        on_note: called with lines for the operator.

    Returns:
        The content of scorecard.json: see `scorecard.scorecard`, with `without_reference` (prompts that
        can't be judged), `unverifiable` (prompts whose check ended badly, by reason), `teacher_pass` (pass@1
        and pass@n of all the teacher's answers, by task), `loss` (nats per supervised token, by model) and
        `cut` (answers cut by the token limit, by model).

    Raises:
        DataError: no prompt is held out.
        FindingsError: the adapter was changed after the training.
        StudentError: base or adapter can't be loaded, or the base is not the one the adapter was trained on.
        OutOfMemory: a single prompt does not fit.
    """
    model.set_threads(config.train)
    device = model.select_device(config.train)
    adapter = config.out_path / "adapter"
    weights.check_adapter(adapter)
    if (adapter / fingerprint.TREE_FILE).exists():  # adapters of the first versions have none
        fingerprint.require_intact(adapter)
    check_same_base(config, adapter)
    rows = dataset.read(config, learns=False)
    if not rows.held_out:
        raise DataError(
            "no prompt is held out to evaluate with",
            place=str(config.corpus),
            remedy=f"give rows a {config.data.split_field!r} other than 'train', or set [data] eval_share",
        )
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    check_same_tokens(config, renderer, adapter)
    targets = dataset.held_out_examples(rows.held_out, renderer, config)
    limit = answer_limit(config, rows, targets, renderer)
    for note in limit_notes(limit, rows.held_out, targets, renderer):
        on_note(note)
    student = model.load_trained_student(config, adapter, device)
    test = HeldOutTest(config, renderer, rows.held_out, targets, limit)
    count = len(rows.held_out)
    with student.disable_adapter():
        of_base = test.answers_of(student, on_note, partial(on_batch, "base", count))
    if device.type == "cpu":
        student.merge_adapter()  # in place and in fp32: the adapter costs no time per token
    of_student = test.answers_of(student, on_note, partial(on_batch, "student", count))
    answers = {"base": of_base, "student": of_student}
    card = make_card(test, answers)
    _write_results(test, card, answers)
    return card


@dataclass(frozen=True, slots=True)
class HeldOutTest:
    """Hold what every model is tested with.

    Attributes:
        targets: the teacher's answers as examples, for the loss.
        limit: tokens after which an answer is cut.
    """

    config: TrainConfig
    renderer: Renderer
    held_out: tuple[HeldOut, ...]
    targets: tuple[Example, ...]
    limit: int

    def answers_of(
        self, answering: Any, on_note: Callable[[str], None], on_done: Callable[[int], None]
    ) -> Answers:
        """Let a model answer the held-out prompts, and compute its loss on the teacher's answers."""
        answers = generate_answers(self, answering, on_note, on_done)
        texts = (self.renderer.decode(a.ids) for a in answers)
        return Answers(
            texts=tuple(judged_text(text, self.renderer, self.config) for text in texts),
            cut=tuple(answer.is_cut for answer in answers),
            loss=held_out_loss(answering, self.targets, self.config),
        )


def generate_answers(
    test: HeldOutTest,
    answering: Any,
    on_note: Callable[[str], None] = lambda _: None,
    on_done: Callable[[int], None] = lambda _: None,
) -> list[generate.Answer]:
    """Answer the held-out prompts greedily, in their order; see `trainer.model.generate`."""
    thinks = published_template.keeps_reasoning(test.config, test.renderer)
    prompts = test.renderer.prompts(
        [held.conversation for held in test.held_out], [thinks] * len(test.held_out)
    )
    return generate.generate(
        answering,
        prompts,
        generate.Limits(
            stop_id=test.renderer.chat_shape.stop_id,
            max_new_tokens=test.limit,
            batch=test.config.evaluate.batch,
            pad_id=test.renderer.tokenizer.pad_token_id,
        ),
        on_done=on_done,
        on_note=on_note,
    )


def answer_limit(config: TrainConfig, rows: Rows, targets: Sequence[Example], renderer: Renderer) -> int:
    """Return the number of tokens after which an answer is cut.

    It is `[evaluate] max_new_tokens`, or else the longest taught answer, reasoning and end of turn included,
    and the longest reference, but at most `[train] max_length`.
    """
    if config.evaluate.max_new_tokens is not None:
        return config.evaluate.max_new_tokens
    taught = [example.supervised for example in targets]
    if not taught:
        taught = _token_counts([dataset.answer_of(row, config.data) for row in rows.train], renderer)
    longest = max([MIN_NEW_TOKENS, *taught, *_reference_lengths(rows.held_out, renderer)])
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
    return _token_counts([held.reference for held in held_out if held.reference is not None], renderer)


def _token_counts(texts: Sequence[str], renderer: Renderer) -> list[int]:
    """Return the tokens of each text and its end of turn."""
    if not texts:
        return []
    ids = renderer.tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [len(row) + 1 for row in ids]


def judged_text(text: str, renderer: Renderer, config: TrainConfig) -> str:
    """Return the part of an answer that is judged: all but the reasoning that was taught with it."""
    if config.data.reasoning == "keep":
        return renderer.chat_shape.answer_in(text)
    if config.data.reasoning == "inline":
        _, mark, after = text.partition(INLINE_REASONING[1])
        return after if mark else text
    return text


def held_out_loss(answering: Any, examples: Sequence[Example], config: TrainConfig) -> float | None:
    """Compute the loss on the teacher's held-out answers, with the loss function of the training.

    Returns:
        Nats per supervised token; None without examples.
    """
    if not examples:
        return None
    device = next(answering.parameters()).device
    answering.requires_grad_(False)  # the loss of a frozen head needs no full logits
    forward = self_test.check_student(answering, config.base)
    total = 0.0
    with torch.no_grad(), self_test.attention_of(answering, forward.layout):
        for numbers in pack([len(e.ids) - 1 for e in examples], config.train.pack_budget).packs:
            losses = pack_losses(answering, [examples[i] for i in numbers], device, forward)
            total += sum(float(loss) for loss, _ in losses)
    return total / sum(e.supervised for e in examples)


def make_card(test: HeldOutTest, answers: Mapping[str, Answers]) -> dict[str, Any]:
    """Return the content of scorecard.json."""
    verifiers = verifiers_of(test.config)
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
    return card


def verifiers_of(config: TrainConfig) -> Verifiers:
    """Return the verifiers of `[verify]`; without that table, answers are compared with the reference.

    Raises:
        ConfigError: a function of a verifier can't be imported.
    """
    verifiers = Verifiers(config.verify or {EVERY_TASK: VerifierSection(kind="exact")}, config.root)
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
    for held, *texts in zip(held_out, base, student, [h.teacher for h in held_out], strict=True):
        like = held.candidates[0]
        judgements = [
            verifiers.judge(replace(like, text=text, outcome="ok" if text is not None else "missing"))
            for text in texts
        ]
        unverifiable = [j.reason for j in judgements if j.verdict == AnswerVerdict.UNVERIFIABLE]
        if unverifiable:
            reasons[unverifiable[0]] += 1
            continue
        passed = [judgement.verdict == AnswerVerdict.PASSED for judgement in judgements]
        judged.append(JudgedPrompt(held.prompt_id, held.task, held.split, *passed))
    return judged, reasons


def teacher_pass(held_out: Sequence[HeldOut], split: str, verifiers: Verifiers) -> dict[str, Any]:
    """Return by task how many of all the teacher's answers pass, and pass@1 and pass@n: see `TaskTally`."""
    tasks: dict[str, TaskTally] = {}
    for held in held_out:
        if held.split != split:
            continue
        tally = tasks.setdefault(held.task, TaskTally())
        for candidate in held.candidates:
            tally.add(held.prompt_id, verifiers.judge(candidate))
    return {task: tally.facts() for task, tally in sorted(tasks.items())}


def _write_results(test: HeldOutTest, card: dict[str, Any], answers: Mapping[str, Answers]) -> None:
    lines = []
    for i, held in enumerate(test.held_out):
        row = {
            "prompt_id": held.prompt_id,
            "task": held.task,
            "split": held.split,
            "reference": held.reference,
            "base": answers["base"].texts[i],
            "student": answers["student"].texts[i],
            "teacher": held.teacher,
            "base_cut": answers["base"].cut[i],
            "student_cut": answers["student"].cut[i],
        }
        lines.append(json.dumps(row, ensure_ascii=False))
    out = test.config.out_path
    (out / "answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary = out / ".scorecard.tmp"
    temporary.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    temporary.rename(out / "scorecard.json")
