"""Check and measure the trainer on a GPU within ten minutes, unattended, without a network.

    bash benchmarks/gpu_first_light.sh [--minutes 9.5] [--out build/gpu] [--work build/gpu] [--dry-run]

Each stage is a process with a limit of its own. After each one first_light.json is replaced, so whatever ends
the walk, what was measured before is kept; SIGTERM and Ctrl-C end the stage that runs and are recorded. A
stage that fails is recorded with the end of its output, and the next one begins. first_light.json alone is
written to --out, all else to --work. Packages that the machine lacks may lie in a folder of PYTHONPATH. In
the order of their worth:

- `facts`: device, versions, packages that are missing.
- `kernels`: attention, loss and LoRA against fp32 references, forward and backward.
- `0.5b`: steps of a Qwen2.5 shape with random bf16 weights: tokens/s, MFU, memory.
- `harvest`, `train_cpu`, `train`: a small student learns the same rows on the CPU in fp32 and on the device;
  the losses of their log lines are compared. Where nothing could be harvested, rows are made (`corpus`).
- `killed`: the same training with `[train] deterministic`, once whole and once killed and resumed: the two
  adapters must have the same bytes.
- `1.5b`, `7b`: as 0.5b.
- `evaluate`, `export`: score and merge on the device.
- each shape compiled, and by tuned TRL where that is installed.

The dry run walks the same stages on the CPU with a tiny shape, three times the time for each, and few
compiled steps, by a backend that traces the graphs and leaves out the C++ compiler.

Exit 0 if no stage failed and no check was missed, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LORA, BASE = ROOT / "benchmarks/lora", ROOT / "data/base"
sys.path[:0] = [str(LORA), str(ROOT)]

# Largest relative difference between the losses of a log line on the CPU (fp32) and on the device (bf16).
PARITY = 3e-2
STEPS, SAVE_EVERY = 14, 4
ROWS, HELD_OUT_ROWS = 400, 40
TAIL = 2_000  # characters of a failed stage's output that are kept

FACTS = r"""
import json, platform, re, sys, tomllib, torch, transformers, peft
from importlib.metadata import PackageNotFoundError, version
facts = {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
         "transformers": transformers.__version__, "peft": peft.__version__, "device": "cpu"}
def is_missing(requirement):
    try:
        return not version(re.match(r"[\w.-]+", requirement).group())
    except PackageNotFoundError:
        return True
with open(sys.argv[1], "rb") as file:
    project = tomllib.load(file)["project"]
wanted = [*project["dependencies"], *project["optional-dependencies"]["train"]]
facts["missing"] = [name for name in wanted if is_missing(name)]
facts["optional_missing"] = [name for name in ("trl", "bitsandbytes", "flash-attn-3") if is_missing(name)]
if torch.cuda.is_available():
    free, whole = torch.cuda.mem_get_info()
    facts |= {"device": torch.cuda.get_device_name(), "capability": torch.cuda.get_device_capability(),
              "free_bytes": free, "bytes": whole}
print(json.dumps(facts))
"""

TOML = """
[student]
base = {base}
[data]
corpus = {corpus}
[lora]
rank = 16
alpha = 32
[train]
device = "{device}"
deterministic = {deterministic}
max_steps = {steps}
batch_tokens = 2048
max_length = 256
lr = 1e-3
log_every = 1
save_every = {save_every}
[evaluate]
max_new_tokens = 48
[out]
path = {out}
"""


class StageFailed(Exception):
    """A stage did not do what it should; the message says why."""


class Stopped(BaseException):
    """SIGTERM came."""


class Walk:
    """Run stages one after the other, and write down what each one gave.

    Args:
        out: folder of first_light.json.
        ends: time of `time.monotonic` after which no stage begins.
        work: folder of what the stages write; None: `out`.
        patience: factor of the time limits of all stages.
    """

    def __init__(self, out: Path, ends: float, work: Path | None = None, patience: float = 1.0) -> None:
        self.out = out
        self.work = work or out
        self.failed = False
        self._patience = patience
        self._ends = ends
        self._results: list[dict[str, Any]] = []
        for folder in (self.out, self.work):
            folder.mkdir(parents=True, exist_ok=True)

    @property
    def left_s(self) -> float:
        """Seconds that are left for stages."""
        return self._ends - time.monotonic()

    def stage(self, name: str, work: Callable[[], dict[str, Any]], *, needs_s: float = 10) -> bool:
        """Run one stage, unless less than `needs_s` seconds are left; whatever it raises is written down.

        Returns:
            Whether it did what it should.
        """
        if self.left_s < needs_s:
            self._write({"stage": name, "skipped": "no time left"})
            return False
        began = time.monotonic()
        try:
            result: dict[str, Any] = {"stage": name, "result": work()}
        except Exception as error:  # noqa: BLE001 - the walk goes on
            result = {"stage": name, "error": str(error) or type(error).__name__}
            self.failed = True
        except BaseException as stop:
            self._write({"stage": name, "error": f"stopped: {type(stop).__name__}"})
            raise
        self._write({**result, "seconds": round(time.monotonic() - began, 1)})
        return "error" not in result

    def _write(self, result: dict[str, Any]) -> None:
        self._results.append(result)
        print(json.dumps(result), flush=True)
        hidden = self.out / ".first_light.json"
        hidden.write_text(json.dumps(self._results, indent=1) + "\n", encoding="utf-8")
        hidden.replace(self.out / "first_light.json")

    def run(self, arguments: list[str], limit_s: float, *, threads: int = 8) -> str:
        """Run Python with these arguments; return its standard output.

        Raises:
            StageFailed: it failed or took longer than the limit, or than what is left of the walk.
        """
        with subprocess.Popen(
            [sys.executable, "-W", "ignore", *arguments],
            env=environment(OMP_NUM_THREADS=str(threads)),
            cwd=self.work,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        ) as process:
            time_s = max(1.0, min(limit_s * self._patience, self.left_s))
            try:
                output, errors = process.communicate(timeout=time_s)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                output, errors = process.communicate()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                said = (output + errors)[-TAIL:].strip()
                raise StageFailed(f"killed after {time_s:.0f} s" + (f": {said}" if said else "")) from None
        if process.returncode != 0:
            raise StageFailed(f"exit {process.returncode}: {(output + errors)[-TAIL:]}")
        return output

    def json_of(self, arguments: list[str], limit_s: float) -> dict[str, Any]:
        """Run Python as `run`; return the JSON object in the last line that it prints."""
        result: dict[str, Any] = json.loads(self.run(arguments, limit_s).strip().splitlines()[-1])
        return result


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment, with the repository before other folders of packages."""
    folders = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(folders), **more}


def measured(walk: Walk, script: str, name: str, device: str, **changes: Any) -> dict[str, Any]:
    """Run one trainer's steps on a shape; return rates, MFU (of an H100's or H200's peak) and memory."""
    import shapes  # imports torch, without which the walk can still say what is missing

    folder = walk.work / f"shape-{name}"
    task = shapes.task_of(name, folder, device, pack_tokens=16_384, tokenizer=str(BASE))
    task = dataclasses.replace(task, **changes)
    path = folder / f"{Path(script).stem}.json"
    task.save(path)
    result = walk.json_of([str(LORA / script), str(path)], limit_s=240)
    flop = result.pop("flop", None)
    if flop and device == "cuda":
        result["mfu"] = flop / result["seconds"] / shapes.PEAK
    goal = shapes.GOAL.get(name)
    return {**result, "goal_mfu": goal[0] / 100 if goal else None}


def harvest(walk: Walk) -> dict[str, Any]:
    """Harvest rows from a mock teacher on loopback."""
    counts = {"skills-train": ROWS, "skills-held-out": HELD_OUT_ROWS}
    lines = [
        line
        for name, count in counts.items()
        for line in (ROOT / f"prompts/{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
    ]
    (walk.work / "prompts.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with mock_teacher(walk.work) as base_url:
        (walk.work / "harvest.toml").write_text(
            f'[teacher]\nbase_url = "{base_url}"\nmodel = "mock-teacher"\nterms = "mock-teacher"\n'
            '[prompts]\nfiles = ["prompts.jsonl"]\n[sampling]\nmax_tokens = 64\n',
            encoding="utf-8",
        )
        return walk.json_of(["-m", "harvester", "run", "harvest.toml", "--json"], limit_s=60)


def made_rows(walk: Walk) -> dict[str, Any]:
    """Make rows without a teacher: a package that only the harvester needs may be missing."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    import trainer_scale

    shutil.rmtree(walk.work / "store", ignore_errors=True)
    trainer_scale.make_corpus(walk.work / "store", ROWS)
    return {"rows": ROWS}


@contextlib.contextmanager
def mock_teacher(folder: Path) -> Iterator[str]:
    """Run the mock teacher as a process; yield its base URL."""
    with subprocess.Popen(
        [sys.executable, "-m", "harvester", "mock-teacher", "--port", "0"],
        env=environment(PYTHONUNBUFFERED="1"),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            words = process.stdout.readline().split()
            urls = [word for word in words if word.startswith("http://")]
            if not urls:
                raise StageFailed(f"the mock teacher did not start: {' '.join(words)[-TAIL:]}")
            yield urls[0]
        finally:
            process.terminate()


def configured(walk: Walk, name: str, device: str, *, deterministic: bool = False) -> list[str]:
    """Write the train.toml of one training; return the arguments of Python that train it."""
    path = walk.work / f"{name}.toml"
    path.write_text(
        TOML.format(
            base=json.dumps(str(BASE)),
            corpus=json.dumps(str(walk.work / "store")),
            device=device,
            deterministic=str(deterministic).lower(),
            steps=STEPS,
            save_every=SAVE_EVERY,
            out=json.dumps(str(walk.work / name)),
        ),
        encoding="utf-8",
    )
    return ["-m", "trainer", "train", str(path), "--json"]


def losses(folder: Path) -> list[float]:
    """Return the loss of each step from the log of a training."""
    lines = (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()
    whole = lines if not lines or lines[-1].endswith("}") else lines[:-1]  # it may be written just now
    return [line["loss"] for line in map(json.loads, whole) if "loss" in line]


def trained(walk: Walk, name: str, device: str) -> dict[str, Any]:
    """Train the small student; return rates and losses."""
    result = walk.json_of(configured(walk, name, device), limit_s=120)
    return {key: result[key] for key in ("loss", "tokens_per_s", "wall_s", "notes")}


def compared(walk: Walk) -> dict[str, Any]:
    """Compare the losses of the training on the device with those on the CPU."""
    there, here = losses(walk.work / "train_cpu"), losses(walk.work / "train")
    worst = max(abs(a - b) / abs(b) for a, b in zip(here, there, strict=True))
    if worst > PARITY:
        raise StageFailed(f"losses differ by {worst:.2%}, more than {PARITY:.0%}: {here} and {there}")
    return {"largest_difference": worst, "steps": len(here)}


def killed(walk: Walk, device: str) -> dict[str, Any]:
    """Train whole, and killed and resumed; the adapters must have the same bytes."""
    walk.run(configured(walk, "whole", device, deterministic=True), limit_s=120)
    arguments = configured(walk, "resumed", device, deterministic=True)
    log = walk.work / "resumed/train.jsonl"
    with subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as process:
        try:
            # The line of a step that comes after a checkpoint and before the last one.
            while process.poll() is None and not (log.exists() and len(losses(log.parent)) > STEPS // 2):
                if walk.left_s < 0:
                    raise StageFailed("no time left")
                time.sleep(0.01)
        finally:
            process.kill()
    if process.returncode != -signal.SIGKILL:
        raise StageFailed(f"the training ended with {process.returncode} before it was killed")
    result = walk.json_of(arguments, limit_s=120)
    digests = {
        hashlib.sha256((walk.work / name / "adapter/adapter_model.safetensors").read_bytes()).hexdigest()
        for name in ("whole", "resumed")
    }
    if len(digests) > 1:
        raise StageFailed("the resumed training ended with another adapter than the uninterrupted one")
    return {"steps_after_resume": result["steps_now"], "adapter_sha256": digests.pop()}


def main() -> None:
    """Run the walk."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, help="default: 9.5, for the dry run 60")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT") or ROOT / "build/gpu"))
    parser.add_argument("--work", type=Path, default=ROOT / "build/gpu", help="default: build/gpu")
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, with a tiny shape")
    options = parser.parse_args()
    minutes = options.minutes or (60 if options.dry_run else 9.5)
    patience = 3.0 if options.dry_run else 1.0
    ends = time.monotonic() + minutes * 60
    walk = Walk(options.out.resolve(), ends, options.work.resolve(), patience)
    signal.signal(signal.SIGTERM, stop)
    try:
        if options.dry_run:
            walk_all(walk, "cpu", "float32", ["tiny"], backend="aot_eager", warm=1, timed=4)
        else:
            walk_all(walk, "cuda", "bfloat16", ["0.5b", "1.5b", "7b"])
    except (Stopped, KeyboardInterrupt) as stopped:
        sys.exit(143 if isinstance(stopped, Stopped) else 130)
    sys.exit(1 if walk.failed else 0)


def stop(_signal: int, _frame: object) -> None:
    """End the walk: the handler of SIGTERM."""
    raise Stopped


def walk_all(walk: Walk, device: str, dtype: str, names: list[str], **compiled: Any) -> None:
    """Run all stages in the order of their worth.

    Args:
        compiled: fields of the tasks of compiled stages.
    """
    first, *larger = names
    walk.stage("facts", lambda: walk.json_of(["-c", FACTS, str(ROOT / "pyproject.toml")], 60))
    walk.stage("kernels", lambda: walk.json_of([str(LORA / "kernel_checks.py"), device, dtype], 90))
    walk.stage(first, lambda: measured(walk, "our_side.py", first, device), needs_s=30)
    if not walk.stage("harvest", lambda: harvest(walk)):
        walk.stage("corpus", lambda: made_rows(walk))
    walk.stage("train_cpu", lambda: trained(walk, "train_cpu", "cpu"))
    walk.stage("train", lambda: trained(walk, "train", device))
    walk.stage("parity", lambda: compared(walk))
    walk.stage("killed", lambda: killed(walk, device), needs_s=30)
    for name in larger:
        walk.stage(name, lambda name=name: measured(walk, "our_side.py", name, device), needs_s=60)
    configured_as = str(walk.work / "train.toml")
    scored = ["-m", "trainer", "evaluate", configured_as, "--json"]
    walk.stage("evaluate", lambda: walk.json_of(scored, 90))
    merged = ["-m", "trainer", "export", configured_as, str(walk.work / "merged"), "--json"]
    walk.stage("export", lambda: walk.json_of(merged, 90))
    has_trl = importlib.util.find_spec("trl") is not None
    for name in names:
        walk.stage(
            f"{name} compiled",
            lambda name=name: measured(walk, "our_side.py", name, device, compile=True, **compiled),
            needs_s=60,
        )
        if has_trl:
            walk.stage(
                f"{name} TRL", lambda name=name: measured(walk, "trl_side.py", name, device), needs_s=60
            )


if __name__ == "__main__":
    main()
