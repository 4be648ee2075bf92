"""Make data/skills/student and data/skills/student_bpe: bases that learn from the small neural teacher.

    python data/make_skill_students.py [FOLDER]

Both are Llama-shaped, two layers of width 96, a third of the teacher. The first has the teacher's tokenizer,
the second BPE with 512 tokens. They are pre-trained on the text of `base_text`, which answers no rule task,
and on prompts of the gold pool without answers. Seeded; a few minutes each on one CPU core.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Final

import torch
from harvester_data import base_text
from harvester_data.base_document import Document
from harvester_data.base_tokenizer import START
from harvester_data.letter_tokenizers import bpe_tokenizer, letter_tokenizer
from harvester_data.make_base import PHASES, SEED, make_model
from harvester_data.make_neural_teacher import THREADS, train_and_finish
from harvester_data.skill_rows import gold_rows
from transformers import PreTrainedTokenizerFast

STEPS: Final = 2_500
PROMPT_SHARE: Final = 0.1  # of the documents
BPE_DOCUMENTS: Final = 20_000  # what the second tokenizer is trained on


def unlabelled_documents() -> Iterator[Document]:
    """Return endless text: that of the base student, and prompts that nobody answers."""
    rng = random.Random(SEED)
    prompts, texts = gold_rows(), base_text.stream(SEED, PHASES)
    while True:
        if rng.random() < PROMPT_SHARE:
            yield Document(f"{START}user\n{next(prompts)['prompt']}")
        else:
            yield next(texts)


def make_student(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Pre-train a base from scratch, score it, and save it."""
    model = make_model(tokenizer, layers=2, width=96, intermediate_size=256)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
    train_and_finish(model, unlabelled_documents(), tokenizer, folder, STEPS)


def main() -> None:
    """Make both, those that are not there yet."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "skills"
    torch.set_num_threads(THREADS)
    texts = [document.text for document in islice(unlabelled_documents(), BPE_DOCUMENTS)]
    for name, tokenizer in (("student", letter_tokenizer()), ("student_bpe", bpe_tokenizer(texts))):
        if not (folder / name / "measured.json").exists():
            make_student(tokenizer, folder / name)


if __name__ == "__main__":
    main()
