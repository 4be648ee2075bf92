"""Put a new LoRA adapter on a base: which layers it takes, and which it must leave out."""

from __future__ import annotations

import difflib
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners import tuners_utils
from peft.tuners.lora import LoraLayer
from peft.utils import ModulesToSaveWrapper

from trainer.config import LoraSection
from trainer.errors import StudentError
from trainer.model import structure
from trainer.model.loading import first_line


def add_adapter(base: Any, lora: LoraSection, token_ids: Sequence[int] = ()) -> Any:
    """Put a new LoRA adapter on a base; A is drawn from torch's global generator.

    Args:
        token_ids: tokens whose rows of embedding and output layer are trained too.

    Raises:
        StudentError: a name in `[lora] target` matches no linear layer, or it is a tied embedding.
    """
    _check_ties(base, lora.target)
    _check_names(base, lora.target)
    whole = saved_modules(base, lora)
    if token_ids and (twice := _trained_twice(base, whole)):
        raise StudentError(
            f"{twice} is trained as a whole, with the rows of all tokens",
            place="lora.trainable_tokens",
            remedy=f"leave [lora] trainable_tokens out, or {twice} out of modules_to_save",
        )
    remedy = _target_remedy(base)  # PEFT changes the base before it refuses
    is_tied = bool(getattr(base.config, "tie_word_embeddings", False))
    excluded = excluded_layers(base) if isinstance(lora.target, str) else []
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # peft calls a deprecated name of transformers
            student = get_peft_model(
                base,
                LoraConfig(
                    task_type="CAUSAL_LM",
                    r=lora.rank,
                    lora_alpha=lora.alpha,
                    lora_dropout=lora.dropout,
                    target_modules=lora.target if isinstance(lora.target, str) else list(lora.target),
                    exclude_modules=excluded or None,
                    trainable_token_indices=_trainable_rows(base, token_ids) if token_ids else None,
                    use_rslora=lora.rslora,
                    use_dora=lora.dora,
                    modules_to_save=list(whole) or None,
                    ensure_weight_tying=is_tied and any(_is_embedding(base, name) for name in whole),
                ),
                autocast_adapter_dtype=True,  # fp32 master weights over a bf16 base
            )
    except ValueError as error:
        raise StudentError(f"no adapter: {first_line(error)}", place="lora.target", remedy=remedy) from None
    _widen_saved_modules(student)
    return student


def saved_modules(base: Any, lora: LoraSection) -> list[str]:
    """Return the modules of `[lora] modules_to_save` as PEFT wants them: one for two tied layers.

    PEFT takes every module whose name ends with a text, so "norm" would take "input_layernorm" too; where
    that would happen, full names are returned.

    Raises:
        StudentError: a name matches no module, is a target too, or is the output layer of a tied base alone.
    """
    names = [name for name, _ in base.named_modules() if name]
    last_parts = sorted({name.rpartition(".")[2] for name in names})
    for wanted in lora.modules_to_save:
        if wanted not in last_parts:
            near = difflib.get_close_matches(wanted, last_parts, n=1)
            raise StudentError(
                f"no module is named {wanted!r}",
                place="lora.modules_to_save",
                remedy=f"did you mean {near[0]!r}?" if near else _ends_of(base),
            )
        if not isinstance(lora.target, str) and wanted in lora.target:
            raise StudentError(
                f"{wanted} can't be trained as a whole and have an adapter",
                place="lora.modules_to_save",
                remedy="name it there or in [lora] target",
            )
    kept = _untied(base, lora.modules_to_save)
    found: list[str] = []
    for wanted in kept:
        matches = [name for name in names if name.rpartition(".")[2] == wanted]
        found += [wanted] if matches == [name for name in names if name.endswith(wanted)] else matches
    return found


def _ends_of(base: Any) -> str:
    embedding, output = _embedding_names(base)
    return f"the embedding of this base is {embedding!r}, its output layer {output!r}"


def _embedding_names(base: Any) -> tuple[str, str]:
    """Return the names of the embedding and the output layer in the modules that hold them."""
    embedding, output = (
        next((n.rpartition(".")[2] for n, each in base.named_modules() if each is module), "")
        for module in (base.get_input_embeddings(), base.get_output_embeddings())
    )
    return embedding, output


def _untied(base: Any, wanted: Sequence[str]) -> list[str]:
    """Leave out the output layer where it shares its weight with the embedding, which is named, too."""
    if not getattr(base.config, "tie_word_embeddings", False):
        return list(wanted)
    embedding, output = _embedding_names(base)
    if output in wanted and embedding not in wanted:
        remedy = f'name "{embedding}", which trains that one weight'
        raise _tied(output, "lora.modules_to_save", remedy)
    return [name for name in wanted if name != output]


def _trained_twice(base: Any, whole: Sequence[str]) -> str:
    """Return the embedding or output layer if it is trained as a whole; "" if neither is."""
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    names = [name for name, module in base.named_modules() if any(module is layer for layer in layers)]
    return next((wanted for wanted in whole if any(name.endswith(wanted) for name in names)), "")


def _is_embedding(base: Any, name: str) -> bool:
    embedding = base.get_input_embeddings()
    return any(n.endswith(name) and module is embedding for n, module in base.named_modules())


def _widen_saved_modules(student: Any) -> None:
    """Keep modules that are trained as a whole in fp32; over a narrower base they compute in its dtype."""
    dtype = next((p.dtype for p in student.parameters() if not p.requires_grad), torch.float32)
    for wrapper in student.modules():
        if not isinstance(wrapper, ModulesToSaveWrapper) or dtype == torch.float32:
            continue
        module = wrapper.modules_to_save["default"]
        for parameter in module.parameters():
            parameter.data = parameter.data.float()
        module.forward = MethodType(_in_dtype(dtype, module.forward), module)


def _in_dtype(dtype: torch.dtype, forward: Callable[..., Any]) -> Callable[..., Any]:
    """Return a forward that runs with parameters rounded to `dtype`; gradients reach those in fp32."""

    def narrow(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        held = self._parameters
        rounded = {name: None if value is None else value.to(dtype) for name, value in held.items()}
        self._parameters = rounded  # type: ignore[assignment]
        try:
            return forward(*args, **kwargs)
        finally:
            self._parameters = held

    return narrow


def _trainable_rows(base: Any, token_ids: Sequence[int]) -> list[int] | dict[str, list[int]]:
    """The rows to train as PEFT wants them: by layer, or once where input and output share one weight."""
    if getattr(structure.text_config(base), "tie_word_embeddings", False):
        return list(token_ids)
    layers = (base.get_input_embeddings(), base.get_output_embeddings())
    names = [name for name, module in base.named_modules() if any(module is layer for layer in layers)]
    return {name.rpartition(".")[2]: list(token_ids) for name in names}


def excluded_layers(base: Any) -> list[str]:
    """Return the linear layers that `target = "all-linear"` leaves out, by full name.

    These are layers that return no tensor, such as a router that returns a tuple; layers that text
    never passes through; and layers that PEFT refuses in models of Mamba's kind.
    """
    outside = set(structure.modules_outside_text(base))
    return [
        name
        for name, module in base.named_modules()
        if structure.is_linear(module)
        and (name in outside or _returns_no_tensor(module) or _is_refused_by_peft(base, name))
    ]


def adapted_layers(student: Any) -> Counter[str]:
    """Count the layers with an adapter by the last part of their name."""
    return Counter(
        name.rpartition(".")[2] for name, module in student.named_modules() if isinstance(module, LoraLayer)
    )


def describe_adapted(student: Any) -> str:
    """Describe for the operator how many layers each target took."""
    layers = ", ".join(f"{name} {count}" for name, count in sorted(adapted_layers(student).items()))
    whole = sorted(
        name.rpartition(".")[2]
        for name, module in student.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
    )
    return f"LoRA on {layers}" + (f"; trained as a whole: {', '.join(whole)}" if whole else "")


def describe_left_out(student: Any) -> list[str]:
    """Describe which layers `all-linear` left out; empty if none."""
    excluded = student.peft_config["default"].exclude_modules
    if not excluded:
        return []
    kinds = Counter(name.rpartition(".")[2] for name in excluded)
    names = ", ".join(f"{name} {count}" for name, count in sorted(kinds.items()))
    return [f"LoRA leaves out layers that it can't adapt: {names}"]


def _returns_no_tensor(module: Any) -> bool:
    """Whether a subclass of Linear returns something else than the product, e.g. a router's tuple."""
    if not isinstance(module, torch.nn.Linear) or type(module).forward is torch.nn.Linear.forward:
        return False
    row = torch.zeros(1, module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    try:
        with torch.no_grad():
            return not isinstance(module(row), torch.Tensor)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return True


def _is_refused_by_peft(base: Any, name: str) -> bool:
    """Ask PEFT itself; its check is private and may be gone in another version."""
    check = getattr(tuners_utils, "_check_lora_target_modules_mamba", None)
    if check is None:
        return False
    try:
        check(LoraConfig(task_type="CAUSAL_LM"), base, name.rpartition(".")[2])
    except ValueError:
        return True
    return False


def _check_names(base: Any, target: str | Sequence[str]) -> None:
    """Refuse a target that matches no layer, and name the nearest that would."""
    if isinstance(target, str):
        return
    names = [name for name, module in base.named_modules() if structure.is_linear(module)]
    for wanted in target:
        if any(name == wanted or name.endswith(f".{wanted}") for name in names):
            continue
        known = sorted({name.rpartition(".")[2] for name in names})
        near = difflib.get_close_matches(wanted, known, n=1)
        raise StudentError(
            f"no layer is named {wanted!r}",
            place="lora.target",
            remedy=f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}",
        )


def _check_ties(base: Any, target: str | Sequence[str]) -> None:
    """Refuse to adapt one of two tied layers: a merge would lose the adapter or apply it twice."""
    if isinstance(target, str) or not getattr(base.config, "tie_word_embeddings", False):
        return
    tied = (base.get_input_embeddings(), base.get_output_embeddings())
    names = [name for name, module in base.named_modules() if any(module is each for each in tied)]
    odd = [t for t in target if any(name == t or name.endswith(f".{t}") for name in names)]
    if odd:
        remedy = 'target = "all-linear" leaves embeddings and output layer alone'
        raise _tied(odd[0], "lora.target", remedy)


def _tied(name: str, place: str, remedy: str) -> StudentError:
    message = f"{name} is tied: input and output share one weight in this base"
    return StudentError(message, place=place, remedy=remedy)


def _target_remedy(base: Any) -> str:
    known = sorted({n.rpartition(".")[2] for n, m in base.named_modules() if structure.is_linear(m)})
    return f'target = "all-linear", or some of: {", ".join(known)}'
