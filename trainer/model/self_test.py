"""Test, before anything is learned or judged, that a student's rows are computed as its own forward would.

A few random documents of unlike lengths go through the student alone, by transformers' own forward; packed
into one row with our attention; and one document a row. The adapter is perturbed for the test, so that it
takes part; in fp32 its gradient is compared too. Where packed equals alone, rows are packed. Where it doesn't
(a recurrent state or convolution that runs over the border, a mask that our attention would drop), each
document gets a row of its own, and the student's own attention runs. A student whose own forward looks ahead
or is not finite is refused.

Recurrent and convolutional parts of some classes take `seq_idx` or `cu_seq_lens_q`, which say where documents
begin. In transformers 5.23 only kernels for CUDA read them, and the code for the CPU drops them without a
word. What a CPU can't compute can't be tested here, so such students go one document a row.

The test has two parts. A tiny random copy of the architecture, in fp32 on the CPU with windows shorter than
its documents, shows what the classes do; it needs no weights, so `plan` and `doctor` can run it too. The
loaded student then shows that its weights and the device's kernels do the same.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, PretrainedConfig

from trainer.errors import HarvesterError, StudentError
from trainer.model import rotary, structure
from trainer.model.forward import rows, segment_attention, varlen_attention
from trainer.model.forward.head import Head, find_head
from trainer.model.forward.rows import PACKED, RowLayout
from trainer.model.loading import kind_and_first_line
from trainer.model.out_of_memory import is_out_of_memory
from trainer.model.tiny_copy import tiny_copy
from trainer.model.weights import POSITIONS

# Tokens of the test's documents, longest first: two groups of unlike length, and a document of two tokens.
LENGTHS = (23, 14, 9, 5, 2)

# Token ids of the documents are below this.
MAX_TOKEN_ID = 1000

# Largest relative difference of a token's logits: in fp32 of any token, rounding makes about 1e-6 and the
# smallest leak seen 1e-2; in 16 bits of the median token, where rounding makes up to 2e-2.
WIDE_TOLERANCE = 1e-3
NARROW_TOLERANCE = 0.1

# Standard deviation of what is added to the adapter's parameters for the test.
PERTURBATION = 0.05

_WINDOW_NAME = re.compile(r"window|attention_chunk")

Documents = Sequence[npt.NDArray[np.int64]]


# Values of the gradient that are compared at most: a large adapter's parameters are taken at equal distances.
MAX_GRADIENT = 1 << 22


@dataclass(frozen=True, slots=True)
class Alone:
    """What a student's own forward computes for each document alone.

    Attributes:
        documents: token ids of each, longest first.
        logits: [tokens, vocabulary] of each document.
        gradient: of the summed loss for trained parameters, as one vector; None if it isn't compared.
    """

    documents: Documents
    logits: Sequence[torch.Tensor]
    gradient: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class StudentForward:
    """How a student's losses are computed.

    Attributes:
        layout: how documents become rows.
        head: scale and cap of the output layer; None: the student's own forward computes the logits.
        note: why rows are not packed, for the operator; empty where they are.
    """

    layout: RowLayout = PACKED
    head: Head | None = None
    note: str = ""


# Remedy for a student that fails the test.
_OTHER_STUDENT = "use a student whose architecture `trainer/ARCHITECTURES.md` lists as working"
# Why rows are not packed, or a student is loaded for its test.
NO_COPY = "no tiny copy of this architecture can be built and run"

# Packed rows, and logits from the student's own forward.
OWN_LOGITS = StudentForward()


def check_architecture(base: Path, device: torch.device | str = "cpu") -> StudentForward | None:
    """Test a tiny random copy of the base's architecture. No weights are read.

    Args:
        device: the device that will train; the test itself runs on the CPU.

    Returns:
        None if no tiny copy of this class can be built.

    Raises:
        StudentError: the architecture can't be trained; says why.
    """
    config_text = (base / "config.json").read_text(encoding="utf-8")
    problem = _check_architecture(base, config_text)
    if problem is None:
        return None
    config = _read_config(base).get_text_config(decoder=True)
    layout = replace(problem.layout, border=rotary.border_of(config))  # the copy's own is that of its sizes
    if layout.packed:
        layout = replace(layout, attention=packed_attention(device, config))
    return replace(problem, layout=layout)


@lru_cache(maxsize=16)
def _check_architecture(base: Path, config_text: str) -> StudentForward | None:
    """Test a tiny copy; `config_text` is the content of config.json, so that a changed one is tested anew."""
    del config_text
    try:
        copy = tiny_copy(_read_config(base))
        own_logits(copy, random_documents(copy)[0])
    except Exception:  # noqa: BLE001 - each class raises its own kinds
        return None
    copy.requires_grad_(False)
    return choose_forward(copy, place="[student] base")


def position_limit(base: Path) -> int:
    """Return how many tokens the base can read; 0 if it reads any number, or it can't be told.

    Learned positions and tables of them end somewhere; most rotary embeddings and ALiBi go on. A tiny copy of
    the architecture shows which of these it has: it reads as many tokens as its configuration names, and
    fails at one more.
    """
    return _position_limit(base, (base / "config.json").read_text(encoding="utf-8"))


@lru_cache(maxsize=16)
def _position_limit(base: Path, config_text: str) -> int:
    """Find the limit; `config_text` is the content of config.json, so that a changed one is tried anew."""
    del config_text
    try:
        config = _read_config(base)
        declared = _declared_positions(config)
        if not declared:
            return 0
        copy = tiny_copy(config)
        of_copy = _declared_positions(copy.config)
        with torch.no_grad():
            own_logits(copy, np.full(of_copy, random_documents(copy)[0][0]))
    except Exception:  # noqa: BLE001 - each class raises its own kinds
        return 0
    try:
        with torch.no_grad():
            own_logits(copy, np.full(of_copy + 1, random_documents(copy)[0][0]))
    except Exception:  # noqa: BLE001 - see above
        return declared
    return 0


def _declared_positions(config: Any) -> int:
    """Return the tokens that a configuration names under one of the names that classes have for them."""
    text = config.get_text_config(decoder=True)
    values = (getattr(text, name, None) for name in POSITIONS)
    return next((value for value in values if isinstance(value, int) and value > 0), 0)


def _read_config(base: Path) -> Any:
    """Read config.json as transformers does: it writes infinite numbers in a form of its own."""
    return AutoConfig.from_pretrained(base, local_files_only=True, trust_remote_code=False)


def check_student(student: Any, base: Path) -> StudentForward:
    """Test a loaded student, and a tiny copy of it where the loaded one can't show everything.

    Args:
        student: a causal language model of transformers, or a PEFT model around one. Its weights, mode and
            attention function are the same afterwards.
        base: folder of the base.

    Raises:
        StudentError: the student can't be trained; says why.
    """
    loaded = structure.base_model_of(student)
    parameter = next(loaded.parameters())
    needs_copy = parameter.dtype != torch.float32 or has_windows(loaded)
    copied = check_architecture(base, parameter.device) if needs_copy else None
    packs = copied.layout.packed if copied is not None else not needs_copy
    why = copied.note if copied is not None else NO_COPY
    return choose_forward(student, place=str(base), may_pack=packs, why_not=why)


def has_windows(model: Any) -> bool:
    """Return whether attention has windows or chunks that the test's documents could fit into."""
    values = structure.text_config(model).to_dict()
    return any(
        isinstance(value, int) and value >= max(LENGTHS)
        for name, value in values.items()
        if _WINDOW_NAME.search(name)
    )


def packed_attention(device: torch.device | str, config: Any = None) -> str:
    """Register our attention for packed rows with transformers, for a device; return its name.

    Args:
        config: the model's text configuration; None: any model.
    """
    if not varlen_attention.can_run(config or PretrainedConfig(), torch.device(device)):
        return segment_attention.register()
    if config is not None:
        varlen_attention.prepare(config, torch.device(device))
    return varlen_attention.register()


def choose_forward(student: Any, *, place: str, may_pack: bool = True, why_not: str = "") -> StudentForward:
    """Compare packed and unpacked rows with documents alone, and choose the first that agrees.

    Args:
        place: folder of the base, for the errors.
        may_pack: whether packed rows may be chosen; if not, `why_not` says why.

    Raises:
        StudentError: neither agrees, or the student's own forward is not causal or not finite.
    """
    base = structure.base_model_of(student)
    device = next(base.parameters()).device
    documents = random_documents(base)
    border = rotary.border_of(base)
    own = RowLayout(packed=False, attention=own_attention(base), border=border)
    has_gradient = bool(_tested_parameters(student))
    with _prepared(student), attention_of(student, own), torch.set_grad_enabled(has_gradient):
        logits = _logits_alone(student, documents, place)
        _check_own_forward(student, documents, logits, place)
        gradient = _own_gradient(student, documents, logits, place) if has_gradient else None
        alone = Alone(documents, [each.detach() for each in logits], gradient)
        head = find_head(student)
        reason = "" if may_pack else why_not
        config = structure.text_config(base)
        if may_pack:
            layout = RowLayout(attention=packed_attention(device, config), border=border)
            reason = _compare(student, alone, layout)
            if not reason:
                return StudentForward(layout, head)
        problem = _compare(student, alone, own)
    if problem:
        raise StudentError(
            f"this student's forward can't be reproduced: {problem}",
            place=place,
            remedy=_OTHER_STUDENT,
        )
    note = f"rows are not packed, each document has its own: {reason}. Shorter documents cost padding"
    return StudentForward(own, head, note)


def own_attention(base: Any) -> str:
    """Return the attention function of transformers that a model runs with when it isn't given ours."""
    current = str(base.config._attn_implementation)
    if current not in (segment_attention.ATTENTION_NAME, varlen_attention.ATTENTION_NAME):
        return current
    takes_sdpa: bool = base._supports_sdpa
    return "sdpa" if takes_sdpa else "eager"


@contextmanager
def attention_of(student: Any, layout: RowLayout) -> Iterator[None]:
    """Run with the attention function of a layout, and set back what was set before.

    Raises:
        ValueError: the student's class has no exchangeable attention.
    """
    base = structure.base_model_of(student)
    before = base.config._attn_implementation
    set_attention(base, layout)
    try:
        yield
    finally:
        if layout.attention != before:
            base.set_attn_implementation(before)


def set_attention(student: Any, layout: RowLayout) -> None:
    """Set the attention function of a layout.

    Raises:
        ValueError: the student's class has no exchangeable attention.
    """
    base = structure.base_model_of(student)
    if not layout.attention or base.config._attn_implementation == layout.attention:
        return
    base.set_attn_implementation(layout.attention)
    if base.config._attn_implementation != layout.attention:
        raise ValueError(f"{type(base).__name__} does not let its attention be exchanged")


def random_documents(base: Any) -> Documents:
    """Return random token ids, without ids that the configuration gives a meaning of their own."""
    special = structure.special_token_ids(base)
    rows_of_text = getattr(structure.text_config(base), "vocab_size", None)  # some embeddings have more rows
    most = min(structure.vocabulary_rows(base), rows_of_text or MAX_TOKEN_ID, MAX_TOKEN_ID)
    usable = [i for i in range(most) if i not in special]
    draw = np.random.default_rng(0)
    return [draw.choice(usable, size=length).astype(np.int64) for length in LENGTHS]


@contextmanager
def _prepared(student: Any) -> Iterator[None]:
    """Switch dropout off and perturb the trainable parameters; afterwards everything is as before."""
    was_training = student.training
    trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
    kept = [parameter.detach().clone() for parameter in trainable]
    draw = torch.Generator().manual_seed(0)
    student.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for parameter in trainable:
                noise = torch.randn(parameter.shape, generator=draw) * PERTURBATION
                parameter.add_(noise.to(parameter))
            yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trainable, kept, strict=True):
                parameter.copy_(value)
        student.train(was_training)


def own_logits(student: Any, document: npt.NDArray[np.int64]) -> torch.Tensor:
    """Return the logits [tokens, vocabulary] of a document alone, by transformers' own forward."""
    device = structure.base_model_of(student).get_input_embeddings().weight.device
    ids = rows.to_device(document, device)[None]
    logits: torch.Tensor = student(input_ids=ids, use_cache=False).logits[0]
    return logits


def _logits_alone(student: Any, documents: Documents, place: str) -> list[torch.Tensor]:
    """Return the logits of each document alone; refuse a student whose own forward fails."""
    try:
        return [own_logits(student, document) for document in documents]
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise StudentError(
            f"this student's own forward fails: {kind_and_first_line(error)}",
            place=place,
            remedy="use a causal language model that transformers can run with token ids alone",
        ) from None


def _check_own_forward(
    student: Any, documents: Documents, logits: Sequence[torch.Tensor], place: str
) -> None:
    """Refuse a student whose own forward is not finite, or whose logits depend on later tokens."""
    if not all(bool(torch.isfinite(each).all()) for each in logits):
        raise StudentError(
            "this student's logits are not finite",
            place=place,
            remedy="use another base, or fetch it again; a trained one was trained with too high an lr",
        )
    changed = documents[0].copy()
    changed[-4:] = documents[1][:4]
    before = logits[0].detach()
    if logit_difference([own_logits(student, changed)[:-4]], [before[:-4]]) > logit_tolerance(before):
        raise StudentError(
            "this student looks ahead: its logits depend on later tokens",
            place=place,
            remedy="use a causal language model",
        )


def _compare(student: Any, alone: Alone, layout: RowLayout) -> str:
    """Run the documents in a layout; return what differs from `alone`, empty if nothing does."""
    try:
        with attention_of(student, layout):
            outputs = _run(student, alone.documents, layout)
            gradient = None if alone.gradient is None else _gradient(student, alone.documents, outputs)
    except HarvesterError as error:
        return error.message
    except Exception as error:  # noqa: BLE001 - models raise all kinds for arguments they don't know
        return kind_and_first_line(error)
    if not all(bool(torch.isfinite(logits).all()) for logits in outputs):
        return "logits are not finite"
    how = "documents in one row see each other, or a mask is lost" if layout.packed else "rows differ"
    difference = logit_difference(outputs, alone.logits)
    if difference > logit_tolerance(alone.logits[0]):
        return f"{how}: logits change by {difference:.1%}"
    if gradient is not None and alone.gradient is not None:
        change = float((gradient - alone.gradient).norm() / alone.gradient.norm().clamp_min(1e-12))
        if not change <= WIDE_TOLERANCE:
            return f"{how}: the adapter's gradient changes by {change:.1%}"
    return ""


def _tested_parameters(student: Any) -> list[torch.nn.Parameter]:
    """Return trained parameters whose gradient is compared: at equal distances, about `MAX_GRADIENT` values.

    Empty where it would prove nothing or can't be had: nothing is trained; in 16 bits rounding changes which
    experts a token takes, so gradients differ without a fault; FSDP gathers layers for a whole backward only.
    """
    first = next(structure.base_model_of(student).parameters())
    if first.dtype != torch.float32 or torch.is_autocast_enabled(first.device.type):
        return []
    if any(hasattr(parameter, "to_local") for parameter in student.parameters()):
        return []
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    values = sum(parameter.numel() for parameter in trained)
    return trained[:: values // MAX_GRADIENT + 1]


def _gradient(student: Any, documents: Documents, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the gradient of the documents' loss for the tested parameters, as one vector."""
    predictions = torch.cat([logits[:-1] for logits in outputs]).float()
    targets = rows.to_device(np.concatenate([document[1:] for document in documents]), predictions.device)
    loss = torch.nn.functional.cross_entropy(predictions, targets, reduction="sum")
    parameters = _tested_parameters(student)
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
    return torch.cat(
        [
            torch.zeros_like(p).flatten() if g is None else g.flatten()
            for p, g in zip(parameters, gradients, strict=True)
        ]
    )


def _own_gradient(
    student: Any, documents: Documents, logits: Sequence[torch.Tensor], place: str
) -> torch.Tensor:
    """Return the gradient of the student's own forward; refuse a student that has none, such as Reformer."""
    try:
        return _gradient(student, documents, logits)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise StudentError(
            f"no gradient reaches the adapter: {kind_and_first_line(error)}",
            place=place,
            remedy=_OTHER_STUDENT,
        ) from None


def _run(student: Any, documents: Documents, layout: RowLayout) -> list[torch.Tensor]:
    base = structure.base_model_of(student)
    device = base.get_input_embeddings().weight.device
    lengths = [len(document) for document in documents]
    if layout.packed:
        arguments = rows.packed_arguments(documents, device, layout)
        return list(student(**arguments, use_cache=False).logits[0].split(lengths))
    outputs: list[torch.Tensor] = []
    for group in rows.groups(lengths):
        logits = student(**rows.unpacked_arguments(documents[group], device), use_cache=False).logits
        outputs += [row[:length] for row, length in zip(logits, lengths[group], strict=True)]
    return outputs


def logit_difference(outputs: Sequence[torch.Tensor], wanted: Sequence[torch.Tensor]) -> float:
    """Return the relative difference of a token's logits: the largest in fp32, the median in 16 bits."""
    left, right = torch.cat(list(outputs)).float(), torch.cat(list(wanted)).float()
    spread = (right - right.mean(dim=-1, keepdim=True)).norm(dim=-1)
    relative = (left - right).norm(dim=-1) / spread.clamp_min(1e-12)
    is_wide = wanted[0].dtype in (torch.float32, torch.float64)
    return float(relative.max() if is_wide else relative.median())


def logit_tolerance(logits: torch.Tensor) -> float:
    """Return the largest `logit_difference` that rounding makes in the dtype of these logits."""
    return WIDE_TOLERANCE if logits.dtype in (torch.float32, torch.float64) else NARROW_TOLERANCE
