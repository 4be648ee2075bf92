"""One optimiser step: packs in, one loss, one update or one skip.

A step's loss is the sum over the supervised tokens of all its packs, divided once by their number, so how a
step is cut into packs, or dealt to processes, changes nothing but memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from harvester.system import failpoints
from trainer.config import TrainSection
from trainer.data.chat_template import Example
from trainer.data.collator import Batch, collate
from trainer.errors import OutOfMemory, StudentError, TrainingDiverged
from trainer.model.losses import cross_entropy_sum, head_loss
from trainer.training.distributed import World

MAX_BAD_STEPS = 3
HOST_MEMORY_ERRORS = ("can't allocate memory", "not enough memory")  # torch's allocator: Linux, elsewhere
LINEAR_HEAD_MODELS = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "smollm3"}
)  # logits are hidden x weight, no more


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step was, on the device: reading a value waits for it.

    Attributes:
        loss: nats per supervised token. accuracy: share of right first guesses. norm: before clipping.
        asked: how many ranks were asked to stop.
    """

    loss: torch.Tensor
    accuracy: torch.Tensor
    norm: torch.Tensor
    asked: torch.Tensor
    tokens: int
    supervised: int


class Stepper:
    """Student and optimiser, and what went wrong so far.

    A step whose loss or gradient is not finite changes nothing: the fused optimiser gets `found_inf` and
    skips on the device, without a wait. `skipped` counts them; three in a row end the training.
    """

    def __init__(
        self,
        student: Any,
        named: Mapping[str, torch.nn.Parameter],
        optimiser: torch.optim.Optimizer,
        train: TrainSection,
        world: World,
        *,
        sharded: bool = False,
    ) -> None:
        self.sharded = sharded
        self.student, self.named, self.optimiser, self.train, self.world = (
            student,
            named,
            optimiser,
            train,
            world,
        )
        self.device = next(iter(named.values())).device
        self._bad = torch.zeros(3, dtype=torch.int64, device=self.device)  # skipped, in a row, worst row

    def learn(self, step: int, packs: Sequence[Sequence[Example]], *, asked: bool = False) -> StepResult:
        """Backward through this rank's packs, add up, update.

        Args:
            step: number of the step; with `[train] seed` and a pack's number it seeds dropout.

        Raises:
            OutOfMemory: names the pack that did not fit.
        """
        supervised = sum(example.supervised for pack in packs for example in pack)
        loss = torch.zeros((), device=self.device)
        correct = torch.zeros((), device=self.device)
        for number, counts in self._dealt(len(packs)):
            torch.manual_seed((self.train.seed * 1_000_003 + step) * 4099 + number)
            try:
                part, right = pack_loss(self.student, collate(packs[number], self.device))
                (part * counts / supervised).backward()  # type: ignore[no-untyped-call]
            except (RuntimeError, MemoryError) as error:
                raise _memory(error, packs[number]) from None
            loss += part.detach() * counts
            correct += right * counts
        failpoints.reach("train.backward")
        wish = torch.tensor(float(asked), device=self.device)
        grads = [self._grad(p) for p in self.named.values()] if self.world.size > 1 else []
        self.world.sum_in_place([*grads, loss, correct, wish])
        loss, correct = loss / supervised, correct / supervised
        norm = torch.nn.utils.clip_grad_norm_(self.named.values(), self.train.clip)
        self._update(loss, norm)
        tokens = sum(len(example.ids) - 1 for pack in packs for example in pack)
        return StepResult(loss, correct, norm, wish, tokens, supervised)

    def _dealt(self, packs: int) -> Iterator[tuple[int, int]]:
        """Numbers of this rank's packs, each with 1. Ranks that share a sharded base walk equally often, for
        they gather its layers together: one without a pack walks the last again, which counts 0."""
        for first in range(0, packs, self.world.size):
            number = first + self.world.rank
            if number < packs:
                yield number, 1
            elif self.sharded:
                yield packs - 1, 0

    def _grad(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        if parameter.grad is None:  # this rank had no pack
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad

    def _update(self, loss: torch.Tensor, norm: torch.Tensor) -> None:
        bad = ~(torch.isfinite(loss) & torch.isfinite(norm))
        self.optimiser.found_inf = bad.float()  # type: ignore[attr-defined]  # read by fused AdamW
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self._bad[0] += bad
        self._bad[1] = (self._bad[1] + 1) * bad
        self._bad[2] = torch.maximum(self._bad[1], self._bad[2])
        failpoints.reach("train.update")

    @property
    def skipped(self) -> int:
        """Steps that changed nothing. Waits for the device."""
        return int(self._bad[0])

    @skipped.setter
    def skipped(self, count: int) -> None:
        self._bad[0] = count

    def check(self, step: int, place: str) -> None:
        """Waits for the device and looks at what it counted.

        Raises:
            TrainingDiverged: several steps in a row had no finite loss or gradient.
        """
        if int(self._bad[2]) >= MAX_BAD_STEPS:
            raise TrainingDiverged(
                f"loss or gradient was not finite {MAX_BAD_STEPS} steps in a row, the last at {step + 1}",
                place=place,
                remedy="lower [train] lr; the last checkpoint is good",
            )


def check_first_gradient(norm: float) -> None:
    """A first step whose gradient is exactly zero will never be followed by another.

    Raises:
        StudentError: nothing that is trained takes part in the loss.
    """
    if norm == 0:
        raise StudentError(
            "no gradient reaches the adapter: it would never move",
            place="lora.target",
            remedy='target = "all-linear"; layers that the loss does not depend on learn nothing',
        )


def pack_loss(student: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss and right guesses of a pack; the output layer runs on judged positions only, in chunks."""
    whole = student.get_base_model() if hasattr(student, "get_base_model") else student
    head = whole.get_output_embeddings()
    if (
        type(head) is not torch.nn.Linear
        or head.weight.requires_grad
        or whole.config.model_type not in LINEAR_HEAD_MODELS
    ):
        return cross_entropy_sum(supervised_logits(student, batch), batch.targets)
    out = whole.model(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        segments=batch.segments,
    )
    hidden = out.last_hidden_state[0].index_select(0, batch.predict_at)
    return head_loss(hidden, head.weight, head.bias, batch.targets, getattr(whole, "judge", None))


def supervised_logits(student: Any, batch: Batch) -> torch.Tensor:
    """Logits [supervised, vocabulary] of a packed row."""
    out = student(
        input_ids=batch.input_ids,
        position_ids=batch.position_ids,
        use_cache=False,
        logits_to_keep=batch.predict_at,
        segments=batch.segments,
    )
    logits: torch.Tensor = out.logits[0]
    return logits


def _memory(error: RuntimeError | MemoryError, pack: Sequence[Example]) -> Exception:
    """The error itself, or ours when it says that memory ran out."""
    told = any(words in str(error) for words in HOST_MEMORY_ERRORS)
    if not isinstance(error, torch.OutOfMemoryError | MemoryError) and not told:
        return error
    longest, tokens = max(len(e.ids) for e in pack), sum(len(e.ids) - 1 for e in pack)
    return OutOfMemory(
        f"no memory for a pack of {len(pack)} examples x {longest} tokens at most, {tokens:,} in all",
        place="train.pack_tokens",
        remedy='[train] checkpointing = "always", or a lower pack_tokens (the step keeps its batch)',
    )
