"""Measure the trainer's token store on corpora of a hundred thousand, one and ten million rows.

    python benchmarks/trainer_scale.py [--rows 100000 1000000] [--folder build/scale] [--keep] [--log-probs]
        [--memory-only] [--short] [--copied 10000]

Each corpus is made once: sealed shards of rows of about 120 tokens, a tenth of them held out. For each one:
`trainer plan` without a store in one process and in several, again with the store, `trainer train` with it
(two steps of the small student that this project ships; at its end it writes a hash of each row), and what a
training does before its first step when it starts again, less the same on a corpus of 100 rows. Baseline in
the same run: `datasets.Dataset.map` with the same template and tokenizer on the first 100,000 rows, in one
process and in several, which makes token ids and checks nothing. Seconds are wall time and, beside them, CPU
seconds of all processes: on a busy machine only these say much. Memory is the largest process's: its peak,
which counts the pages of files that it reads through mappings, its libraries above all, and the peak of the
rest (RssAnon, looked at every 20 ms). Prints one table and writes FOLDER/trainer_scale.json.
Ten million rows need 12 GB of disk.
With --log-probs the answers have log-probabilities of a teacher whose tokens are one or two characters, five
at each, and are learned with soft targets.
With --memory-only the evaluation and the audit follow, without their models: what they read and write, and
how their memory grows with the rows.
With --short answers are some characters long: what is measured of a row and not of a token is the same.
With --copied N, rows beyond the first N are stand-ins: copies of them under other keys and prompt ids, in
corpus and store (`copied_corpus`). Their tokens are those of N rows, and tokenising is not measured.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow as pa

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks import copied_corpus  # noqa: E402
from harvester.store.journal.records import RunRecord  # noqa: E402
from harvester.store.shards.parquet_file import ROWS_PER_GROUP, open_writer  # noqa: E402
from harvester.store.shards.schema import SCHEMA  # noqa: E402

ROWS_PER_SHARD = 50_000
BASELINE_ROWS = 100_000
START_ROWS = 100
# Bytes of what a failed program wrote that are shown.
_SHOWN_BYTES = 4000
TEACHER = "http://127.0.0.1:8000/v1|mock-teacher"
RUN = RunRecord(
    *("scale", 1_790_000_000.0, TEACHER),
    host="127.0.0.1:8000",
    model="mock-teacher",
    terms_id="mock-teacher",
    mock=True,
    config_sha256="",
    config_json="{}",
)
# `python -c` takes these as its program.
PLAN = "import sys; from trainer.__main__ import main; sys.argv = ['trainer', *sys.argv[1:]]; main()"
# What `trainer train` does before its first step: it also writes a hash of each learned row at its end.
START = """
import sys
from pathlib import Path
from trainer import config as settings
from trainer.training import train
train.read_inputs(settings.load(Path(sys.argv[1])))
"""
COPY_PARTS = """
import sys
from pathlib import Path
from benchmarks.copied_corpus import copy_parts
copy_parts(Path(sys.argv[1]), int(sys.argv[2]))
"""
ONE_PROCESS = "from trainer.data.tokens import builder; builder.PARALLEL_ROWS = 1 << 40; "
# What is read, held and written to evaluate and audit, without the models: answers and losses are made up.
EVALUATE = """
import sys
from contextlib import nullcontext
from pathlib import Path
import numpy as np
from trainer import config as settings
from trainer.evaluation import evaluate
from trainer.model.generate import Answer
class Student:
    def disable_adapter(self): return nullcontext()
    def merge_adapter(self): pass
def generate(_student, prompts, _limits, **_):
    return [Answer(tuple(prompt[-16:]), False) for prompt in prompts]
def measure(_student, examples, config):
    tokens = np.array([example.supervised for example in examples], dtype=float)
    binned = np.repeat(tokens[:, None] / evaluate.likelihood.BINS, evaluate.likelihood.BINS, axis=1)
    return evaluate.likelihood.Likelihood(tokens / 2, tokens, binned / 2, binned / 2, binned)
evaluate.generate.generate, evaluate.likelihood.measure = generate, measure
evaluate.model.load_trained_student = lambda *_: Student()
config = settings.load(Path(sys.argv[1]))
once = config.evaluate.model_copy(update={"speed_prompts": 0})
evaluate.evaluate(config.model_copy(update={"evaluate": once}))
"""
AUDIT = """
import sys
from pathlib import Path
import numpy as np
from trainer import config as settings
from trainer.evaluation import audit
def losses(answering, examples, config):
    return np.array([example.supervised for example in examples]) + np.arange(len(examples)) / len(examples)
audit.likelihood.losses = losses
audit.text_metrics.token_f1 = lambda *_: 0.5  # copied rows would be a hundred answers to each prompt
audit.model.load_base_of = lambda *_: None
print(audit.audit(settings.load(Path(sys.argv[1])), 0)["rows"])
"""
MAP = """
import json, sys
from pathlib import Path
from datasets import load_dataset
from trainer.model.model import load_tokenizer
folder, rows, processes = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
tokenizer = load_tokenizer(Path(sys.argv[4]))
files = sorted(str(path) for path in Path(folder).glob("*.parquet"))[: -(-rows // 50_000)]
data = load_dataset("parquet", data_files=files, split="train", cache_dir=sys.argv[5])
data = data.select_columns(["messages", "completion"]).select(range(rows))
def encode(batch):
    texts = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in batch["messages"]
    ]
    prompts = tokenizer(texts, add_special_tokens=False)["input_ids"]
    answers = tokenizer(batch["completion"], add_special_tokens=False)["input_ids"]
    return {"ids": [p + a for p, a in zip(prompts, answers)], "prompt_length": [len(p) for p in prompts]}
data.map(encode, batched=True, num_proc=processes, remove_columns=data.column_names)
"""


def row(number: int) -> tuple[str, str]:
    """Prompt and answer of one row, about 120 tokens with the template."""
    dice = random.Random(number)
    a, b = dice.randrange(10**6), dice.randrange(10**6)
    return (
        f"What is {a} + {b}? Add digit by digit ({number}).",
        f"{a} + {b}: with what is carried over, place by place from the right, that makes {a + b}.",
    )


def log_probs(answer: str) -> list[dict[str, Any]]:
    """The teacher's tokens of an answer, one and two characters in turn, each with five alternatives."""
    entries = []
    # Tokens of two characters alone would begin at half of the student's, which is too few to be learned.
    for at in sorted({*range(0, len(answer), 3), *range(1, len(answer), 3)}):
        piece = answer[at : at + 1 + at % 3]
        others = [f"{letter}{piece[1:]}" for letter in "abcde" if letter != piece[0]][:4]
        # Together 0.95: probabilities that sum to more than 1 are not learned.
        top = [
            {"token": t, "bytes": t.encode(), "logprob": -0.2 - 2.0 * n}
            for n, t in enumerate((piece, *others))
        ]
        entries.append({**top[0], "top": top})
    return entries


def table_of(numbers: range, *, has_log_probs: bool, is_short: bool) -> pa.Table:
    """Rows as a harvest stores them; short answers are the sum alone."""
    texts = [row(number) for number in numbers]
    if is_short:
        texts = [(prompt, answer.rpartition(" ")[2]) for prompt, answer in texts]
    values: dict[str, Any] = {
        "key": [copied_corpus.key_of(number) for number in numbers],
        "prompt_id": [copied_corpus.prompt_id_of(number) for number in numbers],
        "messages": [[{"role": "user", "content": prompt}] for prompt, _ in texts],
        "completion": [answer for _, answer in texts],
        "request_json": [
            json.dumps({"model": "mock", "messages": [{"role": "user", "content": prompt}]})
            for prompt, _ in texts
        ],
        "outcome": ["ok"] * len(texts),
        "finish_reason": ["stop"] * len(texts),
        "metadata_json": ["{}"] * len(texts),
        "teacher_id": [TEACHER] * len(texts),
        "request_model": ["mock-teacher"] * len(texts),
        "terms_id": ["mock-teacher"] * len(texts),
        "purpose": ["train"] * len(texts),
        "run_id": ["scale"] * len(texts),
        "mock": [True] * len(texts),
        "tags": [[]] * len(texts),
    }
    if has_log_probs:
        values["logprobs"] = [log_probs(answer) for _, answer in texts]
    defaults: dict[pa.DataType, Any] = {pa.string(): "", pa.binary(): b"", pa.bool_(): False}
    columns = []
    for field in SCHEMA:
        default = None if field.nullable else defaults.get(field.type, 0)
        column = values.get(field.name) or [default] * len(texts)
        columns.append(pa.array(column, field.type))
    return pa.table(columns, schema=SCHEMA)


def make_corpus(
    folder: Path, rows: int, *, has_log_probs: bool = False, is_short: bool = False, copied: int = 0
) -> None:
    """Write the shards of a corpus, unless they are there.

    Args:
        copied: rows of the one shard that is copied until there are `rows`; 0: all rows differ.
    """
    done = folder / "complete"
    if done.exists():
        return
    shutil.rmtree(folder, ignore_errors=True)
    if copied and rows > copied:
        make_corpus(folder, copied, has_log_probs=has_log_probs, is_short=is_short)
        done.unlink()
        copied_corpus.copy_shards(folder, rows, copied, RUN.lineage())
        return
    folder.mkdir(parents=True)
    for shard, begin in enumerate(range(0, rows, ROWS_PER_SHARD), start=1):
        hidden = folder / "shard.tmp"
        with hidden.open("wb") as sink, open_writer(sink, [RUN.lineage()]) as writer:
            end = min(begin + ROWS_PER_SHARD, rows)
            for first in range(begin, end, ROWS_PER_GROUP):
                some = range(first, min(first + ROWS_PER_GROUP, end))
                writer.write_table(
                    table_of(some, has_log_probs=has_log_probs, is_short=is_short).cast(writer.schema)
                )
        digest = hashlib.sha256(hidden.read_bytes()).hexdigest()
        hidden.rename(folder / f"part-{shard:08d}-{digest[:16]}.parquet")
    done.touch()


def write_toml(folder: Path, corpus: Path, base: Path, soft_targets: str) -> Path:
    """Write the configuration of a training of two steps."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "train.toml"
    path.write_text(
        f'[student]\nbase = "{base}"\n[data]\ncorpus = "{corpus}"\ncache = "{folder / "cache"}"\n'
        '[train]\nepochs = 1\nmax_steps = 2\nlog_every = 1\ndevice = "cpu"\nmax_length = 256\n'
        f'soft_targets = "{soft_targets}"\n'
        f'[out]\npath = "{folder / "out"}"\n'
    )
    return path


def measured(program: str, *arguments: object) -> dict[str, float]:
    """Run a Python program; return its wall and CPU seconds, and the memory of its largest process.

    Raises:
        SystemExit: it failed; with its exit code and the end of what it wrote.
    """
    started = time.monotonic()
    command = [sys.executable, "-c", program, *map(str, arguments)]
    with tempfile.TemporaryFile() as output:
        actions = [(os.POSIX_SPAWN_DUP2, output.fileno(), 1)]
        if os.environ.get("QUIET", "1") == "1":
            actions.append((os.POSIX_SPAWN_DUP2, output.fileno(), 2))
        process = os.posix_spawn(
            sys.executable, command, {**os.environ, "PYTHONPATH": str(ROOT)}, file_actions=actions
        )
        own = 0
        while not (ended := os.wait4(process, os.WNOHANG))[0]:
            own = max(own, *map(own_kib, family(process)))
            time.sleep(0.02)  # the interval of the measurement
        _, status, usage = ended
        if status:
            output.seek(max(0, output.seek(0, os.SEEK_END) - _SHOWN_BYTES))
            written = output.read().decode(errors="replace").replace("\r", "\n")
            code = os.waitstatus_to_exitcode(status)
            raise SystemExit(f"{' '.join(map(str, arguments))} failed: {code}\n{written}")
    return {
        "wall_s": time.monotonic() - started,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "mib": usage.ru_maxrss / 1024,
        "own_mib": own / 1024,
    }


def family(process: int) -> list[int]:
    """Return a process and its descendants, without those that have just ended."""
    found = [process]
    for parent in found:
        with suppress(OSError):
            for children in Path(f"/proc/{parent}/task").glob("*/children"):
                found += map(int, children.read_text().split())
    return found


def own_kib(process: int) -> int:
    """Return the memory of a process that no file backs (RssAnon); 0 if it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1])
    return 0


def scale(folder: Path, rows: int, processes: int, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one size."""
    copied = options.copied if rows > options.copied else 0
    kind = ("-log-probs" if options.log_probs else "") + ("-short" if options.short else "")
    kind += "-copied" if copied else ""
    corpus, work = folder / f"corpus-{rows}{kind}", folder / f"work-{rows}{kind}"
    make_corpus(corpus, rows, has_log_probs=options.log_probs, is_short=options.short, copied=copied)
    toml = write_toml(work, corpus, options.base, "auto" if options.log_probs else "off")
    results: dict[str, Any] = {"rows": rows, "copied": bool(copied)}

    def run(name: str, program: str, *arguments: object) -> None:
        results[name] = measured(program, *arguments)
        print(f"{rows:>10,} rows  {name:<28}" + seconds(results[name]), flush=True)

    plan = ("plan", toml, "--probe", 0)
    if not options.memory_only and not copied and rows <= 1_000_000:
        shutil.rmtree(work / "cache", ignore_errors=True)
        run("plan, one process", ONE_PROCESS + PLAN, *plan)
    if copied:
        # What chooses rows is measured, not what makes the parts.
        measured(COPY_PARTS, toml, copied)
        for selections in (work / "cache").glob("*/selections"):
            shutil.rmtree(selections)
        run("plan, parts there", PLAN, *plan)
    else:
        shutil.rmtree(work / "cache", ignore_errors=True)
        run(f"plan, {processes} processes", PLAN, *plan)
    run("plan, second", PLAN, *plan)
    if rows <= 1_000_000:
        shutil.rmtree(work / "out", ignore_errors=True)
        run("train, two steps", PLAN, "train", toml)
        run("second start", START, toml)
        if options.memory_only:
            run("evaluate, without models", EVALUATE, toml)
            shutil.rmtree(work / "out", ignore_errors=True)
            run("audit, without models", AUDIT, toml)
    results["store_mib"] = sum(p.stat().st_size for p in (work / "cache").rglob("*") if p.is_file()) / 2**20
    if not options.keep:
        shutil.rmtree(work)
        if rows != BASELINE_ROWS or copied:
            shutil.rmtree(corpus)
    return results


def seconds(result: dict[str, float]) -> str:
    """Write a measurement as text."""
    return (
        f"{result['wall_s']:9.1f} s wall {result['cpu_s']:9.1f} s CPU {result['mib']:8,.0f} MiB, "
        f"{result['own_mib']:,.0f} without files"
    )


def main() -> None:
    """Measure all sizes and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="+", default=[BASELINE_ROWS, 1_000_000])
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "scale")
    parser.add_argument("--base", type=Path, default=ROOT / "data" / "base")
    parser.add_argument("--keep", action="store_true", help="keep the corpora")
    parser.add_argument("--log-probs", action="store_true", help="answers have log-probabilities")
    parser.add_argument("--short", action="store_true", help="answers of seven characters")
    parser.add_argument("--memory-only", action="store_true", help="no baseline, no plan by one process")
    parser.add_argument("--copied", type=int, default=0, metavar="ROWS", help="copy these rows for the rest")
    options = parser.parse_args()
    folder, processes = options.folder.resolve(), len(os.sched_getaffinity(0))
    print(f"load {os.getloadavg()[0]:.1f}, {processes} cores", flush=True)
    results: dict[str, Any] = {"load": os.getloadavg(), "cores": processes, "baseline": {}, "sizes": []}
    if not options.memory_only:
        make_corpus(folder / f"corpus-{BASELINE_ROWS}", BASELINE_ROWS)
    for count in () if options.memory_only else sorted({1, processes}):
        cache = folder / "datasets"
        shutil.rmtree(cache, ignore_errors=True)
        arguments = (folder / f"corpus-{BASELINE_ROWS}", BASELINE_ROWS, count, options.base, cache)
        results["baseline"][count] = result = measured(MAP, *arguments)
        print(f"{BASELINE_ROWS:>10,} rows  datasets.map, {count} processes   " + seconds(result), flush=True)
        shutil.rmtree(cache, ignore_errors=True)
    for rows in [START_ROWS, *options.rows]:
        size = scale(folder, rows, processes, options)
        results["sizes"].append(size)
        (folder / "trainer_scale.json").write_text(json.dumps(results, indent=1) + "\n")
    print_ratios(results, processes)
    if not options.keep:
        shutil.rmtree(folder / f"corpus-{BASELINE_ROWS}", ignore_errors=True)


def print_ratios(results: dict[str, Any], processes: int) -> None:
    """Print rates against the baseline, speed-up, second starts, and memory against the size before."""
    smallest, *sizes = results["sizes"]
    before: dict[str, Any] = {}
    for size in sizes:
        rows, many = size["rows"], size.get(f"plan, {processes} processes")
        facts = []
        if many is not None:
            facts.append(f"{rows / many['wall_s']:,.0f} rows/s")
            if baseline := results["baseline"].get(processes):
                base = baseline["wall_s"] / BASELINE_ROWS
                facts.append(f"{many['wall_s'] / rows / base:.2f} times the seconds of datasets.map")
            if (one := size.get("plan, one process")) is not None:
                facts.append(f"{one['wall_s'] / many['wall_s']:.2f} x one process")
        if (start := size.get("second start")) is not None:
            more, of_cpu = (start[name] - smallest["second start"][name] for name in ("wall_s", "cpu_s"))
            facts.append(f"second start +{more:.1f} s, CPU +{of_cpu:.1f} s over {START_ROWS} rows")
        print(f"{rows:>10,} rows: {'; '.join(facts)}; store {size['store_mib']:,.0f} MiB")
        for name, result in size.items():
            if isinstance(result, dict) and name in before:
                ratio = result["mib"] / before[name]["mib"]
                print(f"{'':>10}  {name}: {ratio:.3f} times the memory of {before['rows']:,} rows")
        before = size


if __name__ == "__main__":
    main()
