"""Measure how well `trainer audit` finds planted corrupt answers on the demo's corpus.

    python benchmarks/audit.py [--rows 4000] [--seeds 3] [--epochs 6] [--folds 2] [--share 0.1]

The corpus is that of `harvester demo`: the mock teacher, which errs in 5 % of its answers, harvested over
HTTP. A share of the rows gets the answer of another row of the same task. The seed decides which, and is that
of the training. AUROC is the chance that a corrupt row stands before another one (0.5: by chance alone),
in the order by the loss of a student that did not learn the row, and by that of the base. The same command
resumes.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from harvester.mock_teacher.running import start_in_thread  # noqa: E402
from harvester.mock_teacher.settings import MockSettings  # noqa: E402
from harvester.store.reader import Corpus  # noqa: E402
from harvester.store.shards.parquet_file import open_writer  # noqa: E402
from harvester.store.shards.schema import Sample, to_table  # noqa: E402
from trainer.config import load  # noqa: E402
from trainer.evaluation.audit import audit, auroc  # noqa: E402

HARVEST = """\
[teacher]
base_url = "{base_url}"
model = "mock-teacher"
terms = "mock-teacher"
[prompts]
files = ["prompts.jsonl"]
[sampling]
temperature = 0.0
max_tokens = 64
"""


def harvest(folder: Path, rows: int) -> Corpus:
    """Harvest the demo's prompts, the first `rows` of them; nothing that is stored is asked again."""
    folder.mkdir(parents=True, exist_ok=True)
    prompts = (ROOT / "prompts" / "skills-train.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = random.Random(0).sample(prompts, min(rows, len(prompts)))
    (folder / "prompts.jsonl").write_text("".join(f"{line}\n" for line in prompts), encoding="utf-8")
    with start_in_thread(MockSettings()) as mock:
        (folder / "harvest.toml").write_text(HARVEST.format(base_url=mock.base_url))
        if not (folder / "done").exists():
            words = [sys.executable, "-m", "harvester", "run", str(folder / "harvest.toml"), "--json"]
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
            (folder / "done").touch()
    return Corpus.open(folder / "store")


def corrupted(samples: Sequence[Sample], share: float, seed: int) -> tuple[list[Sample], set[str]]:
    """Give a share of the rows another answer of the same task; return all rows, and the keys of those."""
    draw = random.Random(seed)
    answers: defaultdict[str, list[str]] = defaultdict(list)
    for sample in samples:
        answers[str(sample.metadata.get("task"))].append(sample.completion or "")
    chosen = {sample.key for sample in draw.sample(list(samples), round(share * len(samples)))}
    rows = []
    for sample in samples:
        if sample.key in chosen:
            others = [text for text in answers[str(sample.metadata.get("task"))] if text != sample.completion]
            rows.append(replace(sample, completion=draw.choice(others)))
        else:
            rows.append(sample)
    return rows, chosen


def write_corpus(folder: Path, rows: Sequence[Sample], source: Corpus) -> None:
    """Write rows as a folder of one shard."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    with (
        (folder / "shards" / "00000.parquet").open("wb") as sink,
        open_writer(sink, list(source.lineages())) as writer,
    ):
        writer.write_table(to_table(rows).cast(writer.schema))


def audited(folder: Path, source: Corpus, seed: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Audit the corpus with corrupt answers of one seed; return the AUROC of each order."""
    samples = sorted(source.samples(), key=lambda sample: sample.prompt_id)
    rows, chosen = corrupted(samples, arguments.share, seed)
    write_corpus(folder / "corpus", rows, source)
    (folder / "train.toml").write_text(
        f"[student]\nbase = {json.dumps(str(ROOT / 'data' / 'base'))}\n"
        '[data]\ncorpus = "corpus"\neval_share = 0.0\n[lora]\nrank = 32\nalpha = 64\n'
        f"[train]\nepochs = {arguments.epochs}\nbatch_tokens = 2048\nmax_length = 256\nlr = 3e-3\n"
        f"lr_floor = 0.02\nseed = {seed}\nsave_every = 200\nthreads = {arguments.threads}\n"
        'device = "cpu"\n[out]\npath = "out"\nname = "mock-audit"\n'
    )
    result = audit(load(folder / "train.toml"), arguments.folds)
    lines = Path(result["file"]).read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    references = {sample.key: sample for sample in rows}
    is_planted = [row["key"] in chosen for row in found]
    is_wrong = [
        planted or (references[row["key"]].completion or "") != references[row["key"]].reference
        for planted, row in zip(is_planted, found, strict=True)
    ]
    return {
        "planted": auroc([row["unseen"] for row in found], is_planted),
        "every wrong answer": auroc([row["unseen"] for row in found], is_wrong),
        "planted, by the base's loss": auroc([row["before"] for row in found], is_planted),
        "planted among the worst tenth": sum(is_planted[: len(found) // 10]) / sum(is_planted),
    }


def main() -> None:
    """Print a line for each seed, and the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--folds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "audit")
    arguments = parser.parse_args()
    out = arguments.out / f"rows-{arguments.rows}"
    source = harvest(out / "harvest", arguments.rows)
    results = []
    for seed in range(arguments.seeds):
        started = time.monotonic()
        name = f"seed-{seed}-epochs-{arguments.epochs}-folds-{arguments.folds}-share-{arguments.share:g}"
        figures = audited(out / name, source, seed, arguments)
        results.append(figures)
        shown = ", ".join(f"{name} {value:.3f}" for name, value in figures.items())
        print(f"seed {seed}: AUROC {shown}; {time.monotonic() - started:.0f} s", flush=True)
    means = ", ".join(f"{name} {mean(each[name] for each in results):.3f}" for name in results[0])
    print(f"mean of {len(results)} seeds: AUROC {means}")


if __name__ == "__main__":
    main()
