"""Make data/base: the tiny student that the demo fine-tunes.

    python data/make_base.py [FOLDER]

A Llama-shaped model with its tokenizer, pre-trained for about ten minutes on one CPU core on the text of
`base_text`. Seeded; the same machine and library versions give the same weights.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

import torch
from harvester_data import base_facts as facts
from harvester_data import base_text as text
from harvester_data.base_document import NAMES, WORDS, Document, Maker
from harvester_data.base_tokenizer import END, make_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SEED: Final = 1
STEPS: Final = 4_000
STEP_TOKENS: Final = 1_536
SAVE_STEPS: Final = 100
POOL: Final = 1_500  # documents sorted by length at a time, so that a step pads little
RATE: Final = 3e-3  # AdamW: embedding and norms
MUON_RATE: Final = 0.008  # Muon: every other matrix
# A user's turn as the chat template renders it; rendering 100,000 of them with the template takes a minute.
PROMPT: Final = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
PROMPT_WEIGHT: Final = 0.05  # the user's turn of a chat document is noise mostly

# Copying has to be learned before anything that builds on it, else nothing is.
COPYING: Final[Mapping[Maker, float]] = {
    text.say: 6,
    text.small: 3,
    facts.repeated: 2,
    text.mirror: 2,
    facts.recalled: 1,
    facts.neighbours: 1,
}
SKILLS: Final[Mapping[Maker, float]] = {
    text.both: 6,
    text.hop: 5,
    text.mirror: 4,
    text.rank: 4,
    text.tally: 6,
    text.say: 2,
    text.say_among: 2,
    text.small: 2,
    text.short: 2,
    text.pick: 2,
    facts.letter_facts: 2,
    facts.digit_facts: 2,
    facts.queries: 1.5,
    facts.rising: 1,
    facts.compared: 1,
    facts.capitals: 1,
    facts.neighbours: 1,
    facts.months: 1,
    facts.days: 1,
    facts.alphabet: 0.7,
    facts.sentence: 0.7,
    facts.numbers: 0.5,
    facts.repeated: 0.3,
    facts.recalled: 0.3,
    facts.signs: 0.3,
}
PHASES: Final = ((20_000, COPYING), (0, SKILLS))

BFLOAT16_MUON: Final = partial(torch.optim.Muon, adjust_lr_fn="original")

Weighed = tuple[list[int], list[float]]


def make_model(
    tokenizer: PreTrainedTokenizerFast, *, layers: int = 4, width: int = 128, intermediate_size: int = 256
) -> LlamaForCausalLM:
    """Return an untrained Llama-shaped model, fp32, with tied embeddings and four heads."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def prompt_ids(text: str, tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Return the token ids of a chat in which a user has said `text`."""
    turn = [{"role": "user", "content": text}]
    ids: list[int] = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
    return ids


def weigh(documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast) -> list[Weighed]:
    """Return the token ids of each document, and how much the loss of each token counts."""
    first = [
        document.text + END if document.reply is None else PROMPT.format(document.text)
        for document in documents
    ]
    replies = ["" if document.reply is None else document.reply + END for document in documents]
    rows: list[Weighed] = []
    pairs = zip(tokenizer(first)["input_ids"], tokenizer(replies)["input_ids"], strict=True)
    for document, (ids, reply) in zip(documents, pairs, strict=True):
        weight = 1.0 if document.reply is None else PROMPT_WEIGHT
        rows.append((ids + reply, [weight] * len(ids) + [1.0] * len(reply)))
    return rows


def batches(documents: Iterator[Document], tokenizer: PreTrainedTokenizerFast) -> Iterator[list[Weighed]]:
    """Group endless documents by length, about `STEP_TOKENS` tokens a group."""
    rng = random.Random(SEED)
    while True:
        pool = sorted(weigh(list(islice(documents, POOL)), tokenizer), key=lambda pair: len(pair[0]))
        rows: list[list[Weighed]] = [[]]
        for pair in pool:
            if (len(rows[-1]) + 1) * len(pair[0]) > STEP_TOKENS:
                rows.append([])
            rows[-1].append(pair)
        rng.shuffle(rows)
        yield from rows


def loss_of(model: LlamaForCausalLM, rows: list[Weighed]) -> torch.Tensor:
    """Weighted mean cross-entropy, nats per token."""
    width = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    weights = torch.zeros(len(rows), width)
    for at, (row, weight) in enumerate(rows):
        ids[at, : len(row)] = torch.tensor(row)
        weights[at, : len(row)] = torch.tensor(weight)
    logits = model(input_ids=ids).logits[:, :-1]
    each = torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return (each * weights[:, 1:]).sum() / weights[:, 1:].sum()


def train(
    model: LlamaForCausalLM,
    groups: Iterator[list[Weighed]],
    steps: int,
    muon: Callable[..., torch.optim.Optimizer] = BFLOAT16_MUON,
    state: Path | None = None,
) -> None:
    """Train on `steps` groups: 50 steps of warm-up, a fifth at the full rate, then linearly down to 2 %.

    With `state`, everything is written to that file every `SAVE_STEPS`, and a later call goes on from there
    to the same weights.
    """
    named = list(model.named_parameters())
    matrices = [weight for name, weight in named if weight.ndim == 2 and "embed" not in name]
    others = [weight for name, weight in named if weight.ndim != 2 or "embed" in name]
    optimisers = (
        torch.optim.AdamW(others, lr=RATE, betas=(0.9, 0.98), weight_decay=0.01),
        muon(matrices, lr=MUON_RATE, momentum=0.95, weight_decay=0.01),
    )
    first = 0 if state is None else _restore(state, model, optimisers)
    began, total = time.monotonic(), 0.0
    for step, rows in enumerate(islice(groups, steps)):
        if step < first:
            continue
        share = min(1.0, (step + 1) / 50) * (0.02 + 0.98 * min(1.0, (1 - step / steps) * 1.25))
        for optimiser, rate in zip(optimisers, (RATE, MUON_RATE), strict=True):
            for group in optimiser.param_groups:
                group["lr"] = rate * share
        loss = loss_of(model, rows)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimiser in optimisers:
            optimiser.step()
            optimiser.zero_grad()
        total += loss.item()
        if (step + 1) % SAVE_STEPS == 0:
            seconds = time.monotonic() - began
            print(f"step {step + 1:,}/{steps:,} loss {total / SAVE_STEPS:.3f} {seconds:.0f} s", flush=True)
            total = 0.0
            if state is not None:
                _save(state, step + 1, model, optimisers)


def _save(
    file: Path, step: int, model: LlamaForCausalLM, optimisers: Sequence[torch.optim.Optimizer]
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    states = [optimiser.state_dict() for optimiser in optimisers]
    part = file.with_suffix(".part")
    torch.save({"step": step, "model": model.state_dict(), "optimisers": states}, part)
    part.replace(file)


def _restore(file: Path, model: LlamaForCausalLM, optimisers: Sequence[torch.optim.Optimizer]) -> int:
    """Return the number of steps done; 0 if there is no file."""
    if not file.exists():
        return 0
    saved = torch.load(file, weights_only=True)
    model.load_state_dict(saved["model"])
    for optimiser, values in zip(optimisers, saved["optimisers"], strict=True):
        optimiser.load_state_dict(values)
    step: int = saved["step"]
    print(f"goes on after step {step:,}", flush=True)
    return step


def main() -> None:
    """Train from scratch and save."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "base"
    torch.set_num_threads(1)
    tokenizer = make_tokenizer((*WORDS, *NAMES))
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary")
    train(model, batches(text.stream(SEED, PHASES), tokenizer), STEPS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"wrote {folder}")


if __name__ == "__main__":
    main()
