"""The adapter as others load it, with a card that names base, teachers and terms."""

from __future__ import annotations

import json
import shutil
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from trainer import serving, trace, weights
from trainer.checkpoint import settle
from trainer.config import TrainConfig
from trainer.dataset import Rows
from trainer.errors import StoreFull
from trainer.render import Renderer

CARD = """\
---
base_model: {base}
library_name: peft
pipeline_tag: text-generation
tags: [lora, distillation]
---
# A student of {teachers}

LoRA adapter, rank {rank}, alpha {alpha:g}, on {target}. Load it with
`peft.PeftModel.from_pretrained(base_model, "this folder")`.

| | |
|---|---|
| base | `{base}` |
| base SHA-256 (config and weights) | `{base_sha256}` |
| training answers | {rows:,} |
| seed, epochs, peak rate | {seed}, {epochs}, {lr:g} |
| end of a turn | token {stop_id} |
| chat template SHA-256 | `{template}` |

## Who taught
{lineage}
"""


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
        settle(aside)
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        settle(final)
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
    write_speech(aside, renderer, config)
    lineage = lineage_of(rows)
    (aside / "lineage.json").write_text(json.dumps(lineage, indent=1) + "\n", encoding="utf-8")
    (aside / "README.md").write_text(_card(config, rows, renderer, lineage), encoding="utf-8")
    trace.write(aside, (trace.leaf_of(sample) for sample in rows.train), rows.lineages)


def write_speech(folder: Path, renderer: Renderer, config: TrainConfig) -> None:
    """Tokenizer, chat template and generation config, so that a server speaks as the student learned."""
    tokenizer = renderer.tokenizer
    original = tokenizer.chat_template
    try:
        tokenizer.chat_template, _ = serving.speech(config, renderer)
        tokenizer.save_pretrained(str(folder))
    finally:
        tokenizer.chat_template = original
    told = dict(weights.read_json(config.base / "generation_config.json"))
    told["eos_token_id"] = serving.eos_ids(told, renderer.shape.stop_id)
    (folder / "generation_config.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def lineage_of(rows: Rows) -> dict[str, Any]:
    """Who taught the rows that were learned, under which terms, and the corpus's own lineage."""
    taught = Counter((s.teacher_id, s.terms_id, s.mock) for s in rows.train)
    return {
        "teachers": [
            {"teacher": teacher, "terms": terms, "mock": mock, "rows": count}
            for (teacher, terms, mock), count in sorted(taught.items())
        ],
        "lineages": [dict(each) for each in rows.lineages],
    }


def _card(config: TrainConfig, rows: Rows, renderer: Renderer, lineage: Mapping[str, Any]) -> str:
    teachers: Sequence[Mapping[str, Any]] = lineage["teachers"]
    lines = [
        f"- `{t['teacher'] or 'unknown'}`, terms record `{t['terms'] or 'none'}`, {t['rows']:,} answers"
        + (" (the mock teacher: of no use outside tests)" if t["mock"] else "")
        for t in teachers
    ]
    duties = sorted({str(duty) for each in rows.lineages for duty in each.get("duties") or ()})
    lines += [f"- duty: {duty}" for duty in duties]
    return CARD.format(
        base=config.base,
        teachers=", ".join(sorted({str(t["teacher"]) for t in teachers})) or "an unknown teacher",
        rank=config.lora.rank,
        alpha=config.lora.alpha,
        target=config.lora.target if isinstance(config.lora.target, str) else ", ".join(config.lora.target),
        base_sha256=weights.base_sha256(config.base),
        rows=len(rows.train),
        seed=config.train.seed,
        epochs=config.train.epochs,
        lr=config.train.lr,
        stop_id=renderer.shape.stop_id,
        template=renderer.template_sha256,
        lineage="\n".join(lines),
    )
