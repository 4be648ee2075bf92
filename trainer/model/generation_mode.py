"""Find out, before answers are generated, how a model's class does it right.

Prompts of unlike lengths are answered together with padding on the left, and each step reuses the cache of
the steps before. Some classes of transformers ignore the mask that hides the padding (RecurrentGemma, the
decoders of BART's kind), others mix the prompts of a batch (RWKV) or make a mistake with their cache. Nothing
says so: answers are only worse. So a few forced tokens are generated after three random prompts, and their
logits are compared with those of the model's own forward without padding and cache.
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
        pads: prompts of unlike lengths are answered together.
        batches: prompts of equal length are answered together; otherwise each alone.
        caches: each step reuses what the steps before computed; otherwise each computes everything anew.
    """

    pads: bool = True
    batches: bool = True
    caches: bool = True

    @property
    def note(self) -> str:
        """What the operator should know about the time it takes; empty for the usual mode."""
        if self.pads:
            return ""
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
    GenerationMode(pads=False),
    GenerationMode(pads=False, batches=False),
    GenerationMode(pads=False, batches=False, caches=False),
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


def padded(prompts: Sequence[Sequence[int]], pad_id: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids [prompts, longest] padded on the left, and the mask that hides the padding."""
    longest = max(map(len, prompts))
    ids = torch.full((len(prompts), longest), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt, dtype=torch.int64)
        mask[row, longest - len(prompt) :] = 1
    return ids, mask


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
