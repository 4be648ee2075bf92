"""Measure how much of the small neural teacher a student recovers, everything through HTTP.

    python benchmarks/quality.py [--each N] [--epochs N] [--teacher FOLDER] [--student FOLDER] [--out FOLDER]

Serves the teacher's folder with the mock teacher, harvests its greedy answers to `skill_rows.harvest_rows` (N
prompts of each task) and to the held-out rows, trains the student with LoRA on the texts, and scores base,
student and teacher on the held-out rows. Prints one line of JSON. Harvest and training are known by the hash
of what goes into them: what is there is read instead of made again, and an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from harvester_data.skill_rows import HARVEST_ROWS, Row, harvest_rows, held_out_rows

from harvester.mock_teacher.running import start_process

ROOT = Path(__file__).resolve().parents[1]
SKILLS = ROOT / "data" / "skills"
TEACHER = "mock-teacher"  # the terms record of the mock teacher applies to this name
HARVEST_TOML = """\
[teacher]
base_url = "http://127.0.0.1:{port}/v1"
model = "{model}"
terms = "mock-teacher"
[teacher.limits]
max_concurrency = 64
[prompts]
files = ["harvest.jsonl", "test.jsonl"]
[sampling]
temperature = 0.0
max_tokens = 64
[store]
path = "store"
"""
TRAIN_TOML = """\
[student]
base = {base}
[data]
corpus = {corpus}
[lora]
rank = 32
alpha = 64
[train]
epochs = {epochs}
batch_tokens = 2048
max_length = 256
lr = 3e-3
lr_floor = 0.02
warmup = 0.03
weight_decay = 0.0
seed = 0
[evaluate]
max_new_tokens = 64
[out]
path = "."
"""


def digest(*parts: object) -> str:
    """Return a short hash of values; of a folder's files it takes names and contents."""
    hashed = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            for file in sorted(part.iterdir()):
                hashed.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
        else:
            hashed.update(json.dumps(part).encode() + b"\0")
    return hashed.hexdigest()[:16]


def command(*arguments: object) -> dict[str, Any]:
    """Run a command of the package; return the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def port_of(config: Path) -> int:
    """Return the port of an interrupted harvest, which its requests are known by; else a free one."""
    if config.exists() and (match := re.search(r"127\.0\.0\.1:(\d+)/", config.read_text())):
        return int(match[1])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def harvest(teacher: Path, rows: list[Row], test: list[Row], out: Path) -> Path:
    """Return the folder of a finished harvest."""
    folder = out / f"harvest-{digest(teacher, rows, test, HARVEST_TOML)}"
    done = folder / "harvest.json"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("harvest.jsonl", rows), ("test.jsonl", test)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    config = folder / "harvest.toml"
    port = port_of(config)
    config.write_text(HARVEST_TOML.format(port=port, model=teacher.name))
    began = time.monotonic()
    with start_process("--model", str(teacher), "--port", str(port)):
        summary = command("harvester", "run", config, "--json")
    summary["seconds"] = round(time.monotonic() - began, 1)
    done.write_text(json.dumps(summary, indent=2) + "\n")
    return folder


def train(student: Path, harvested: Path, epochs: int, out: Path) -> Path:
    """Return the folder of a finished training and its scorecard."""
    folder = out / f"train-{digest(student, harvested.name, epochs, TRAIN_TOML)}"
    done = folder / "scorecard.json"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "train.toml"
    corpus = os.path.relpath(harvested / "store", folder)
    base = os.path.relpath(student, folder)
    config.write_text(TRAIN_TOML.format(base=json.dumps(base), corpus=json.dumps(corpus), epochs=epochs))
    began = time.monotonic()
    command("trainer", "train", config, "--json")
    (folder / "seconds.json").write_text(json.dumps({"train": round(time.monotonic() - began, 1)}) + "\n")
    command("trainer", "evaluate", config, "--json")
    return folder


def main() -> None:
    """Run what is not done yet, and print the result."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--each", type=int, default=HARVEST_ROWS, help="prompts of each of the eight tasks")
    parser.add_argument("--test", type=int, default=1, help="score every N-th held-out row")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--teacher", type=Path, default=SKILLS / TEACHER)
    parser.add_argument("--student", type=Path, default=SKILLS / "student")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "quality")
    flags = parser.parse_args()
    began = time.monotonic()
    rows, test = harvest_rows(each=flags.each), held_out_rows()[:: flags.test]
    harvested = harvest(flags.teacher.resolve(), rows, test, flags.out.resolve())
    trained = train(flags.student.resolve(), harvested, flags.epochs, flags.out.resolve())
    card = json.loads((trained / "scorecard.json").read_text())
    result = {
        "answers": json.loads((harvested / "harvest.json").read_text())["answers_stored"],
        "harvest_s": json.loads((harvested / "harvest.json").read_text())["seconds"],
        "train_s": json.loads((trained / "seconds.json").read_text())["train"],
        "all_s": round(time.monotonic() - began, 1),
        "accuracy": {who: card["macro"][who]["accuracy"] for who in ("base", "student", "teacher")},
        "recovery": card["recovery"],
        "scorecard": str(trained / "scorecard.json"),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
