"""Give the tokens of a student's answers the distributions that the teacher lists there. Loads no torch.

They are mapped to the student's tokens as those of the teacher's own answers are (`data.soft_targets`). A
token gets one only if it is a group of its own: of a longer group the teacher's tokens describe the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from trainer.data import soft_targets
from trainer.data.chat_template import Example, Renderer, SparseTargets
from trainer.data.teacher_tokens import TeacherSignal, TeacherTokens, TokenTable
from trainer.data.token_alignment import TeacherText
from trainer.onpolicy.groups import UNSCORED, Groups
from trainer.onpolicy.texts import Scored, TextToScore, listed_of_answer


def with_distributions(
    examples: Sequence[Example],
    texts: Sequence[TextToScore | None],
    scores: Sequence[Scored | None],
    groups: Sequence[Groups],
    table: TokenTable,
    renderer: Renderer,
) -> list[Example]:
    """Return the examples with soft targets, where the teacher listed several tokens.

    Args:
        texts, scores, groups: of each example.
        table: the tokens of the scores.
        renderer: of the student.
    """
    signals: dict[str, TeacherTokens] = {}
    for number, (text, scored) in enumerate(zip(texts, scores, strict=True)):
        if text is not None and scored is not None:
            listed = listed_of_answer(text, scored)
            if listed is not None and len(listed.tokens):
                signals[str(number)] = listed
    # A turn may end with more tokens than the one that stops the student.
    rest = np.asarray(renderer.chat_shape.end_of_turn[1:], dtype=np.int32)
    shown = [
        replace(example, ids=np.concatenate([example.ids, rest])) if example.terminated else example
        for example in examples
    ]
    answers = [TeacherText(b"" if text is None else text.answer) for text in texts]
    keys = [str(number) for number in range(len(examples))]
    attached, _ = soft_targets.attach(shown, keys, answers, TeacherSignal(table, signals), renderer)
    return [
        replace(example, soft=_of_single_tokens(each.soft, of))
        for example, each, of in zip(examples, attached, groups, strict=True)
    ]


def _of_single_tokens(soft: SparseTargets | None, groups: Groups) -> SparseTargets | None:
    """Return the soft targets of tokens that are groups of their own."""
    if soft is None:
        return None
    sizes = np.bincount(groups.of_token[groups.of_token != UNSCORED], minlength=1)
    of = groups.of_token[soft.positions]
    kept = np.flatnonzero((of != UNSCORED) & (sizes[of] == 1))
    if not len(kept):
        return None
    return SparseTargets(soft.positions[kept], soft.ids[kept], soft.log_probs[kept])
