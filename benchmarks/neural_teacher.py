"""Compare the mock teacher's model thread with `model.generate`, one prompt at a time, in the same run.

    python benchmarks/neural_teacher.py FOLDER [ANSWERS]

Prints answers per second of both on greedy answers to held-out rows, and whether all texts are equal.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

import orjson
import torch
from harvester_data.make_base import prompt_ids
from harvester_data.skill_rows import held_out_rows

from harvester.mock_teacher import wire
from harvester.mock_teacher.neural.answerer import ModelAnswerer
from harvester.mock_teacher.neural.worker import load

MAX_TOKENS = 64
ALONE = 60


async def batched(answerer: ModelAnswerer, prompts: list[str]) -> list[str]:
    """Ask for all answers at once."""
    asks = []
    for prompt in prompts:
        body = {
            "model": "m",
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            "messages": [{"role": "user", "content": prompt}],
        }
        asks.append(answerer.start(wire.read_ask(orjson.dumps(body), model="m", context_tokens=10**6)))
    return ["".join(generated[0].pieces) for _, generated in await asyncio.gather(*asks)]


def main() -> None:
    """Measure and print."""
    folder = Path(sys.argv[1])
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    rows = held_out_rows()
    prompts = [rows[at * len(rows) // count]["prompt"] for at in range(count)]
    model, tokenizer = load(folder)
    began, alone = time.perf_counter(), []
    step = count // min(ALONE, count)
    for prompt in prompts[::step]:
        ids = torch.tensor([prompt_ids(prompt, tokenizer)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False
        )
        alone.append(tokenizer.decode(out[0, ids.size(1) :], skip_special_tokens=True))
    alone_rate = len(alone) / (time.perf_counter() - began)
    answerer = ModelAnswerer(folder, seed=0)
    began = time.perf_counter()
    texts = asyncio.run(batched(answerer, prompts))
    rate = count / (time.perf_counter() - began)
    answerer.close()
    print(f"one at a time {alone_rate:.1f}/s, batched {rate:.1f}/s, ratio {rate / alone_rate:.1f}")
    print(
        f"equal texts: {sum(a == b for a, b in zip(alone, texts[::step], strict=True))} of {len(alone)}; "
        f"{torch.get_num_threads()} threads"
    )


if __name__ == "__main__":
    main()
