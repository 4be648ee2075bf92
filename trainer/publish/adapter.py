"""Write the adapter folder: weights, tokenizer, documents, and the hash tree of the learned rows."""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trainer.config import TrainConfig
from trainer.data.chat_template import Renderer
from trainer.data.dataset import Rows
from trainer.errors import StoreFull
from trainer.files import fsync_tree
from trainer.model import weights
from trainer.provenance import fingerprint, model_card
from trainer.publish import serving


def write_adapter(student: Any, renderer: Renderer, config: TrainConfig, rows: Rows) -> Path:
    """Write `<out>/adapter`: PEFT's two files, tokenizer, card and lineage; replaced as a whole.

    Returns:
        the folder, which `peft.PeftModel.from_pretrained` loads untouched.

    Raises:
        StoreFull: it can't be written; the last checkpoint holds the same weights.
    """
    final = config.out_path / "adapter"
    aside = final.with_name(".adapter.tmp")
    try:
        shutil.rmtree(aside, ignore_errors=True)
        _fill(aside, student, renderer, config, rows)
        fsync_tree(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        fsync_tree(final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StoreFull(
            f"adapter not written: {error}",
            place=str(final),
            remedy="free some room; the same command writes it from the last checkpoint",
        ) from None
    return final


def _fill(aside: Path, student: Any, renderer: Renderer, config: TrainConfig, rows: Rows) -> None:
    student.peft_config["default"].base_model_name_or_path = str(config.base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        student.save_pretrained(str(aside), safe_serialization=True, save_embedding_layers=False)
    write_serving_files(aside, renderer, config)
    lineage = lineage_summary(rows)
    (aside / "lineage.json").write_text(json.dumps(lineage, indent=1) + "\n", encoding="utf-8")
    leaves = fingerprint.write_rows(
        aside, (fingerprint.leaf_of(s, rows.origins.get(s.key, "")) for s in rows.train)
    )
    model_card.write(aside, config, rows.lineages, card_facts(config, renderer, len(rows.train)))
    fingerprint.write_tree(aside, leaves, rows.lineages)


def write_serving_files(folder: Path, renderer: Renderer, config: TrainConfig) -> None:
    """Tokenizer, chat template and generation config, so that a server speaks as the student learned."""
    tokenizer = renderer.tokenizer
    original = tokenizer.chat_template
    try:
        tokenizer.chat_template, _ = serving.serving_template(config, renderer)
        tokenizer.save_pretrained(str(folder))
    finally:
        tokenizer.chat_template = original
    told = dict(weights.read_json(config.base / "generation_config.json"))
    told["eos_token_id"] = serving.eos_ids(told, renderer.chat_shape.stop_id)
    (folder / "generation_config.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def lineage_summary(rows: Rows) -> dict[str, Any]:
    """Who taught the rows that were learned, under which terms, and the corpus's own lineage."""
    taught = Counter((s.teacher_id, s.terms_id, s.mock) for s in rows.train)
    return {
        "teachers": [
            {"teacher": teacher, "terms": terms, "mock": mock, "rows": count}
            for (teacher, terms, mock), count in sorted(taught.items())
        ],
        "lineages": [dict(lineage.stored) for lineage in rows.lineages],
    }


def card_facts(config: TrainConfig, renderer: Renderer, rows: int) -> list[tuple[str, str]]:
    """How the student was made, as (name, words) for its card."""
    target = config.lora.target if isinstance(config.lora.target, str) else ", ".join(config.lora.target)
    return [
        ("adapter", f"LoRA, rank {config.lora.rank}, alpha {config.lora.alpha:g}, on {target}"),
        ("load with", "peft.PeftModel.from_pretrained(base, this folder)"),
        ("base SHA-256 (config and weights)", weights.base_sha256(config.base)),
        ("answers learned from", f"{rows:,}; each by its hash in {fingerprint.ROWS_FILE}"),
        ("seed, epochs, peak rate", f"{config.train.seed}, {config.train.epochs}, {config.train.lr:g}"),
        ("end of a turn", f"token {renderer.chat_shape.stop_id}"),
        ("chat template SHA-256", renderer.template_sha256),
    ]
