"""Write the adapter folder: PEFT's files, the tokenizer, the documents and the hash tree of the rows."""

from __future__ import annotations

import json
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from harvester.system import disk_refusal
from harvester.system.files import fsync_tree
from trainer.config import TrainConfig, TrainSection
from trainer.data import published_template
from trainer.data.chat_template import Renderer
from trainer.errors import HarvesterError, StudentError
from trainer.model import weights
from trainer.provenance import fingerprint, model_card
from trainer.provenance.fingerprint import LearnedRows
from trainer.publish import adapted_weights, merge, serving

# What a card says of an adapter that was trained on a base in 4 bits.
_QUANTISED = (
    "linear layers of the decoder in 4 bits (NF4, QLoRA), computed from the files that the SHA-256 covers; "
    "the adapter corrects these rounded weights, so over the unrounded base it is another student"
)

# Rows that `rehearse` writes.
REHEARSED_ROWS = 1000


def write_adapter(  # noqa: PLR0913 - the student, and what its documents say
    student: Any,
    renderer: Renderer,
    config: TrainConfig,
    rows: LearnedRows,
    faults: Sequence[str] = (),
    soft: str = "",
    *,
    on_policy: str = "",
) -> Path:
    """Write `<out>/adapter` under a temporary name and rename it; an earlier adapter is replaced as a whole.

    With `[train] method = "full"` it is `<out>/model`: files, names and dtypes are those of the base.

    Args:
        faults: fatal faults of the data that the operator chose to learn; the card names them.
        soft: how much of the teacher's log-probabilities was learned; empty: none was to be.
        on_policy: how the student learned from scores of its own answers; empty: it did not.

    Returns:
        The folder. `peft.PeftModel.from_pretrained`, or transformers, loads it as it is.

    Raises:
        StoreFull, StoreError: the folder can't be written; the last checkpoint holds the same weights.
    """
    final = config.student_path
    aside = final.with_name(f".{final.name}.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        _fill(aside, student, renderer, config, rows, faults, soft, on_policy)
        fsync_tree(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        fsync_tree(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise disk_refusal.refused(
            error,
            "the adapter can't be written",
            final,
            "",
            afterwards="the same command writes it from the last checkpoint",
        ) from None
    return final


def is_written(student: Any, config: TrainConfig) -> bool:
    """Return whether the folder of the adapter, or of the model, is intact and holds a student's weights."""
    folder = config.student_path
    try:
        weights.check_trained(folder, full=config.is_full)
        fingerprint.require_intact(folder)
        if config.is_full:
            return all(
                torch.equal(tensor, written) for tensor, written in _trained_and_written(student, config)
            )
        stored = load_file(folder / "adapter_model.safetensors")
    except (HarvesterError, OSError, SafetensorError, LookupError):
        return False
    held = get_peft_model_state_dict(student, save_embedding_layers=False)
    return held.keys() == stored.keys() and all(
        torch.equal(stored[name], tensor.detach().cpu()) for name, tensor in held.items()
    )


def _trained_and_written(student: Any, config: TrainConfig) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield each tensor of a student all of whose weights are trained, and what its folder holds."""
    tensors = adapted_weights.stored_tensors(config.student_path)
    for group in _trained_groups(student, config):
        for name, merged in group.merged().items():
            with safe_open(str(tensors[name].file), framework="pt") as opened:
                written = opened.get_tensor(name)
            yield merged.cpu().to(written.dtype), written


def check_same_base(config: TrainConfig, adapter: Path) -> None:
    """Refuse a base that is not the one the adapter was trained on.

    Raises:
        StudentError: the base differs from the adapter's record or from `[student] sha256`, or the adapter
            has no record.
    """
    weights.check_base(config.base, config.student.sha256)
    recorded = recorded_base_sha256(adapter)
    actual = weights.base_sha256(config.base)
    if not recorded:
        raise StudentError(
            "the adapter does not record which base it was trained on",
            place=str(adapter),
            remedy="train it again",
        )
    if recorded != actual:
        raise StudentError(
            f"the adapter was trained on a base with the SHA-256 {recorded}, this base has {actual}",
            place=str(config.base),
            remedy="set [student] base to the folder that the adapter was trained on, or train it again",
        )
    quantised = weights.read_json(adapter / "lineage.json").get("base_quantised", "none")
    if quantised != config.student.quantise:
        raise StudentError(
            f"the adapter was trained on a base with quantise = {quantised!r}, train.toml has "
            f"{config.student.quantise!r}",
            place="student.quantise",
            remedy=f'set [student] quantise = "{quantised}" in train.toml',
        )


def check_same_tokens(config: TrainConfig, renderer: Renderer, adapter: Path) -> None:
    """Refuse a tokenizer or chat template that is not the one the adapter was trained with.

    Adapters of earlier versions record neither.

    Raises:
        StudentError: names both hashes.
    """
    recorded = weights.read_json(adapter / "lineage.json")
    for name, what, actual in (
        ("tokenizer_sha256", "tokenizer files", weights.tokenizer_sha256(config.base)),
        ("template_sha256", "chat template", renderer.template_sha256),
    ):
        if recorded.get(name, actual) != actual:
            raise StudentError(
                f"the adapter was trained with {what} of the SHA-256 {recorded[name]}, now it is {actual}",
                place=str(config.base),
                remedy="set back the base's tokenizer and [student] template, or train it again",
            )


def recorded_base_sha256(adapter: Path) -> str:
    """Return the SHA-256 of the base that an adapter was trained on, empty if it records none.

    It is in lineage.json; adapters written before it was have it in their bill of materials only.
    """
    recorded = weights.read_json(adapter / "lineage.json").get("base_sha256")
    if isinstance(recorded, str):
        return recorded
    components = weights.read_json(adapter / model_card.BOM).get("components", [])
    base = next((c for c in components if isinstance(c, dict) and c.get("bom-ref") == "base"), {})
    return str(next((entry["content"] for entry in base.get("hashes", [])), ""))


def _fill(  # noqa: PLR0913 - as `write_adapter`
    aside: Path,
    student: Any,
    renderer: Renderer,
    config: TrainConfig,
    rows: LearnedRows,
    faults: Sequence[str],
    soft: str,
    on_policy: str,
) -> None:
    if config.is_full:
        tensors = adapted_weights.stored_tensors(config.base)
        dtype = adapted_weights.stored_dtype(tensors)
        merge.write_merged(config.base, aside, _trained_groups(student, config), dtype)
        _write_companions(aside, renderer, config, rows, faults, soft, on_policy)
        return
    student.peft_config["default"].base_model_name_or_path = str(config.base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        student.save_pretrained(str(aside), safe_serialization=True, save_embedding_layers=False)
    _write_companions(aside, renderer, config, rows, faults, soft, on_policy)


def require_storable(student: Any, config: TrainConfig) -> None:
    """Refuse a student all of whose weights are trained, if the base's files can't hold them.

    `train` asks before its first step: what would fail at the end must fail at the start.

    Raises:
        StudentError: it can't be told which tensors of the base's files hold a weight.
    """
    if config.is_full:
        _trained_groups(student, config)


def _trained_groups(student: Any, config: TrainConfig) -> list[adapted_weights.AdaptedGroup]:
    tensors = adapted_weights.stored_tensors(config.base)
    names = [name for name, parameter in student.named_parameters() if parameter.requires_grad]
    return adapted_weights.adapted_groups(student, tensors, names)


def _write_companions(  # noqa: PLR0913 - as `write_adapter`
    folder: Path,
    renderer: Renderer,
    config: TrainConfig,
    rows: LearnedRows,
    faults: Sequence[str],
    soft: str = "",
    on_policy: str = "",
) -> None:
    """Write all files of an adapter's folder but the weights and PEFT's configuration."""
    write_serving_files(folder, renderer, config)
    lineage = {
        **lineage_summary(rows),
        **({"method": config.train.method} if config.is_full else {}),
        "base_sha256": weights.content_sha256(config.base),
        "tokenizer_sha256": weights.tokenizer_sha256(config.base),
        "template_sha256": renderer.template_sha256,
        "forced_faults": list(faults),
        **({"base_quantised": config.student.quantise} if config.student.quantise != "none" else {}),
        **({"soft_targets": soft} if soft else {}),
        **({"on_policy": on_policy} if on_policy else {}),
    }
    (folder / "lineage.json").write_text(json.dumps(lineage, indent=1) + "\n", encoding="utf-8")
    tree = fingerprint.write_rows(folder, rows.leaves())
    facts = card_facts(config, renderer, rows.learned, faults, soft)
    if on_policy:
        facts.append(("on-policy distillation", on_policy))
    model_card.write(folder, config, rows.lineages, facts, merged=config.is_full)
    fingerprint.write_tree(folder, tree, rows.lineages)


def write_serving_files(folder: Path, renderer: Renderer, config: TrainConfig) -> None:
    """Write tokenizer, chat template and generation config, so that a server builds the learned prompts."""
    tokenizer = renderer.tokenizer
    original = tokenizer.chat_template
    try:
        tokenizer.chat_template, _ = published_template.serving_template(config, renderer)
        tokenizer.save_pretrained(str(folder))
    finally:
        tokenizer.chat_template = original
    _record_bos(folder / "tokenizer_config.json", renderer)
    generation = dict(weights.read_json(config.base / "generation_config.json"))
    generation["eos_token_id"] = serving.eos_ids(generation, renderer.chat_shape.stop_id)
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=1) + "\n", encoding="utf-8")


def _record_bos(path: Path, renderer: Renderer) -> None:
    """Write `add_bos_token` into tokenizer_config.json: GGUF converters read there whether to add BOS.

    It is true only if the learned prompts begin with the BOS that the tokenizer adds by itself; otherwise the
    chat template's own text has all that a prompt needs.
    """
    settings = dict(weights.read_json(path))
    prompt = renderer.prompt_text([{"role": "user", "content": "hi"}])
    settings["add_bos_token"] = renderer.adds_bos and prompt.startswith(str(renderer.tokenizer.bos_token))
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def rehearse(renderer: Renderer, config: TrainConfig, rows: LearnedRows, faults: Sequence[str] = ()) -> None:
    """Write all that accompanies an adapter's weights to a temporary folder: tokenizer, documents, hash tree.

    `train` does this before its first step: what would fail at the end must fail at the start.

    Raises:
        StudentError: a file can't be written, such as a tokenizer that can't be saved.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            _write_companions(Path(folder), renderer, config, rows.first(REHEARSED_ROWS), faults)
    except HarvesterError:
        raise
    except Exception as error:  # noqa: BLE001 - tokenizers raise their own kinds
        raise StudentError(
            f"the adapter could not be written after the training: {type(error).__name__}: {error}",
            place=str(config.base),
            remedy="repair the base's tokenizer files, or free space for temporary files",
        ) from None


def lineage_summary(rows: LearnedRows) -> dict[str, Any]:
    """Return the content of lineage.json: rows per teacher and terms record, and the corpus's lineages."""
    return {
        "teachers": [
            {"teacher": teacher, "terms": terms, "mock": mock, "rows": count}
            for (teacher, terms, mock), count in sorted(rows.teachers().items())
        ],
        "lineages": [dict(lineage.stored) for lineage in rows.lineages],
    }


def card_facts(
    config: TrainConfig, renderer: Renderer, rows: int, faults: Sequence[str] = (), soft: str = ""
) -> list[tuple[str, str]]:
    """Describe how the student was made, as rows (name, text) of its card.

    Args:
        rows: answers that were learned.
        faults: fatal faults of the data that were learned with `--force-faults`.
        soft: how much of the teacher's log-probabilities was learned.
    """
    return [
        *_method_facts(config),
        ("base SHA-256 (config and weights)", weights.content_sha256(config.base)),
        *([("base during the training", _QUANTISED)] if config.student.quantise != "none" else []),
        ("answers learned", f"{rows:,}; their hashes are in {fingerprint.ROWS_FILE}"),
        _passes(config.train),
        ("end of a turn", f"token {renderer.chat_shape.stop_id}"),
        ("chat template SHA-256", renderer.template_sha256),
        *([("soft targets", soft)] if soft else []),
        *(("fault in the data, learned with --force-faults", fault) for fault in faults),
    ]


def _method_facts(config: TrainConfig) -> list[tuple[str, str]]:
    lora = config.lora
    if config.is_full:
        return [
            ("method", "full fine-tuning: all weights were trained, in fp32"),
            ("load with", "transformers.AutoModelForCausalLM.from_pretrained(this folder)"),
        ]
    target = lora.target if isinstance(lora.target, str) else ", ".join(lora.target)
    return [
        ("adapter", f"LoRA, rank {lora.rank}, alpha {lora.alpha:g}, on {target}"),
        *([("trained as a whole", ", ".join(lora.modules_to_save))] if lora.modules_to_save else []),
        ("load with", "peft.PeftModel.from_pretrained(base, this folder)"),
    ]


def _passes(train: TrainSection) -> tuple[str, str]:
    """Return the row of a card with seed, length and learning rate of the training."""
    if train.max_steps is None:
        return "seed, epochs, peak learning rate", f"{train.seed}, {train.epochs}, {train.lr:g}"
    most = f"{train.epochs:,} at most, {train.max_steps:,} at most"
    return "seed, epochs, steps, peak learning rate", f"{train.seed}, {most}, {train.lr:g}"
