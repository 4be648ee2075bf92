"""Implement `trainer export`: merge the adapter into the base and write a plain transformers folder.

The merge is done in fp32 and checked by logits; the written file is checked bit for bit against the merged
weights after the cast; the error of the cast is measured and reported. The folder appears only if both
checks pass.
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError

from harvester.terms.lineage import Lineage
from trainer.config import TrainConfig
from trainer.data import published_template
from trainer.data.chat_template import Renderer
from trainer.errors import ConfigError, StoreFull, StudentError
from trainer.files import fsync_tree
from trainer.model import loading, model, self_test, weights
from trainer.provenance import fingerprint, model_card, terms_check
from trainer.publish import modelfile
from trainer.publish.adapter import card_facts, check_same_base, write_serving_files

PARITY_FILE = "parity.json"
MAX_LOGIT_DIFFERENCE = (
    1e-3  # of the largest logit: fp32 sums in another order differ by 1e-6 of it, a wrong fold by 1
)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def export_merged(config: TrainConfig, folder: Path, dtype: str = "") -> dict[str, Any]:
    """Fold the adapter into the base and write a folder that needs neither PEFT nor us.

    Args:
        dtype: of the written weights: float32, bfloat16, float16; the base's own where empty.

    Returns:
        parity on a probe. `max_logit_difference`, `mean_logit_difference`, `greedy_agreement`: base with
        adapter against the folder reloaded, so fold and cast together; `fold_difference`: the fold alone.

    Raises:
        TermsRefused: the terms of its teachers do not permit to export this student.
        FindingsError: the adapter or its lineage is not what was trained.
        StudentError: no adapter, or the written weights don't reproduce its logits; nothing is left behind.
        ConfigError: `folder` holds something else, or no such dtype.
        StoreFull: the folder can't be written.
    """
    adapter = config.out_path / "adapter"
    weights.check_adapter(adapter)
    stored = weights.read_json(adapter / "lineage.json").get("lineages", [])
    lineages = [Lineage(each) for each in stored]
    terms_check.require_permission(config, lineages, (), use="export")
    fingerprint.require_intact(adapter)
    check_same_base(config, adapter)
    self_test.check_architecture(config.base)
    kind = _dtype(config, dtype)
    _check_destination(folder)
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    aside = folder.with_name(f".{folder.name}.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        parity = _fold(config, adapter, aside, kind, renderer)
        _write_documents(config, adapter, aside, renderer, parity)
        fsync_tree(aside)
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except (OSError, SafetensorError) as error:
        raise StoreFull(f"merged student not written: {error}", place=str(folder)) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return parity


def _dtype(config: TrainConfig, wanted: str) -> torch.dtype:
    told = weights.read_json(config.base / "config.json")
    name = wanted or str(told.get("dtype") or told.get("torch_dtype") or "float32")
    if name not in DTYPES:
        if wanted:
            raise ConfigError(f"no such dtype {wanted!r}", place="--dtype", remedy=", ".join(DTYPES))
        name = "float32"
    return DTYPES[name]


def _check_destination(folder: Path) -> None:
    if (
        folder.exists()
        and not (folder / PARITY_FILE).is_file()
        and (not folder.is_dir() or any(folder.iterdir()))
    ):
        raise ConfigError("holds something else", place=str(folder), remedy="name a new folder")


def _fold(
    config: TrainConfig, adapter: Path, folder: Path, dtype: torch.dtype, renderer: Renderer
) -> dict[str, Any]:
    cpu = torch.device("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        student = PeftModel.from_pretrained(model.load_base(config.base, cpu), str(adapter)).eval()
    loading.check_adapter_tensors(student, adapter)
    size = min(len(renderer.tokenizer), 1 << 15)
    probe = torch.randint(size, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        learned = student(input_ids=probe).logits
        merged = student.merge_and_unload(safe_merge=True)
        fold = float((merged(input_ids=probe).logits - learned).abs().max())
        if not fold <= MAX_LOGIT_DIFFERENCE * max(1.0, float(learned.abs().max())):
            raise StudentError(
                f"folding the adapter changes the student: logits differ by {fold:.3g}",
                place=str(adapter),
                remedy="serve base and adapter apart; tied weights can't carry an adapter of their own",
            )
        wanted = {name: t.to(dtype) for name, t in merged.state_dict().items()}
        merged.to(dtype).save_pretrained(str(folder))
        again = model.load_base(folder, cpu)
        _check_weights(again.state_dict(), wanted, folder)
        said = again(input_ids=probe).logits
    difference = (said - learned).abs()
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "fold_difference": fold,
        "max_logit_difference": float(difference.max()),
        "mean_logit_difference": float(difference.mean()),
        "greedy_agreement": float((said.argmax(-1) == learned.argmax(-1)).float().mean()),
        "probe_tokens": probe.numel(),
    }


def _check_weights(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor], folder: Path) -> None:
    """Every tensor of the written folder is the folded one, bit for bit; tied ones are tied again."""
    for name, tensor in wanted.items():
        if name not in found or not torch.equal(found[name], tensor.to(found[name].dtype)):
            raise StudentError(
                f"the written weights are not the merged ones: {name}",
                place=str(folder),
                remedy="the base's files and config disagree (tied weights?); serve base and adapter apart",
            )


def _write_documents(
    config: TrainConfig, adapter: Path, folder: Path, renderer: Renderer, parity: dict[str, Any]
) -> None:
    write_serving_files(folder, renderer, config)
    stop = str(renderer.tokenizer.convert_ids_to_tokens(renderer.chat_shape.stop_id))
    turns = modelfile.infer_turn_template(
        renderer, thinks=published_template.keeps_reasoning(config, renderer)
    )
    text = turns.modelfile(stop) if turns else None
    if text is not None:
        (folder / "Modelfile").write_text(text, encoding="utf-8")
    (folder / PARITY_FILE).write_text(json.dumps(parity, indent=1) + "\n", encoding="utf-8")
    tree, leaves = fingerprint.read(adapter)
    shutil.copyfile(adapter / "lineage.json", folder / "lineage.json")
    fingerprint.write_rows(folder, leaves)
    said = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in parity.items())
    faults = weights.read_json(adapter / "lineage.json").get("forced_faults", [])
    facts = [fact for fact in card_facts(config, renderer, len(leaves), faults) if fact[0] != "load with"]
    lineages = [Lineage(each) for each in tree["lineages"]]
    model_card.write(folder, config, lineages, [*facts, ("merged", said)], merged=True)
    fingerprint.write_tree(folder, leaves, lineages)
