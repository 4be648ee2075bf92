"""Score base and student on the held-out prompts, beside the teacher's stored answers."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig

from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.chat_template import Example, Renderer
from trainer.data.dataset import INLINE_REASONING, HeldOut
from trainer.data.packing import pack
from trainer.errors import DataError
from trainer.evaluation.scorecard import JudgedPrompt, is_correct, scorecard
from trainer.model import model, self_test
from trainer.publish import serving
from trainer.training.forward import pack_losses

Progress = Callable[[str, int, int], None]


def evaluate(config: TrainConfig, on_batch: Progress = lambda _who, _total, _done: None) -> dict[str, Any]:
    """Score base, student and teacher on the same prompts; writes scorecard.json and answers.jsonl.

    Args:
        on_batch: told who answers, of how many prompts, and how many are done.

    Raises:
        DataError: no held-out prompt has a reference.
        StudentError: base or adapter can't be loaded.
    """
    model.set_threads(config.train)
    device = model.select_device(config.train)
    rows = dataset.read(config)
    asked = [h for h in rows.held_out if h.reference is not None]
    if not asked:
        raise DataError(
            "no held-out prompt with a reference to judge with",
            place=str(config.corpus),
            remedy=f"rows need a reference and {config.data.split_field!r} other than 'train', or eval_share",
        )
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    thinks = serving.keeps_reasoning(config, renderer)
    prompts = renderer.prompts([h.messages for h in asked], [thinks] * len(asked))
    taught = held_out_examples(rows.held_out, renderer, config)
    said: dict[str, list[str]] = {}
    loss: dict[str, float | None] = {}
    for who in ("base", "student"):
        if who == "base":
            answering = model.load_base(config.base, device)
        else:
            answering = model.load_trained_student(config, config.out_path / "adapter", device)
        texts = generate_answers(answering, renderer, prompts, config, partial(on_batch, who, len(asked)))
        said[who] = [judged_text(text, renderer, config) for text in texts]
        loss[who] = held_out_loss(answering, taught, config)
    card = scorecard(judge_answers(asked, said), resamples=config.evaluate.resamples)
    card["without_reference"] = len(rows.held_out) - len(asked)
    card["loss"] = {**loss, "tokens": sum(e.supervised for e in taught)}
    _write_results(config, card, asked, said)
    return card


def generate_answers(
    answering: Any,
    renderer: Renderer,
    prompts: Sequence[Sequence[int]],
    config: TrainConfig,
    on_done: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Greedy answers, in the order of the prompts.

    Prompts are batched by length and padded on the left, so that all of a batch begin to answer in the same
    column; a batch ends when its last answer does.
    """
    stop = renderer.chat_shape.stop_id
    pad = renderer.tokenizer.pad_token_id
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=config.evaluate.max_new_tokens,
        eos_token_id=stop,
        pad_token_id=stop if pad is None else pad,
    )
    device = next(answering.parameters()).device
    texts = [""] * len(prompts)
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for begin in range(0, len(by_length), config.evaluate.batch):
        numbers = by_length[begin : begin + config.evaluate.batch]
        longest = max(len(prompts[i]) for i in numbers)
        ids = torch.full((len(numbers), longest), stop, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(numbers):
            ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i], dtype=torch.int64)
            mask[row, longest - len(prompts[i]) :] = 1
        with torch.inference_mode():
            out = answering.generate(
                input_ids=ids.to(device), attention_mask=mask.to(device), generation_config=settings
            )
        for i, new in zip(numbers, out[:, longest:].tolist(), strict=True):
            answer = new[: new.index(stop)] if stop in new else new
            texts[i] = renderer.tokenizer.decode(answer, skip_special_tokens=False)
        on_done(begin + len(numbers))
    return texts


def judged_text(text: str, renderer: Renderer, config: TrainConfig) -> str:
    """What is judged: the answer, without the reasoning a student was taught to say before it."""
    if config.data.reasoning == "keep":
        return renderer.chat_shape.answer_in(text)
    _, mark, after = (
        text.partition(INLINE_REASONING[1]) if config.data.reasoning == "inline" else ("", "", "")
    )
    return after if mark else text


def held_out_examples(
    held_out: Sequence[HeldOut], renderer: Renderer, config: TrainConfig
) -> tuple[Example, ...]:
    """The teacher's held-out answers, rendered as if they were to be learned; those too long are left out."""
    rows = [h for h in held_out if h.target_answer is not None]
    made = renderer.examples(
        [h.messages for h in rows],
        [h.target_answer or "" for h in rows],
        [True] * len(rows),
        [h.target_reasoning for h in rows],
    )
    return tuple(e for e in made if len(e.ids) <= config.train.max_length)


def held_out_loss(answering: Any, examples: Sequence[Example], config: TrainConfig) -> float | None:
    """Nats per supervised token of the teacher's held-out answers, by the loss function that trains.

    Returns:
        None where there is nothing to judge with.
    """
    if not examples:
        return None
    device = next(answering.parameters()).device
    answering.requires_grad_(False)  # a frozen head is never laid out as a whole
    forward = self_test.check_student(answering, config.base)
    total = 0.0
    with torch.no_grad(), self_test.attention_of(answering, forward.layout):
        for numbers in pack([len(e.ids) - 1 for e in examples], config.train.pack_budget).packs:
            losses = pack_losses(answering, [examples[i] for i in numbers], device, forward)
            total += sum(float(loss) for loss, _ in losses)
    return total / sum(e.supervised for e in examples)


def judge_answers(asked: Sequence[HeldOut], said: dict[str, list[str]]) -> list[JudgedPrompt]:
    """Every answer against its reference. A prompt without a usable teacher answer counts as wrong."""
    return [
        JudgedPrompt(
            prompt_id=held.prompt_id,
            task=held.task,
            split=held.split,
            base=is_correct(base, held.reference or ""),
            student=is_correct(student, held.reference or ""),
            teacher=is_correct(held.teacher, held.reference or ""),
        )
        for held, base, student in zip(asked, said["base"], said["student"], strict=True)
    ]


def _write_results(
    config: TrainConfig, card: dict[str, Any], asked: Sequence[HeldOut], said: dict[str, list[str]]
) -> None:
    lines = [
        json.dumps(
            {
                "prompt_id": held.prompt_id,
                "task": held.task,
                "split": held.split,
                "reference": held.reference,
                "base": base,
                "student": student,
                "teacher": held.teacher,
            },
            ensure_ascii=False,
        )
        for held, base, student in zip(asked, said["base"], said["student"], strict=True)
    ]
    out = config.out_path
    (out / "answers.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    aside = out / ".scorecard.tmp"
    aside.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    aside.rename(out / "scorecard.json")
