"""Let the student of an on-policy distillation answer, learn from advantages, and be saved."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import peft
import torch
from safetensors.torch import load_file

from harvester.system.token_bytes import token_bytes
from trainer.config import TrainConfig
from trainer.data.chat_template import Example, Renderer
from trainer.data.packing import pack
from trainer.errors import ConfigError, StudentError
from trainer.model import model, self_test, weights
from trainer.model.forward.soft_loss import SoftMix
from trainer.model.generate import Answer, Limits, generate
from trainer.publish import serving
from trainer.publish.adapter import check_same_base, check_same_tokens
from trainer.training import checkpoint, optim
from trainer.training.distributed import World
from trainer.training.forward import TokenScores, token_scores
from trainer.training.samples import attention_for_generation
from trainer.training.step import Stepper, StepResult
from trainer.training.student import load_student

# File with an adapter's weights.
WEIGHTS = "adapter_model.safetensors"
# The student's own text is learned by KL(student || teacher) alone.
REVERSE = SoftMix(weight=1.0, direction="reverse")
# Keys of an adapter's configuration that have to be those of `[lora]`.
_SHAPE = {"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora", "use_dora": "dora"}


class OnPolicyStudent:
    """Loads base and adapter, and makes the steps. Dropout is off: answers and losses are of one model.

    Args:
        config: the train.toml, with the learning rate of the distillation.
        start: folder of the adapter to begin with; None: a new one.

    Raises:
        StudentError: base or adapter can't be used. ConfigError: the device is absent.
    """

    def __init__(self, config: TrainConfig, renderer: Renderer, start: Path | None) -> None:
        if config.is_full:
            raise ConfigError(
                "an on-policy distillation trains an adapter",
                place="train.method",
                remedy='set [train] method = "lora"',
            )
        self._config = config
        self._renderer = renderer
        longest = Example(np.zeros(config.train.max_length + 1, dtype=np.int32), 1)
        student = load_student(config, [longest], World())
        # Only examples with soft targets are learned by them.
        self._student = replace(student, row_loss=partial(student.row_loss, mix=REVERSE))
        self._student.model.eval()
        if start is not None:
            _load_adapter(self._student.model, config, renderer, start)
        self._optimiser = optim.adamw(self._student.parameters.items(), config.train, config.lora)
        self._stepper = Stepper(self._student, self._optimiser, config.train, World())

    @property
    def model(self) -> Any:
        """The PEFT model."""
        return self._student.model

    def sha256(self) -> str:
        """Return the SHA-256 of the adapter's weights."""
        hashed = hashlib.sha256()
        for name, parameter in self._student.parameters.items():
            hashed.update(name.encode())
            hashed.update(parameter.detach().cpu().contiguous().numpy().tobytes())
        return hashed.hexdigest()

    def answer(
        self,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[int],
        max_new_tokens: int,
        on_done: Callable[[int], None],
        on_note: Callable[[str], None],
    ) -> list[Answer]:
        """Sample one answer to each prompt at temperature 1, with a seed for each.

        Servers end an answer also at the base's own end tokens, so nothing that follows one is learned. It
        stays in the answer, scored as what it is: it is no end of turn to the teacher, and if it counted as
        one, the student would learn to end with it in place of the template's.
        """
        limits = Limits(
            stop_id=self._renderer.chat_shape.stop_id,
            max_new_tokens=max_new_tokens,
            batch=self._config.evaluate.batch,
            pad_id=self._renderer.tokenizer.pad_token_id,
            positions=self_test.position_limit(self._config.base),
            cuts=serving.other_stops(self._config, self._renderer),
            tokens=len(token_bytes(self._renderer.tokenizer)),
        )
        with attention_for_generation(self.model), torch.compiler.set_stance("force_eager"):
            return generate(self.model, prompts, limits, seeds=seeds, on_done=on_done, on_note=on_note)

    def scores(self, examples: Sequence[Example]) -> list[TokenScores]:
        """Return log-probability and divergence of each supervised token, as the training computes them."""
        found: dict[int, TokenScores] = {}
        for numbers in self._packs(examples):
            part = [examples[number] for number in numbers]
            values = token_scores(self.model, part, self._student.device, self._student.forward, REVERSE)
            found.update(zip(numbers, values, strict=True))
        return [found[number] for number in range(len(examples))]

    def learn(
        self,
        step: int,
        examples: Sequence[Example],
        token_weights: Sequence[npt.NDArray[np.float32]],
        scored: int,
    ) -> StepResult:
        """Make one optimiser step on the mean over scored tokens of what each adds to the divergence.

        A token with a soft target adds its divergence, times its weight; another one minus its
        log-probability times its advantage: cross-entropy on the student's own tokens, weighed by advantages.

        Args:
            step: number of the step, from 0.
            token_weights: [supervised] of each example: advantages, or 1 for a token with a soft target.
            scored: tokens that count.

        Raises:
            OutOfMemory: a pack did not fit. TrainingDiverged: several steps had no finite gradient.
        """
        supervised = sum(example.supervised for example in examples)
        factor = np.float32(supervised / scored)  # the step divides by all supervised tokens
        weighed = [
            replace(example, token_weights=values * factor)
            for example, values in zip(examples, token_weights, strict=True)
        ]
        optim.set_lr(self._optimiser, 1.0)
        packs = [[weighed[number] for number in numbers] for numbers in self._packs(weighed)]
        result = self._stepper.learn(step, packs)
        self._stepper.check(step, "onpolicy")
        return result

    def _packs(self, examples: Sequence[Example]) -> Sequence[Sequence[int]]:
        return pack([len(e.ids) - 1 for e in examples], self._config.train.pack_budget).packs

    def save(self, folder: Path, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint: weights, moments and the report so far.

        Raises:
            StoreFull, CheckpointError: it can't be written; earlier ones stay.
        """
        parameters = self._student.parameters
        moments = checkpoint.optimiser_moments(self._optimiser, parameters)
        checkpoint.save(folder, checkpoint.Checkpoint(step, state, parameters, moments))

    def restore(self, folder: Path) -> tuple[checkpoint.Checkpoint | None, list[str]]:
        """Load the newest valid checkpoint; return it, and a line for each newer one that is damaged.

        Raises:
            CheckpointError: it belongs to a student of another shape.
        """
        newest, skipped = checkpoint.newest_valid(folder)
        if newest is not None:
            checkpoint.restore(newest, self._optimiser, self._student.parameters)
        return newest, skipped


def _load_adapter(student: Any, config: TrainConfig, renderer: Renderer, folder: Path) -> None:
    """Put the weights of a trained adapter into the student.

    Raises:
        StudentError: there is none, it belongs to another base, or it has another shape than `[lora]`.
    """
    weights.check_adapter(folder)
    check_same_base(config, folder)
    check_same_tokens(config, renderer, folder)
    recorded = weights.read_json(folder / "adapter_config.json")
    for key, name in _SHAPE.items():
        if recorded.get(key) != getattr(config.lora, name):
            raise StudentError(
                f"the adapter to start from has {name} {recorded.get(key)}, train.toml has "
                f"{getattr(config.lora, name)}",
                place=str(folder),
                remedy="give [lora] the values that it was trained with",
            )
    tensors = load_file(folder / WEIGHTS)
    loaded = peft.set_peft_model_state_dict(student, tensors)
    own = model.trainable_parameters(student)
    missing = [name for name in loaded.missing_keys if name in own]
    if missing or loaded.unexpected_keys:
        name = (missing or list(loaded.unexpected_keys))[0]
        raise StudentError(
            f"the adapter to start from does not fit [lora]: {name}",
            place=str(folder),
            remedy="give [lora] the target and tokens that it was trained with",
        )
