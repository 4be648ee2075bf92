"""Run everything once, offline: mock teacher -> harvest -> Parquet -> student -> scorecard -> report.

The demo runs the commands a user would, each in its own process, from a checkout or an installed wheel. A
second run finds every answer in the store and every step in the checkpoint, and sends nothing.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import Any

from harvester.errors import ConfigError, HarvesterError, TeacherRefused
from harvester.system.command_line.extras import require
from harvester.system.command_line.verb_command import variable_name, without_variables
from harvester.system.free_port import free_port

CHECKOUT = Path(__file__).resolve().parents[2]
PROMPT_FILES = ("skills-train.jsonl", "skills-held-out.jsonl")

# Seconds that the mock teacher may take to start.
START_DEADLINE_S = 30.0

HARVEST_TOML = """\
# Written by `harvester demo`. The teacher is the mock teacher; replace these lines for a real one.
[teacher]
base_url = "http://127.0.0.1:{port}/v1"
model = "mock-teacher"
terms = "mock-teacher"
[teacher.limits]
max_concurrency = 64
[teacher.price]          # invented, so that there is a cost to show
input = 0.15
output = 0.60
as_of = 2026-11-01
[prompts]
files = [{prompts}]
[sampling]
temperature = 0.0
max_tokens = 64
[store]
path = "store"
"""


class StageFailed(HarvesterError):
    """A stage of the demo failed, with an exit code that becomes that of the demo."""

    def __init__(self, title: str, exit_code: int) -> None:
        super().__init__(f"stage {title!r} ended with exit code {exit_code}")
        self.exit_code = exit_code


def run_demo(folder: Path) -> dict[str, Any]:
    """Run all stages in `folder`; return the summary of the harvest, which run.json holds, and `wall_s`.

    Raises:
        MissingPackage: the extra `train` is not installed.
        ConfigError: the folder can't be created, or the port of the demo is taken.
        HarvesterError: a stage failed; its message was printed.
    """
    require("train", "`harvester demo`, which trains a student,")
    began = time.monotonic()
    data = Path(str(files("harvester_data")))
    prompts = [_prompt_folder() / name for name in PROMPT_FILES]
    base = data / "base"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"folder can't be created: {error.strerror}", place=str(folder), remedy="name another folder"
        ) from None
    harvest_toml, train_toml = folder / "harvest.toml", folder / "train.toml"
    port = _port(harvest_toml)
    names = ", ".join(json.dumps(os.path.relpath(path, folder)) for path in prompts)
    harvest_toml.write_text(HARVEST_TOML.format(port=port, prompts=names), encoding="utf-8")
    template = (data / "train-demo.toml").read_text(encoding="utf-8")
    train_toml.write_text(
        template.replace("BASE", json.dumps(os.path.relpath(base, folder))), encoding="utf-8"
    )

    with _mock_teacher(port, folder):
        summary = json.loads(_stage("harvest", "harvester", "run", str(harvest_toml), "--json"))
    (folder / "run.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    _stage("train", "trainer", "train", str(train_toml), "--json")
    _stage("score", "trainer", "evaluate", str(train_toml), "--json")
    report = ("harvester", "report", str(folder / "store"), "--out", str(folder / "report.html"))
    training = ("--training", str(folder / "train.jsonl"))
    _stage("report", *report, "--scorecard", str(folder / "scorecard.json"), *training)
    summary["wall_s"] = round(time.monotonic() - began, 1)
    return dict(summary)


def summary_lines(folder: Path, summary: dict[str, Any]) -> list[str]:
    """Return what was sent, the accuracy reached, and where the results are."""
    card = json.loads((folder / "scorecard.json").read_text(encoding="utf-8"))
    macro = card["macro"]
    stored, held = summary["answers_stored"], summary["from_cache"]
    return [
        "",
        f"requests sent {summary['requests_sent']:,}; answers stored {stored:,}, already stored {held:,}",
        "macro accuracy on held-out prompts: "
        + ", ".join(f"{who} {macro[who]['accuracy']:.1%}" for who in ("base", "student", "teacher"))
        + (f"; recovery {card['recovery']:.2f}" if card["recovery"] is not None else ""),
        f"everything took {summary['wall_s']:.0f} s and is in {folder}:",
        "  store/shards/     the answers, as Parquet files",
        "  ledger.jsonl      what the mock teacher generated and charged",
        "  adapter/          the LoRA adapter (peft.PeftModel.from_pretrained)",
        "  scorecard.json    base, student and teacher, per task, with intervals",
        "  report.html       all of it on one page",
        "  run.json          requests_sent, answers_stored, from_cache",
        "Run it again: no request is sent, no answer is paid twice.",
    ]


def default_folder() -> Path:
    """Return `data/demo` of the checkout; `distillation-demo` in the current folder without a checkout."""
    return CHECKOUT / "data" / "demo" if _is_checkout() else Path("distillation-demo")


def _prompt_folder() -> Path:
    """Return the folder of the prompt files: of the checkout, else where a wheel puts them."""
    return CHECKOUT / "prompts" if _is_checkout() else Path(str(files("harvester_prompts")))


def _is_checkout() -> bool:
    return (CHECKOUT / "prompts" / PROMPT_FILES[0]).is_file()


def _port(harvest_toml: Path) -> int:
    """Return the port of the first run, as the address is part of every request key; else a free port."""
    if harvest_toml.exists():
        for line in harvest_toml.read_text(encoding="utf-8").splitlines():
            if line.startswith("base_url"):
                return int(line.rsplit(":", 1)[1].split("/")[0])
    return free_port()


@contextmanager
def _mock_teacher(port: int, folder: Path) -> Iterator[None]:
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise ConfigError(
                f"port {port} is taken",
                place=str(folder / "harvest.toml"),
                remedy="end the process that uses it, then try again",
            )
    _print_title("mock teacher")
    ledger = ("--ledger", str(folder / "ledger.jsonl"))
    command = [sys.executable, "-m", "harvester", "mock-teacher", "--port", str(port), *ledger]
    with (folder / "mock-teacher.log").open("ab") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env=_environment())
        try:
            _wait_until_ready(process, port, folder)
            yield
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait_until_ready(process: subprocess.Popen[bytes], port: int, folder: Path) -> None:
    deadline = time.monotonic() + START_DEADLINE_S
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while True:
        try:
            with opener.open(f"http://127.0.0.1:{port}/v1/models", timeout=1):
                return
        except OSError as error:
            if process.poll() is not None or time.monotonic() > deadline:
                raise TeacherRefused(
                    f"the mock teacher did not start: {error}", place=str(folder / "mock-teacher.log")
                ) from None
            time.sleep(0.05)  # between two looks at a process that is starting


def _environment() -> dict[str, str]:
    """Return the environment without variables that set options: the demo sets those of its commands."""
    verbs = [variable_name("harvester", verb) for verb in ("run", "report", "mock-teacher")]
    return without_variables(os.environ, [*verbs, "TRAINER"])


def _stage(title: str, *command: str) -> str:
    """Run one command; its progress appears on our stderr. Return its last line on stdout, which is JSON."""
    _print_title(title)
    done = subprocess.run(
        [sys.executable, "-m", *command], stdout=subprocess.PIPE, text=True, env=_environment(), check=False
    )
    if done.returncode != 0:
        raise StageFailed(title, done.returncode)
    return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else "{}"


def _print_title(title: str) -> None:
    print(f"== {title}", file=sys.stderr, flush=True)  # noqa: T201
