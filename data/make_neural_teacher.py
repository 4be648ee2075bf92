"""Make data/skills/mock-teacher: a small neural teacher, trained on gold rows of the rule tasks.

    python data/make_neural_teacher.py [FOLDER [STEPS]]

A Llama-shaped model. Seeded; the same machine and library versions give the same weights. It is scored on
`skill_rows.held_out_rows`, whose contents it has not seen. It may be interrupted: run again, it goes on.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Final

import torch
from harvester_data.base_document import Document
from harvester_data.float32_muon import Float32Muon
from harvester_data.letter_tokenizers import letter_tokenizer
from harvester_data.make_base import SEED, batches, make_model, prompt_ids, train
from harvester_data.skill_rows import Row, gold_rows, held_out_rows
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

# The terms record of the mock teacher applies to a model of this name.
NAME: Final = "mock-teacher"
STEPS: Final = 2_000
ANSWER_TOKENS: Final = 64
THREADS: Final = 1


def gold_documents() -> Iterator[Document]:
    """Return gold rows as chat turns."""
    for row in gold_rows():
        yield Document(row["prompt"], row["reference"])


def answer(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: list[str]) -> list[str]:
    """Answer prompts greedily. Prompts of one length are a batch, so nothing is padded."""
    by_length: dict[int, list[tuple[int, list[int]]]] = defaultdict(list)
    for at, prompt in enumerate(prompts):
        ids = prompt_ids(prompt, tokenizer)
        by_length[len(ids)].append((at, ids))
    answers = [""] * len(prompts)
    for width, pairs in by_length.items():
        ids = torch.tensor([row for _, row in pairs])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER_TOKENS, do_sample=False
        )
        for (at, _), row in zip(pairs, out[:, width:], strict=True):
            answers[at] = tokenizer.decode(row, skip_special_tokens=True)
    return answers


def score(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> dict[str, Any]:
    """Return the share of exact answers by split and task, and each split's mean over its tasks."""
    right: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    answers = answer(model.eval(), tokenizer, [row["prompt"] for row in rows])
    for row, text in zip(rows, answers, strict=True):
        right[row["split"]][row["task"]].append(text == row["reference"])
    shares: dict[str, Any] = {}
    for split, tasks in right.items():
        each = {task: round(sum(marks) / len(marks), 4) for task, marks in tasks.items()}
        shares[split] = {"macro": round(sum(each.values()) / len(each), 4), **each}
    return shares


def digest_of(rows: list[Row]) -> str:
    """Return the SHA-256 of rows as JSON lines."""
    return hashlib.sha256("".join(json.dumps(row) + "\n" for row in rows).encode()).hexdigest()


def train_and_finish(
    model: LlamaForCausalLM,
    documents: Iterator[Document],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    steps: int,
) -> None:
    """Train, round to bfloat16, score, and write weights, tokenizer and `measured.json`.

    An interrupted training goes on from `training.pt` in the folder.
    """
    state = folder / "training.pt"
    began = time.process_time()
    train(model, batches(documents, tokenizer), steps, Float32Muon, state)
    train_cpu_s = round(time.process_time() - began)
    # Scored as it is stored: rounded to bfloat16, computed in float32.
    model.to(torch.bfloat16).to(torch.float32)
    rows = held_out_rows()
    card = {
        "parameters": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "seed": SEED,
        "steps": steps,
        "train_cpu_s": train_cpu_s,
        "gold_first_1000_sha256": digest_of(list(islice(gold_rows(), 1000))),
        "test_sha256": digest_of(rows),
        "accuracy": score(model, tokenizer, rows),
    }
    print(json.dumps(card["accuracy"], indent=2))
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "measured.json").write_text(json.dumps(card, indent=2) + "\n")
    state.unlink(missing_ok=True)
    print(f"wrote {folder}")


def main() -> None:
    """Train from scratch, round to bfloat16, score, and save."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "skills" / NAME
    steps = int(sys.argv[2]) if len(sys.argv) > 2 else STEPS
    torch.set_num_threads(THREADS)
    tokenizer = letter_tokenizer()
    model = make_model(tokenizer, intermediate_size=344)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
    train_and_finish(model, gold_documents(), tokenizer, folder, steps)


if __name__ == "__main__":
    main()
