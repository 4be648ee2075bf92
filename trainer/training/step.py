"""Make one optimiser step: forward and backward through all packs, one update or one skip.

The loss of a step is the sum over the supervised tokens of all its packs, each times the weight of its row,
divided once by the sum of these weights: where all rows count alike, by the number of tokens. So
neither the cut into packs nor the number of processes changes the result, only the memory needed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from harvester.system import failpoints
from trainer.config import TrainSection
from trainer.data.chat_template import Example
from trainer.errors import ConfigError, OutOfMemory, StudentError, TrainingDiverged
from trainer.model.forward.compile import is_of_compiler
from trainer.model.loading import first_line
from trainer.model.out_of_memory import is_out_of_memory
from trainer.training.distributed import World
from trainer.training.forward import pack_losses
from trainer.training.student import TrainableStudent

# Steps in a row without a finite loss or gradient that end the training.
MAX_BAD_STEPS = 3


@dataclass(frozen=True, slots=True)
class StepResult:
    """What one step measured. The tensors are scalars on the device; reading one waits for the device.

    Attributes:
        loss: nats per supervised token, as the mean by the weights of the rows.
        accuracy: share of supervised tokens predicted correctly, 0 to 1.
        norm: L2 norm of the gradient before clipping.
        tokens: tokens that were fed to the model, on all ranks.
        supervised: tokens that count in the loss, on all ranks.
    """

    loss: torch.Tensor
    accuracy: torch.Tensor
    norm: torch.Tensor
    tokens: int
    supervised: int


class Stepper:
    """Make steps, and count those that were skipped.

    A step whose loss or gradient is not finite changes nothing: the fused optimiser reads `found_inf` on
    the device and skips the update, so the host does not have to wait.

    Args:
        skipped: steps that were skipped before a resume.
    """

    def __init__(
        self,
        student: TrainableStudent,
        optimiser: torch.optim.Optimizer,
        train: TrainSection,
        world: World,
        *,
        skipped: int = 0,
    ) -> None:
        self._student = student
        self._optimiser = optimiser
        self._train = train
        self._world = world
        self._device = student.device
        # Bad steps so far: in all, in a row up to now, and the longest row.
        self._bad_steps = torch.zeros(3, dtype=torch.int64, device=self._device)
        self._bad_steps[0] = skipped

    def learn(self, step: int, packs: Sequence[Sequence[Example]]) -> StepResult:
        """Run backward through this rank's packs, sum over the ranks, clip and update.

        Args:
            step: number of the step, from 0. With `[train] seed` and the pack's number it seeds dropout.
            packs: the packs of the whole step, for all ranks.

        Raises:
            OutOfMemory: a pack did not fit; the message gives its size.
            ConfigError: `[train] compile` is set and torch's compiler fails, or `deterministic` is set and a
                kernel can't be.
        """
        supervised = sum(example.supervised for pack in packs for example in pack)
        # Exactly `supervised` where all rows count alike.
        weighed = math.fsum(example.supervised * example.weight for pack in packs for example in pack)
        tokens = sum(len(example.ids) - 1 for pack in packs for example in pack)
        loss = torch.zeros((), device=self._device)
        correct = torch.zeros((), device=self._device)
        for number, weight in packs_of_rank(len(packs), self._world, self._student):
            torch.manual_seed((self._train.seed * 1_000_003 + step) * 4099 + number)
            pack_sum, pack_correct = self._backward(packs[number], weight, weighed)
            loss += pack_sum * weight
            correct += pack_correct * weight
        failpoints.reach("train.backward")
        parameters = self._student.parameters.values()
        gradients = [_gradient(p) for p in parameters] if self._world.size > 1 else []
        self._world.sum_in_place([*gradients, loss, correct])
        loss, accuracy = loss / weighed, correct / supervised
        norm = torch.nn.utils.clip_grad_norm_(parameters, self._train.clip)
        self._update(loss, norm)
        return StepResult(loss, accuracy, norm, tokens, supervised)

    def _backward(
        self, pack: Sequence[Example], weight: int, weighed: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add the gradient of loss * weight / weighed; return the summed loss and the correct count."""
        loss = torch.zeros((), device=self._device)
        correct = torch.zeros((), dtype=torch.int64, device=self._device)
        try:
            for batch_loss, batch_correct in pack_losses(
                self._student.model, pack, self._device, self._student.forward, self._student.row_loss
            ):
                (batch_loss * weight / weighed).backward()  # type: ignore[no-untyped-call]
                loss += batch_loss.detach()
                correct += batch_correct
        except (RuntimeError, MemoryError) as error:
            if is_of_compiler(error):
                raise ConfigError(
                    f"torch.compile can't compile this student: {first_line(error)}",
                    place="train.compile",
                    remedy="set [train] compile = false in train.toml",
                ) from None
            if self._train.deterministic and "deterministic" in str(error):
                raise ConfigError(
                    f"no deterministic kernel for this student: {first_line(error)}",
                    place="train.deterministic",
                    remedy="set [train] deterministic = false in train.toml",
                ) from None
            raise _as_out_of_memory(error, pack, self._remedy(pack)) from None
        return loss, correct

    def _remedy(self, pack: Sequence[Example]) -> str:
        """Return which settings to change when a pack doesn't fit."""
        half = sum(len(example.ids) - 1 for example in pack) // 2
        smaller = (
            f"pack_tokens = {half} (the step keeps its batch)"
            if half >= self._train.max_length
            else "a lower pack_tokens and max_length"
        )
        return smaller if self._student.checkpointing else f'[train] checkpointing = "always", or {smaller}'

    def _update(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        is_bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        # torch's own protocol between GradScaler and fused optimisers: a non-zero found_inf skips the update.
        self._optimiser.found_inf = is_bad.float()  # type: ignore[attr-defined]
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)
        self._bad_steps[0] += is_bad
        self._bad_steps[1] = (self._bad_steps[1] + 1) * is_bad
        self._bad_steps[2] = torch.maximum(self._bad_steps[1], self._bad_steps[2])
        failpoints.reach("train.update")

    @property
    def skipped(self) -> int:
        """Number of skipped steps. Reading it waits for the device."""
        return int(self._bad_steps[0])

    @property
    def skipped_last(self) -> int:
        """Number of skipped steps since the last one that was not, or since a resume."""
        return int(self._bad_steps[1])

    def check(self, step: int, place: str) -> None:
        """Check the count of bad steps. Waits for the device.

        Args:
            place: the folder of checkpoints, for the error.

        Raises:
            TrainingDiverged: several steps in a row had no finite loss or gradient.
        """
        if int(self._bad_steps[2]) >= MAX_BAD_STEPS:
            raise TrainingDiverged(
                f"loss or gradient was not finite in {MAX_BAD_STEPS} steps in a row, the last is {step + 1}",
                place=place,
                remedy="lower [train] lr; the last checkpoint is good",
            )


def packs_of_rank(packs: int, world: World, student: TrainableStudent) -> Iterator[tuple[int, int]]:
    """Yield (pack number, weight) for this rank: packs rank, rank + size, ...

    With FSDP all ranks must run the same number of forwards, because they gather layers together. A rank
    without a pack repeats the last one with weight 0.
    """
    for first in range(0, packs, world.size):
        number = first + world.rank
        if number < packs:
            yield number, 1
        elif student.sharded:
            yield packs - 1, 0


def check_first_gradient(norm: float) -> None:
    """Refuse a first step whose gradient is exactly zero: the adapter would never change.

    Raises:
        StudentError: no trained parameter takes part in the loss.
    """
    if norm == 0:
        raise StudentError(
            "no gradient reaches the adapter: training would never change it",
            place="lora.target",
            remedy='set [lora] target = "all-linear" in train.toml; layers that the loss does not depend '
            "on learn nothing",
        )


def _gradient(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return a parameter's gradient; zeros on a rank that had no pack in this step."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def _as_out_of_memory(error: RuntimeError | MemoryError, pack: Sequence[Example], remedy: str) -> Exception:
    """Return OutOfMemory when the error says that memory ran out, else the error itself."""
    if not is_out_of_memory(error):
        return error
    longest = max(len(example.ids) for example in pack)
    tokens = sum(len(example.ids) - 1 for example in pack)
    return OutOfMemory(
        f"not enough memory for a pack of {len(pack)} examples of up to {longest} tokens, {tokens:,} in all",
        place="train.pack_tokens",
        remedy=remedy,
    )
