"""Measure supervised tokens per second, and the loss, of our trainer and of TRL 1.16 on the same rows.

    python benchmarks/trainer_vs_trl.py                  two CPU cores, the tiny student
    python benchmarks/trainer_vs_trl.py --gpu            one H200: kernels, then Qwen2.5 shapes 0.5B, 1.5B, 7B
    python benchmarks/trainer_vs_trl.py --gpu --dry-run  the same walk on the CPU with a tiny shape

TRL gets an environment of its own (benchmarks/out/trl, made once, from constraints.txt); --trl-python names
another, and an interpreter that has TRL already is taken as it is. Both sides learn the same documents in
every step in the same order, from the same first adapter. Tuned TRL: packed and padding-free in packs of the
size that suits it best, no checkpointing, the same dtype, fused AdamW; SDPA on the CPU, on a GPU torch's
variable-length kernel. Defaults: SFTConfig as it comes. Runs alternate; ratios are of medians of median
steps. On a CPU the ratio of CPU seconds stands beside: a busy machine hardly touches it. Exit 1 when a kernel
is off, the first adapters differ, or the losses part by more than 1e-2.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LORA, OUT, BASE = ROOT / "benchmarks/lora", ROOT / "benchmarks/out", ROOT / "data/base"
sys.path[:0] = [str(LORA), str(ROOT)]

import lora_task  # noqa: E402
import rows  # noqa: E402
from shapes import GOAL, PEAK, lay, task_of  # noqa: E402

PARITY = 1e-2


def trl_python(named: str | None) -> str:
    """An interpreter that has TRL: the one named, this one, or that of an environment made here."""
    if named:
        return named
    if subprocess.run([sys.executable, "-c", "import trl, datasets"], capture_output=True).returncode == 0:
        return sys.executable
    home = OUT / "trl"
    python = home / "bin/python"
    if not (home / "installed").exists():
        print(f"making {home.relative_to(ROOT)}", file=sys.stderr)
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "-c", str(ROOT / "constraints.txt")]
        subprocess.run([*pip, "trl==1.16.*", "torch==2.13.0", "peft"], check=True)
        (home / "installed").touch()
    return str(python)


def told_by(python: str, script: str, arguments: list[str], threads: int) -> dict[str, Any]:
    """A script in a process of its own; the last line it prints is its result."""
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_WAIT_POLICY": "PASSIVE"}
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [python, "-W", "ignore", str(LORA / script), *arguments],
        env={**os.environ, **quiet, "PYTHONPATH": paths, "OMP_NUM_THREADS": str(threads)},
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise SystemExit(f"{script} {' '.join(arguments)}\n{done.stdout[-1000:]}{done.stderr[-4000:]}")
    result: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def side(python: str, script: str, task: lora_task.Task) -> dict[str, Any]:
    """One trainer on one task."""
    path = Path(task.folder) / f"{Path(script).stem}-{task.variant}.json"
    task.save(path)
    return told_by(python, script, [str(path)], task.threads)


def attempt(name: str, python: str, script: str, task: lora_task.Task) -> list[dict[str, Any]]:
    """`side` and its row; a side that fails (no memory, a compiler) says so and doesn't end the others."""
    try:
        runs = [side(python, script, task)]
    except SystemExit as error:
        print(f"  {name:<22} FAILED: {str(error).strip().splitlines()[-1][:160]}", flush=True)
        return []
    line(name, runs)
    return runs


def merged(steps: list[rows.Step]) -> list[rows.Step]:
    """The same documents in every step, as one pack."""
    return [[[document for pack in step for document in pack]] for step in steps]


def line(name: str, runs: list[dict[str, Any]]) -> None:
    """A row of the table: medians over the runs."""
    of = {key: statistics.median(run[key] for run in runs) for key in (*NUMBERS, "peak_bytes")}
    flop = runs[0].get("flop")
    extra = f"{of['peak_bytes'] / 2**30:6.1f} GiB" if of["peak_bytes"] else f"{of['cpu_s'] * 1e3:7.0f} CPU ms"
    mfu = f"  MFU {flop / runs[0]['seconds'] / PEAK:5.1%}" if flop and of["peak_bytes"] else ""
    print(
        f"  {name:<22} {of['step_s'] * 1e3:8.1f} ms a step (IQR {of['step_iqr_s'] * 1e3:6.1f}) {extra}"
        f" {of['tokens_per_s']:10,.0f} tokens/s {of['supervised_per_s']:10,.0f} supervised/s{mfu}"
    )


NUMBERS = ("step_s", "step_iqr_s", "cpu_s", "tokens_per_s", "supervised_per_s")


def compared(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], *, on_cpu: bool) -> tuple[float, bool]:
    """Print ratio and parity; returns the ratio and whether the two learned the same."""
    mine, other = (statistics.median(run["supervised_per_s"] for run in runs) for runs in (ours, theirs))
    ratio = statistics.median(r["step_s"] for r in theirs) / statistics.median(r["step_s"] for r in ours)
    cpu = statistics.median(r["cpu_s"] for r in theirs) / statistics.median(r["cpu_s"] for r in ours)
    beside = f", by CPU seconds {cpu:.2f}x" if on_cpu else ""
    print(
        f"  ours / tuned TRL: {ratio:.2f}x by median steps, "
        f"{mine / other:.2f}x by supervised tokens/s{beside}"
    )
    parts = [abs(a - b) / abs(b) for a, b in zip(ours[0]["losses"], theirs[0]["losses"], strict=True)]
    same = ours[0]["adapter_at_start"] == theirs[0]["adapter_at_start"]
    print(
        f"  loss after {len(parts) * 10} steps: {ours[0]['losses'][-1]:.4f} ours, "
        f"{theirs[0]['losses'][-1]:.4f} TRL; largest difference of a ten-step mean {max(parts):.1e}; "
        f"first adapters {'equal' if same else 'DIFFER'}"
    )
    return ratio, same and max(parts) <= PARITY


def on_cpu(options: argparse.Namespace) -> bool:
    """The tiny student: 2,048 tokens a step, in one pack for us, in packs of its best size for TRL."""
    python = trl_python(options.trl_python)
    examples = rows.skills(BASE, ROOT / "prompts/skills-train.jsonl")
    steps = rows.steps(examples, 70, pack_tokens=options.trl_pack, packs_per_step=2048 // options.trl_pack)
    us = lora_task.Task(
        lay(OUT / "cpu/ours", merged(steps)), base=str(BASE), tokenizer=str(BASE), compile=options.compile
    )
    them = replace(us, folder=lay(OUT / "cpu/trl", steps), pack_tokens=options.trl_pack)
    ours, tuned = [], []
    for _ in range(options.rounds):
        ours.append(side(sys.executable, "our_side.py", us))
        tuned.append(side(python, "trl_side.py", them))
    default = side(python, "trl_side.py", replace(them, variant="defaults"))
    print(f"CPU, {us.threads} threads, data/base, LoRA rank {us.rank}, {us.warm} + {us.timed} steps")
    line("ours", ours)
    line(f"TRL tuned, packs {options.trl_pack}", tuned)
    line("TRL defaults", [default])
    _, good = compared(ours, tuned, on_cpu=True)
    mine = statistics.median(run["supervised_per_s"] for run in ours)
    print(f"  ours / TRL defaults: {mine / default['supervised_per_s']:.1f}x by supervised tokens/s")
    return good


def on_gpu(options: argparse.Namespace) -> bool:
    """Kernels, then one shape after the other, until the time is used up."""
    device, dtype = ("cpu", "float32") if options.dry_run else ("cuda", "bfloat16")
    ends = time.monotonic() + options.minutes * 60
    python = trl_python(options.trl_python)
    off = told_by(sys.executable, "kernel_checks.py", [device, dtype], 8)
    print(
        "kernels against fp32: " + ", ".join(f"{name} {size:.0e}" for name, size in off.items()), flush=True
    )
    good = True
    for name in ("tiny",) if options.dry_run else options.shapes:
        if time.monotonic() > ends - 60:
            print(f"{name}: no time left")
            continue
        good &= shape(name, (device, dtype), python, ends, options)
    return good


def shape(name: str, where: tuple[str, str], python: str, ends: float, options: argparse.Namespace) -> bool:
    """One shape: ours, ours compiled, tuned TRL, TRL as it comes."""
    device, dtype = where
    task = task_of(name, OUT / f"gpu/{name}", device, pack_tokens=options.pack_tokens, tokenizer=str(BASE))
    print(
        f"{name}: {device}, {dtype}, packs of {task.pack_tokens}, {task.warm} + {task.timed} steps",
        flush=True,
    )
    ours = attempt("ours", sys.executable, "our_side.py", task)
    tuned = attempt(f"TRL tuned, {task.attention}", python, "trl_side.py", task)
    good = bool(ours and tuned) and compared(ours, tuned, on_cpu=device == "cpu")[1]
    if ours:
        print(
            f"  {ours[0]['device']}, torch {ours[0]['torch']}; goals {GOAL.get(name)}",
            flush=True,
        )
    if options.compile or (device == "cuda" and time.monotonic() < ends - 180):
        attempt("ours, compiled", sys.executable, "our_side.py", replace(task, compile=True))
    if name in ("0.5b", "tiny"):  # a step of the larger ones takes too long for ten minutes
        attempt("TRL defaults", python, "trl_side.py", replace(task, variant="defaults"))
    return good


def main() -> None:
    """Run what the options name."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="the GPU walk on the CPU with a tiny shape")
    parser.add_argument("--shapes", nargs="+", choices=[*GOAL], default=[*GOAL])
    parser.add_argument("--minutes", type=float, default=9.5)
    parser.add_argument(
        "--pack-tokens", type=int, default=16_384, help="of the GPU walk; 8192 for 7B in 80 GB"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trl-pack", type=int, default=256, choices=(256, 512, 1024, 2048))
    parser.add_argument("--trl-python")
    parser.add_argument("--compile", action="store_true", help="[train] compile = true on our side")
    options = parser.parse_args()
    sys.exit(0 if (on_gpu if options.gpu else on_cpu)(options) else 1)


if __name__ == "__main__":
    main()
