"""Find out, before answers are generated, how a model's class does it right.

Prompts of unlike lengths are answered together with padding on the left, and each step reuses the cache of
the steps before. Some classes of transformers ignore the mask that hides the padding (RecurrentGemma, the
decoders of BART's kind), others mix the prompts of a batch (RWKV) or make a mistake with their cache. Nothing
says so: answers are only worse. So a few forced tokens are generated after three random prompts, and their
logits are compared with those of the model's own forward without padding and cache. The same shows whether
rows can leave and join a batch (`continuous_batch`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from trainer.errors import OutOfMemory, StudentError
from trainer.model import structure
from trainer.model.continuous_batch import ContinuousBatch, padded, why_not
from trainer.model.loading import kind_and_first_line
from trainer.model.out_of_memory import is_out_of_memory
from trainer.model.self_test import logit_difference, logit_tolerance, own_logits, random_documents

# Tokens that are forced after each prompt: the last ones come from a cache that was written twice.
FORCED_TOKENS = 3

Prompt = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class GenerationMode:
    """How answers are generated.

    Attributes:
        refills: an answer that has ended leaves its batch, and the next prompt takes its place.
        pads: prompts of unlike lengths are answered together.
        batches: prompts of equal length are answered together; otherwise each alone.
        caches: each step reuses what the steps before computed; otherwise each computes everything anew.
    """

    refills: bool = True
    pads: bool = True
    batches: bool = True
    caches: bool = True

    @property
    def note(self) -> str:
        """What the operator should know about the time it takes; empty for the usual mode."""
        if self.refills:
            return ""
        if self.pads:
            return "a batch takes as long as its longest answer: this student's cache can't be cut row by row"
        what = (
            "only prompts of equal length are answered together"
            if self.batches
            else "each prompt is answered alone"
        )
        slow = "" if self.caches else ", without a cache"
        return f"{what}{slow}: anything else changes this student's answers"

    def batch(self, lengths: Sequence[int]) -> int:
        """Return how many of the prompts with these lengths, in order, are answered together."""
        if not self.batches:
            return 1
        return len(lengths) if self.pads else sum(length == lengths[0] for length in lengths)


# The modes, fastest first.
MODES = (
    GenerationMode(),
    GenerationMode(refills=False),
    GenerationMode(refills=False, pads=False),
    GenerationMode(refills=False, pads=False, batches=False),
    GenerationMode(refills=False, pads=False, batches=False, caches=False),
)


class _ForceTokens(LogitsProcessor):  # type: ignore[misc]
    """Make generation continue with given tokens, whatever the logits are."""

    def __init__(self, tokens: Sequence[int], prompt_length: int) -> None:
        self._tokens = tokens
        self._prompt_length = prompt_length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        forced = torch.full_like(scores, float("-inf"))
        forced[:, self._tokens[input_ids.shape[1] - self._prompt_length]] = 0.0
        return forced


def choose_mode(model: Any) -> GenerationMode:
    """Return the fastest mode whose logits are those of the model's own forward.

    Args:
        model: a causal language model, or a PEFT model around one, in evaluation mode.

    Raises:
        StudentError: no mode agrees, or the class can't generate.
        OutOfMemory: one short prompt does not fit.
    """
    other, longer, forced, shorter = random_documents(structure.base_model_of(model))[:4]
    tokens = forced[:FORCED_TOKENS]
    prompts = (shorter, other[: len(shorter)], longer)
    problem = ""
    try:
        with torch.inference_mode():
            wanted = [
                own_logits(model, np.concatenate([prompt, tokens]))[len(prompt) - 1 : -1]
                for prompt in prompts
            ]
            for mode in MODES:
                problem = _problem(model, prompts, tokens, mode, wanted)
                if not problem:
                    return mode
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"not enough memory to generate {len(tokens)} tokens after one prompt of {len(longer)}",
            remedy="use a device with more memory",
        ) from None
    raise cannot_generate(problem)


def cannot_generate(problem: str) -> StudentError:
    """Return the error of a student that generates wrong answers or none."""
    return StudentError(
        f"this student can't generate answers: {problem}",
        remedy="its class in transformers can't generate with this configuration",
    )


def _problem(
    model: Any,
    prompts: Sequence[Prompt],
    tokens: Prompt,
    mode: GenerationMode,
    wanted: Sequence[torch.Tensor],
) -> str:
    """Generate in a mode; return what is wrong with it, empty if nothing is.

    Raises:
        Exception: memory ran out for one prompt.
    """
    logits: list[torch.Tensor] = []
    try:
        if mode.refills:
            if reason := why_not(model):
                return reason
            logits = _refilled_logits(model, prompts, tokens)
        while len(logits) < len(prompts):
            rest = prompts[len(logits) :]
            together = rest[: mode.batch([len(prompt) for prompt in rest])]
            logits += _forced_logits(model, together, tokens, mode)
    except Exception as error:
        if is_out_of_memory(error) and not mode.batches:
            raise
        return kind_and_first_line(error, 200)
    difference = logit_difference(logits, wanted)
    if difference > logit_tolerance(wanted[0]):
        return f"logits change by {difference:.1%} while it generates"
    return ""


def _forced_logits(
    model: Any, prompts: Sequence[Prompt], tokens: Prompt, mode: GenerationMode
) -> list[torch.Tensor]:
    """Generate the tokens after each prompt; return the logits [tokens, vocabulary] they came from."""
    device = structure.base_model_of(model).get_input_embeddings().weight.device
    pad_id = int(tokens[0])  # any token: the mask must hide it
    ids, mask = padded([prompt.tolist() for prompt in prompts], pad_id)
    settings = GenerationConfig(
        do_sample=False,
        max_new_tokens=len(tokens),
        use_cache=mode.caches,
        pad_token_id=pad_id,
        output_logits=True,
        return_dict_in_generate=True,
    )
    output = model.generate(
        input_ids=ids.to(device),
        attention_mask=mask.to(device),
        generation_config=settings,
        logits_processor=LogitsProcessorList([_ForceTokens(tokens.tolist(), ids.shape[1])]),
    )
    return list(torch.stack(output.logits, dim=1))


def _refilled_logits(model: Any, prompts: Sequence[Prompt], tokens: Prompt) -> list[torch.Tensor]:
    """Return the same logits from one batch: each row joins one token after the row before, and leaves.

    Longer and shorter prompts join, and the longest one leaves before the last.
    """
    batch = ContinuousBatch(model, pad_id=int(tokens[0]))
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    running: list[int] = []
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i]) == max(map(len, prompts)))
    waiting.insert(1, waiting.pop())  # the longest one is the second
    while waiting or running:
        if running:
            forced = [tokens[len(logits[number]) - 1] for number in running]
            step = batch.step(torch.tensor(np.array(forced), device=batch.device))
            for number, row in zip(running, step, strict=True):
                logits[number].append(row)
        if waiting:
            running.append(waiting.pop(0))
            logits[running[-1]].append(batch.admit([prompts[running[-1]].tolist()])[0])
        kept = [place for place, number in enumerate(running) if len(logits[number]) < len(tokens)]
        if len(kept) < len(running):
            batch.keep(kept)
            running = [running[place] for place in kept]
    return [torch.stack(rows) for rows in logits]
