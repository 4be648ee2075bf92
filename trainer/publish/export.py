"""Implement `trainer export`: merge the adapter into the base and write a plain transformers folder.

The merge is done in fp32 and checked by logits; each written tensor is read back and compared with the merged
weight after the cast; the error of the cast is measured and reported. The folder appears only if all checks
pass.
"""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from harvester.system import disk_refusal
from harvester.system.files import fsync_tree
from harvester.terms.lineage import Lineage
from trainer.config import TrainConfig
from trainer.data import published_template
from trainer.data.chat_template import Renderer
from trainer.errors import ConfigError, FindingsError, StudentError
from trainer.model import four_bit, model, self_test, weights
from trainer.provenance import fingerprint, model_card, terms_check
from trainer.publish import adapted_weights, gguf_files, merge, modelfile, server_checks
from trainer.publish.adapter import card_facts, check_same_base, check_same_tokens, write_serving_files

PARITY_FILE = "parity.json"
EXPORT_FILE = "export.json"
# Largest difference as a share of the largest logit: fp32 sums in another order make 1e-6, a wrong merge 1.
MAX_LOGIT_DIFFERENCE = 1e-3
# The same if a 16-bit base is written in another dtype: constants of the classes are rounded otherwise.
MAX_CAST_DIFFERENCE = 0.1
_CPU = torch.device("cpu")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_merged(
    config: TrainConfig, folder: Path, dtype: str = "", gguf: Sequence[str] = ()
) -> dict[str, Any]:
    """Merge the adapter into the base and write a folder that needs neither PEFT nor this program.

    `EXPORT_FILE` in the folder says which servers can serve it, and what its GGUF files hold.

    Args:
        dtype: of the written weights: float32, bfloat16, float16; empty: the base's own.
        gguf: types of the GGUF files to write: `gguf_files.KINDS`.

    Returns:
        Parity on random token ids. `max_logit_difference`, `mean_logit_difference`, `greedy_agreement`
        compare base and adapter with the written folder, so they show merge and cast together;
        `fold_difference` is the largest difference of the merge alone, in fp32.

    Raises:
        TermsRefused: the terms of its teachers do not permit to export this student.
        FindingsError: the adapter or its lineage was changed after the training.
        StudentError: no adapter, another base, or the written weights don't reproduce the adapter's logits;
            nothing is left behind.
        ConfigError: `folder` holds something else, there is no such dtype or GGUF type, or a package that
            writes GGUF is not installed.
        StoreFull, StoreError: the folder can't be written.
    """
    adapter = config.student_path
    weights.check_trained(adapter, full=config.is_full)
    stored = weights.read_json(adapter / "lineage.json").get("lineages", [])
    if not isinstance(stored, list) or not all(isinstance(each, dict) for each in stored):
        raise FindingsError(
            "lineage.json was changed after the training",
            place=str(adapter),
            remedy=fingerprint.CHANGED_REMEDY,
        )
    lineages = [Lineage(each) for each in stored]
    terms_check.require_permission(config, lineages, (), use="export")
    fingerprint.require_intact(adapter)
    check_same_base(config, adapter)
    self_test.check_architecture(config.base)
    _check_dtype(dtype)
    _check_destination(folder)
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    check_same_tokens(config, renderer, adapter)
    gguf_files.check_kinds(gguf, config, renderer)
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        parity = _merge(config, adapter, temporary, dtype, _probe(config, renderer))
        _write_documents(config, adapter, temporary, renderer, parity, gguf)
        fsync_tree(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        temporary.rename(folder)
    except (OSError, SafetensorError) as error:
        raise disk_refusal.refused(
            error,
            "the merged student can't be written",
            folder,
            "name another folder",
            afterwards="then run the same command again",
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return parity


def _check_dtype(wanted: str) -> None:
    if wanted and wanted not in DTYPES:
        raise ConfigError(
            f"no such dtype {wanted!r}", place="--dtype", remedy=f"give --dtype one of {', '.join(DTYPES)}"
        )


def _dtype(config: TrainConfig, wanted: str, stored: torch.dtype) -> torch.dtype:
    """Return the dtype to write: the wanted one, else that of the base's config, else that of its files."""
    base = weights.read_json(config.base / "config.json")
    return DTYPES.get(wanted or str(base.get("dtype") or base.get("torch_dtype") or ""), stored)


def _check_destination(folder: Path) -> None:
    if (
        folder.exists()
        and not (folder / PARITY_FILE).is_file()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise ConfigError("the folder holds something else", place=str(folder), remedy="name a new folder")


def _merge(
    config: TrainConfig, adapter: Path, folder: Path, dtype: str, probe: torch.Tensor
) -> dict[str, Any]:
    """Merge the adapter into the base, write the weights, and compare the logits before and after.

    Returns:
        The parity, as `export_merged` returns it.
    """
    tensors = adapted_weights.stored_tensors(config.base)
    stored = adapted_weights.stored_dtype(tensors)
    kind = _dtype(config, dtype, stored)
    if config.is_full:
        tensors = adapted_weights.stored_tensors(adapter)
        student, rounded = model.load_base(adapter, _CPU, dtype=stored), []
    else:
        base = model.load_base(config.base, _CPU, dtype=stored)
        rounded = four_bit.round_weights(base) if config.student.quantise != "none" else []
        student = model.load_trained_student(config, adapter, _CPU, base=base)
        del base
    learned = _logits(student, probe)
    if not torch.isfinite(learned).all():
        raise StudentError(
            "the trained student's logits are not finite",
            place=str(adapter),
            remedy="train it again, with a lower [train] lr",
        )
    groups = [] if config.is_full else adapted_weights.adapted_groups(student, tensors, rounded)
    fold = _check_merge(_logits(student, probe, merged=True), learned, adapter)
    expected = _logits(student, probe, merged=True, cast=kind)
    merge.write_merged(adapter if config.is_full else config.base, folder, groups, kind)
    groups = [group.without_weights() for group in groups]
    del student
    gc.collect()  # modules and hooks refer to each other
    # In fp32 wherever the base is, so that what the classes compute when they are built is rounded alike.
    loaded_as = stored if stored is torch.float32 else kind
    reloaded = model.load_base(folder, _CPU, dtype=loaded_as)
    merge.check_loaded(reloaded, folder, groups)
    written = _logits(reloaded, probe)
    _check_merge(
        written, expected, folder, MAX_LOGIT_DIFFERENCE if loaded_as == stored else MAX_CAST_DIFFERENCE
    )
    difference = (written - learned).abs()
    return {
        "dtype": str(kind).removeprefix("torch."),
        "fold_difference": fold,
        "max_logit_difference": float(difference.max()),
        "mean_logit_difference": float(difference.mean()),
        "greedy_agreement": float((written.argmax(-1) == learned.argmax(-1)).float().mean()),
        "probe_tokens": probe.numel(),
    }


def _logits(
    answering: Any, probe: torch.Tensor, *, merged: bool = False, cast: torch.dtype | None = None
) -> torch.Tensor:
    """Compute the logits of the probe in fp32.

    Args:
        merged: merge the adapter layer by layer, instead of adding its output to that of the base.
        cast: round the weights to this dtype first.
    """
    with torch.no_grad(), merge.float32_forward(answering, merge=merged, cast=cast):
        logits: torch.Tensor = answering(input_ids=probe, use_cache=False).logits
    return logits.float()


def _check_merge(
    merged: torch.Tensor, expected: torch.Tensor, folder: Path, share: float = MAX_LOGIT_DIFFERENCE
) -> float:
    """Return the largest difference between logits of merged weights and those expected.

    Args:
        share: largest difference as a share of the largest logit.

    Raises:
        StudentError: the difference is larger than rounding can make it.
    """
    difference = float((merged - expected).abs().max())
    if not difference <= share * max(1.0, float(expected.abs().max())):
        raise StudentError(
            f"merging the adapter changes the student: logits differ by {difference:.3g}",
            place=str(folder),
            remedy="serve base and adapter apart; tied weights can't carry an adapter of their own",
        )
    return difference


def _probe(config: TrainConfig, renderer: Renderer) -> torch.Tensor:
    """Return random token ids [4, 64] that both the tokenizer and the embedding of the base know."""
    size = min(len(renderer.tokenizer), 1 << 15, weights.vocabulary_size(config.base) or 1 << 15)
    return torch.randint(size, (4, 64), generator=torch.Generator().manual_seed(0))


def _write_documents(
    config: TrainConfig,
    adapter: Path,
    folder: Path,
    renderer: Renderer,
    parity: dict[str, Any],
    gguf: Sequence[str],
) -> None:
    """Write all files of the folder but the weights; the hash tree, which covers the others, at the end."""
    write_serving_files(folder, renderer, config)
    (folder / PARITY_FILE).write_text(json.dumps(parity, indent=1) + "\n", encoding="utf-8")
    tree, leaves = fingerprint.read(adapter)
    shutil.copyfile(adapter / "lineage.json", folder / "lineage.json")
    learned = fingerprint.write_rows(folder, leaves)
    figures = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in parity.items())
    lineage = weights.read_json(adapter / "lineage.json")
    of_adapter = card_facts(
        config, renderer, len(leaves), lineage.get("forced_faults", []), lineage.get("soft_targets", "")
    )
    facts = [fact for fact in of_adapter if fact[0] != "load with"]
    lineages = [Lineage(each) for each in tree["lineages"]]
    model_card.write(folder, config, lineages, [*facts, ("merged", figures)], merged=True)
    files, notes = gguf_files.write(gguf, config, renderer, folder, lineages) if gguf else ([], [])
    _write_modelfiles(config, folder, renderer, [each for each in files if each["kind"] != "adapter"])
    checks = server_checks.check_servers(config, renderer, adapter, folder)
    facts_of_export = {"checks": [asdict(check) for check in checks], "gguf": files, "notes": notes}
    (folder / EXPORT_FILE).write_text(json.dumps(facts_of_export, indent=1) + "\n", encoding="utf-8")
    fingerprint.write_tree(folder, learned, lineages)


def _write_modelfiles(
    config: TrainConfig, folder: Path, renderer: Renderer, gguf: Sequence[Mapping[str, Any]]
) -> None:
    """Write Ollama's Modelfile for the folder, and one for each GGUF file: Modelfile.q8_0 and so on."""
    stop = str(renderer.tokenizer.convert_ids_to_tokens(renderer.chat_shape.stop_id))
    turns = modelfile.infer_turn_template(
        renderer, thinks=published_template.keeps_reasoning(config, renderer)
    )
    parameters = modelfile.ollama_parameters(
        weights.read_json(folder / "generation_config.json"),
        context=weights.context_length(config.base),
        longest=config.train.max_length,
    )
    sources = {"Modelfile": ".", **{f"Modelfile.{each['kind']}": f"./{each['file']}" for each in gguf}}
    for name, source in sources.items():
        text = turns.modelfile(stop, source=source, parameters=parameters) if turns else None
        if text is not None:
            (folder / name).write_text(text, encoding="utf-8")
