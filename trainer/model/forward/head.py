"""Find how a model turns hidden states into logits, by asking the model instead of a list of families.

The loss can be computed in chunks, without the whole [tokens, vocabulary] tensor, where the output layer is
a frozen linear layer and its outputs are at most scaled and soft-capped:
logits = cap * tanh(scale * (W h + b) / cap). Scale and cap are measured: chosen values are put in place of
the layer's output and the model's own logits are read. What is found is then compared with the model's
logits of real hidden states.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from trainer.model import structure

# Values put in place of the output layer's result; the first shows the slope at 0, the last the cap.
_POINTS = (1e-3, -1.0, 0.5, 3.0, -7.0, 40.0, -90.0, 1e9)

# Largest relative difference between the model's logits and the formula's, by the dtype of the weights.
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
_NARROW_TOLERANCE = 5e-2


@dataclass(frozen=True, slots=True)
class Head:
    """Factor and soft cap between the output layer and the logits: cap * tanh(scale * x / cap).

    Attributes:
        scale: factor on the output layer's result.
        cap: largest absolute logit, None without a cap.
    """

    scale: float = 1.0
    cap: float | None = None

    def logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """Return the logits for the output layer's results."""
        scaled = outputs * self.scale if self.scale != 1.0 else outputs
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)


def find_head(student: Any) -> Head | None:
    """Measure scale and cap of a student's output layer.

    Args:
        student: a causal language model of transformers, or a PEFT model around one, with its weights.

    Returns:
        None where the logits must come from the model's own forward: the output layer is trained, is not a
        plain linear layer, or does more than scale and cap.
    """
    base = structure.base_model_of(student)
    layer, body = base.get_output_embeddings(), structure.backbone(base)
    if type(layer) is not torch.nn.Linear or layer.weight.requires_grad or body is None:
        return None
    was_training = base.training
    base.eval()
    try:
        with torch.no_grad():
            return _measure(base, layer, body)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError):
        return None  # the model's parts do not fit together as assumed
    finally:
        base.train(was_training)


def _measure(base: Any, layer: torch.nn.Linear, body: Any) -> Head | None:
    taken: dict[str, torch.Tensor] = {}
    ids = torch.arange(1, 9, device=layer.weight.device)[None] % layer.weight.shape[0]

    def keep_hidden(_module: Any, _inputs: Any, output: Any) -> None:
        taken["hidden"] = output.last_hidden_state if hasattr(output, "last_hidden_state") else output[0]

    def keep_input(_module: Any, inputs: Any, _output: Any) -> None:
        taken["input"] = inputs[0]

    with _hooked(body, keep_hidden), _hooked(layer, keep_input):
        logits = base(input_ids=ids, use_cache=False).logits[0].float()
    hidden, head_input = taken["hidden"][0].float(), taken["input"].reshape(ids.numel(), -1).float()
    before = float((hidden * head_input).sum() / (hidden * hidden).sum())
    before = 1.0 if torch.equal(hidden, head_input) else before
    points = torch.tensor(_POINTS, dtype=torch.float32, device=ids.device)

    def replace(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        changed = torch.zeros_like(output, dtype=torch.float32)
        changed[..., : len(points)] = points
        return changed

    with _hooked(layer, replace):
        answers = base(input_ids=ids, use_cache=False).logits[0, -1, : len(points)].float()
    after = Head(*_scale_and_cap(answers.tolist()))
    if not torch.allclose(after.logits(points), answers, rtol=1e-4):
        return None
    head = Head(_rounded(before * after.scale), after.cap)
    outputs = torch.nn.functional.linear(taken["hidden"][0], layer.weight, layer.bias).float()
    difference = (head.logits(outputs) - logits).norm() / logits.norm()
    tolerance = _TOLERANCE.get(layer.weight.dtype, _NARROW_TOLERANCE)
    return head if math.isfinite(float(difference)) and float(difference) <= tolerance else None


def _scale_and_cap(answers: list[float]) -> tuple[float, float | None]:
    scale = _rounded(answers[0] / _POINTS[0])
    is_capped = abs(answers[-1]) < 1e-3 * abs(scale) * _POINTS[-1]
    return scale, _rounded(answers[-1]) if is_capped else None


def _rounded(value: float) -> float:
    """Return the value without the last digits of its measurement in fp32."""
    return float(f"{value:.6g}")


@contextmanager
def _hooked(module: torch.nn.Module, hook: Callable[..., Any]) -> Any:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
