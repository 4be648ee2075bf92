"""Take every causal language model of transformers that can be built tiny through every command.

Run as `python -m tests.trainer.architectures.sweep TABLE RESULTS`. Each class is built from its default
configuration with small sizes, or from the tiny one of `families`, and goes through plan, doctor, train,
evaluate and export in a process of its own, with limits of time and memory. RESULTS is a JSON file that gets
each result as soon as it is there: a sweep that was interrupted continues from it. TABLE is the Markdown
file that the docs show; it is written from all results.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.trainer import tiny
from tests.trainer.architectures import bases, families
from tests.trainer.architectures.verbs import (
    VERBS,
    generates_by_its_own_forward,
    plain_peft_difference,
    run_verb,
)
from trainer import config as settings

# Commands import these when they run. Imported here, they are loaded once and not in each child.
from trainer.data import chat_template, dataset  # noqa: F401
from trainer.errors import StudentError
from trainer.evaluation import doctor, evaluate  # noqa: F401
from trainer.model.self_test import NO_COPY, check_architecture
from trainer.model.tiny_copy import tiny_copy
from trainer.publish import export  # noqa: F401
from trainer.training import plan, train  # noqa: F401

# Limits of one class: seconds of CPU time, seconds on a busy machine, and bytes of address space beyond what
# the parent process has.
CPU_LIMIT_S = 120
TIME_LIMIT_S = 1200.0
MEMORY_LIMIT = 16 << 30

# Largest difference of a logit between our student and plain PEFT's.
MAX_DIFFERENCE = 1e-4

# Exit codes of a refusal in words: a fatal fault (doctor), or a student that can't be used.
REFUSALS = (1, 2)

_UNPACKED = "rows are not packed, each document has its own: "

HEADING = """# Which students work

Written by `make architectures`, measured with transformers {version} and torch {torch} on the CPU. Each row
is a causal language model of transformers with random weights and small sizes, taken through plan, doctor,
train, evaluate and export.

- **works**: all five commands succeed, plain PEFT loads the adapter with equal logits, the self-test finds
  that rows are computed as the model's own forward computes each document alone, and answers generated in a
  batch are those of each prompt alone. For a family marked with * `make test-families` compares the loss and
  its gradient too.
- **refused**: every command refuses it with the reason in the last column.
- **not built**: no small model can be made, so nothing is known. A base of this kind is tested when it is
  loaded, by plan and doctor too, and refused if it fails.
- **broken**: some commands succeed before another one refuses it, with the reason in the last column.
- **not finished**: the test takes too long. A base of this kind is tested when it is loaded, too.

"packed": many documents in one row. "unpacked": one document a row with the model's own attention, which
costs padding. "in chunks": the loss never holds the logits of all tokens.

{counts}

| model type | result | rows | output layer in chunks | reason |
|--|--|--|--|--|
"""

_ROTARY = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}

# Values without which the default configuration of a class is not valid; published models have them.
VALUES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROTARY, "sliding_attention": _ROTARY}},
    "dbrx": {
        "attn_config": {"clip_qkv": 8, "kv_n_heads": 8, "rope_theta": 500000.0},
        "ffn_config": {"ffn_hidden_size": 3584, "moe_num_experts": 16, "moe_top_k": 4},
    },
    "hunyuan_v1_moe": {"head_dim": 128, "num_experts": 4, "moe_topk": 2},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
}

Result = dict[str, Any]


def names() -> list[str]:
    """Return the model types of transformers' causal language models, and our families."""
    return sorted({*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *families.FAMILIES})


def write_base(name: str, folder: Path) -> None:
    """Write a tiny random base with a tokenizer.

    Raises:
        Exception: the class can't be built; every class raises its own kinds.
    """
    if name in families.FAMILIES:
        bases.write_base(folder, name)
        return
    speech = tiny.tokenizer()
    config = transformers.CONFIG_MAPPING[name](**VALUES.get(name, {}))
    for part in (config, config.get_text_config(decoder=True)):
        for token, number in (("pad", 0), ("bos", 1), ("eos", 2)):  # the row of a padding token is zero
            if hasattr(part, f"{token}_token_id"):
                setattr(part, f"{token}_token_id", number)
    made = tiny_copy(config, vocabulary=len(speech))
    made.save_pretrained(folder)
    if type(made.config) not in MODEL_FOR_CAUSAL_LM_MAPPING:  # a text part that is found in its whole only
        config.text_config = made.config
        config.save_pretrained(folder)
    speech.save_pretrained(folder)


def examine(name: str, folder: Path) -> Result:
    """Build the class and run every command; return the row of the table."""
    path = bases.toml_without_base(folder, train={"log_every": 1}, evaluate={"max_new_tokens": 4})
    try:
        write_base(name, folder / "base")
    except Exception as error:
        return {"result": "not built", "reason": _first_line(error)}
    ended = {verb: run_verb(verb, path) for verb in VERBS}
    codes = {verb: code for verb, (code, _) in ended.items()}
    odd = [verb for verb, (code, err) in ended.items() if "Traceback" in err or code not in (0, *REFUSALS)]
    if odd:
        return {"result": "broken", "reason": f"{odd[0]}: {ended[odd[0]][1].strip().splitlines()[-1]}"}
    if all(code in REFUSALS for code in codes.values()):
        return {"result": "refused", "reason": _reason(ended["train"][1])}
    if any(codes.values()):
        failed = next(verb for verb, code in codes.items() if code)
        return {"result": "broken", "reason": f"{failed} only: {_reason(ended[failed][1])}"}
    difference = plain_peft_difference(path)
    if not difference <= MAX_DIFFERENCE:
        return {"result": "broken", "reason": f"plain PEFT's logits differ by {difference:.2g}"}
    if not generates_by_its_own_forward(path):
        return {"result": "broken", "reason": "a batch of prompts gets other answers than each prompt alone"}
    return {"result": "works", **_layout(settings.load(path))}


def _layout(config: settings.TrainConfig) -> Result:
    try:
        forward = check_architecture(config.base)
    except StudentError as error:
        return {"rows": "?", "reason": error.message}
    if forward is None:
        return {"rows": "unpacked", "reason": NO_COPY}
    return {
        "rows": "packed" if forward.layout.packed else "unpacked",
        "head": forward.head is not None,
        "reason": forward.note.removeprefix(_UNPACKED).rpartition(". ")[0],
    }


def _reason(err: str) -> str:
    lines = [line for line in err.splitlines() if line.startswith("error[")]
    return (lines or err.strip().splitlines() or ["?"])[-1].partition(": ")[2]


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:120]}"


def _child(name: str, path: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        try:
            size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
            limit = size * resource.getpagesize() + MEMORY_LIMIT
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_LIMIT_S, CPU_LIMIT_S))
            result = examine(name, Path(folder))
        except BaseException as error:
            result = {"result": "broken", "reason": _first_line(error)}
    path.write_text(json.dumps(result), encoding="utf-8")


def examine_in_a_process(name: str) -> Result:
    """Run `examine` in a child process under its limits."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result.json"
        child = multiprocessing.get_context("fork").Process(target=_child, args=(name, path))
        started = time.monotonic()
        child.start()
        child.join(TIME_LIMIT_S)
        if child.is_alive():
            child.kill()
            child.join()
            return {"result": "not finished", "reason": f"takes longer than {TIME_LIMIT_S:.0f} s"}
        if not path.exists():
            return {"result": "broken", "reason": f"the process ended with exit code {child.exitcode}"}
        return {**json.loads(path.read_text(encoding="utf-8")), "s": round(time.monotonic() - started, 1)}


def versions() -> dict[str, str]:
    """Return the versions that a result holds for."""
    return {"version": transformers.__version__, "torch": torch.__version__.partition("+")[0]}


def read_results(path: Path) -> dict[str, Result]:
    """Return the results so far; none if they were measured with other versions."""
    if not path.exists():
        return {}
    stored = json.loads(path.read_text(encoding="utf-8"))
    return dict(stored["results"]) if stored["versions"] == versions() else {}


def write_results(path: Path, results: dict[str, Result]) -> None:
    """Replace the file of results as a whole, so that an interruption leaves the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    text = json.dumps({"versions": versions(), "results": results}, indent=1, sort_keys=True)
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(path)


def table(results: dict[str, Result]) -> str:
    """Return the Markdown file."""
    counts = {r: sum(each["result"] == r for each in results.values()) for r in _RESULTS}
    lines = [HEADING.format(**versions(), counts=", ".join(f"{n} {r}" for r, n in counts.items() if n) + ".")]
    for name, result in sorted(results.items()):
        mark = f"{name} *" if name in families.FAMILIES else name
        head = {True: "yes", False: "no", None: ""}[result.get("head")]
        cells = (mark, result["result"], result.get("rows", ""), head, result["reason"].replace("|", "/"))
        lines.append(f"| {' | '.join(cells)} |\n")
    return "".join(lines)


_RESULTS = ("works", "refused", "not built", "not finished", "broken")


def main(table_path: Path, results_path: Path, only: list[str]) -> int:
    """Examine every class that has no result yet (or those named), and write the table.

    Returns:
        1 if a class is neither working nor refused in words.
    """
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    tiny.tokenizer()  # loads more, once
    results = read_results(results_path)
    wanted = only or [name for name in names() if name not in results]
    for number, name in enumerate(wanted, 1):
        results[name] = examine_in_a_process(name)
        write_results(results_path, results)
        print(f"{number}/{len(wanted)} {name}: {results[name]}", flush=True)
    table_path.write_text(table(results), encoding="utf-8")
    return int(any(result["result"] == "broken" for result in results.values()))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
