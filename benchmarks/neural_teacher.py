"""Compare the mock teacher's model thread with `model.generate`, one prompt at a time, in the same run.

    python benchmarks/neural_teacher.py [FOLDER [ANSWERS]]

Prints greedy answers to held-out rows per second of wall time, and per second of CPU time of the process that
computes them: one at a time, by the model's thread in this process, and over HTTP from a server process. On a
busy machine the CPU figures are the ones to compare. Then, whether all texts are equal.
"""

from __future__ import annotations

import asyncio
import os
import sys
import time
from pathlib import Path

import orjson
import torch
from bare import bare_httpx
from harvester_data.make_base import prompt_ids
from harvester_data.skill_rows import held_out_rows

from harvester.mock_teacher import wire
from harvester.mock_teacher.neural.answerer import ModelAnswerer
from harvester.mock_teacher.neural.worker import load
from harvester.mock_teacher.running import start_process

MAX_TOKENS = 64
ALONE = 60
CLIENTS = 64
TEACHER = Path(__file__).resolve().parents[1] / "data" / "skills" / "mock-teacher"
REQUEST = {"model": "m", "temperature": 0, "max_tokens": MAX_TOKENS}


class Watch:
    """Measure wall time and the CPU time of a process since it was made."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._wall, self._cpu = time.perf_counter(), self._cpu_s()

    def _cpu_s(self) -> float:
        fields = Path(f"/proc/{self._pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def show(self, name: str, answers: int) -> None:
        """Print the rates of what was done since then."""
        wall, cpu = time.perf_counter() - self._wall, self._cpu_s() - self._cpu
        print(f"{name}: {answers / wall:.1f}/s, {answers / cpu:.1f} a CPU second", flush=True)


async def batched(answerer: ModelAnswerer, prompts: list[str]) -> list[str]:
    """Ask for all answers at once."""
    asks = []
    for prompt in prompts:
        body = {**REQUEST, "messages": [{"role": "user", "content": prompt}]}
        asks.append(answerer.start(wire.read_ask(orjson.dumps(body), model="m", context_tokens=10**6)))
    return ["".join(generated[0].pieces) for _, generated in await asyncio.gather(*asks)]


async def over_http(url: str, prompts: list[str]) -> list[str]:
    """Ask a server for all answers, `CLIENTS` at a time."""
    gate = asyncio.Semaphore(CLIENTS)
    async with bare_httpx() as client:

        async def ask(prompt: str) -> str:
            body = {**REQUEST, "messages": [{"role": "user", "content": prompt}]}
            async with gate:
                reply = await client.post(f"{url}/chat/completions", json=body)
            text: str = reply.raise_for_status().json()["choices"][0]["message"]["content"]
            return text

        return await asyncio.gather(*map(ask, prompts))


def main() -> None:
    """Measure and print."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else TEACHER
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    rows = held_out_rows()
    prompts = [rows[at * len(rows) // count]["prompt"] for at in range(count)]
    model, tokenizer = load(folder)
    print(f"load {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs, {torch.get_num_threads()} torch threads")
    own = os.getpid()
    watch, alone = Watch(own), []
    step = count // min(ALONE, count)
    for prompt in prompts[::step]:
        ids = torch.tensor([prompt_ids(prompt, tokenizer)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False
        )
        alone.append(tokenizer.decode(out[0, ids.size(1) :], skip_special_tokens=True))
    watch.show("one at a time", len(alone))
    answerer = ModelAnswerer(folder, seed=0)
    watch = Watch(own)
    texts = asyncio.run(batched(answerer, prompts))
    watch.show("in batches", count)
    answerer.close()
    with start_process("--model", str(folder)) as served:
        REQUEST["model"] = folder.name
        asyncio.run(over_http(served.base_url, prompts[:CLIENTS]))
        watch = Watch(served.pid)
        remote = asyncio.run(over_http(served.base_url, prompts))
        watch.show("over HTTP", count)
    equal = sum(a == b for a, b in zip(alone, texts[::step], strict=True))
    print(
        f"equal texts: {equal} of {len(alone)} alone and in batches, "
        f"{sum(a == b for a, b in zip(texts, remote, strict=True))} of {count} in batches and over HTTP; "
        f"{sum(map(len, texts)) / count:.1f} characters an answer"
    )


if __name__ == "__main__":
    main()
