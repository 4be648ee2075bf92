"""Keep the prompts that are held out for evaluation, with the teacher's answers to them. Loads no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from harvester.api.types import Outcome
from harvester.export.score import candidate_of
from harvester.quality.held_out import prompt_key
from harvester.quality.verifiers.verifiers import Candidate
from harvester.store.shards.schema import Sample
from trainer.config import DataSection, TrainConfig
from trainer.data.chat_template import Example, Renderer
from trainer.data.conversation import Conversation, can_be_restored, conversation_of
from trainer.data.row_rules import answer_of, exclusion_reason, longest_row, reasoning_of


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A prompt kept for evaluation and never learned from.

    Attributes:
        conversation: what the teacher was asked.
        teacher: the teacher's first answer; None if it gave none that is usable.
        target_answer: that answer as it would be learned.
        target_reasoning: its reasoning as it would be learned; None unless `[data] reasoning = "keep"`.
        candidates: all of the teacher's answers, for the verifiers.
    """

    prompt_id: str
    conversation: Conversation
    reference: str | None
    task: str
    split: str
    teacher: str | None
    target_answer: str | None = None
    target_reasoning: str | None = None
    candidates: tuple[Candidate, ...] = ()

    @property
    def tags(self) -> tuple[str, ...]:
        """Tags of the prompt."""
        return self.candidates[0].tags if self.candidates else ()


def prompts_of_samples(
    samples: Sequence[Sample], splits: Sequence[str], data: DataSection
) -> tuple[HeldOut, ...]:
    """Return the held-out prompts among samples, each with all of the teacher's answers.

    A prompt is known by its id and its content: a store may hold two prompts of one id, of two harvests with
    ids of their own, or asked under another system prompt later.

    Args:
        samples: in order of prompt id, sample number and key. splits: of each.
    """
    prompts: dict[tuple[str, str], HeldOut] = {}
    candidates: dict[tuple[str, str], list[Candidate]] = {}
    for sample, split in zip(samples, splits, strict=True):
        if split == "train" or not can_be_restored(sample):
            continue
        known_by = (sample.prompt_id, prompt_key(sample.messages))
        candidates.setdefault(known_by, []).append(candidate_of(sample))
        if known_by in prompts:
            continue
        task = sample.metadata.get("task")
        is_usable = not exclusion_reason(sample, data)
        is_whole = is_usable and sample.outcome == Outcome.OK
        prompts[known_by] = HeldOut(
            sample.prompt_id,
            conversation_of(sample),
            sample.reference,
            task if isinstance(task, str) and task else "all",
            split,
            sample.completion if is_usable else None,
            answer_of(sample, data) if is_whole else None,
            reasoning_of(sample, data) if is_whole else None,
        )
    return tuple(replace(held, candidates=tuple(candidates[known_by])) for known_by, held in prompts.items())


def held_out_examples(
    held_out: Sequence[HeldOut], renderer: Renderer, config: TrainConfig
) -> tuple[Example, ...]:
    """Render the teacher's held-out answers as if they were to be learned; leave out those too long."""
    return tuple(example for _, example in held_out_targets(held_out, renderer, config))


def held_out_targets(
    held_out: Sequence[HeldOut], renderer: Renderer, config: TrainConfig
) -> list[tuple[HeldOut, Example]]:
    """Render the teacher's held-out answers, each with its prompt; leave out those too long."""
    rows = [held for held in held_out if held.target_answer is not None]
    if not rows:
        return []
    examples = renderer.examples(
        [held.conversation for held in rows],
        [held.target_answer or "" for held in rows],
        [True] * len(rows),
        [held.target_reasoning for held in rows],
    )
    pairs = zip(rows, examples, strict=True)
    most = longest_row(config)
    return [(held, example) for held, example in pairs if len(example.ids) <= most]
