"""Make a tiny student and small corpora without files of others or downloads."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from harvester.store.shards import schema
from harvester.store.shards.parquet_file import open_writer
from harvester.terms.lineage import Lineage

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ("<|pad|>", "<|im_start|>", "<|im_end|>", "<s>", "</s>", "<|eot_id|>", "<end_of_turn>")


def tokenizer(
    template: str | None = CHATML, *, eos: str = "<|im_end|>", more: Sequence[str] = (), **special: Any
) -> Any:
    """A byte-level BPE tokenizer of 320 ids with control tokens, `more` of them where they are wanted."""
    specials = [*SPECIALS, *more]
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    wanted = trainers.BpeTrainer(
        vocab_size=320, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(["say the word backwards, please"] * 4, wanted)
    settings = {"eos_token": eos, "pad_token": "<|pad|>", **special}
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made,
        extra_special_tokens=[s for s in specials if s not in settings.values()],
        **settings,
    )
    fast.chat_template = template
    return fast


def base(
    folder: Path, *, template: str | None = CHATML, seed: int = 0, speech: Any = None, **shape: Any
) -> Path:
    """A Llama-shaped student of some 60k parameters, saved where `student.base` can point.

    Without a tokenizer of its own it is a copy: each kind is built once in a test process.
    """
    if speech is not None:
        return _build(folder, speech, seed, shape)
    built, random_state = _built(template, seed, tuple(sorted(shape.items())))
    # Not the times of the files: what remembers a file by them would take a base for an earlier one.
    shutil.copytree(built, folder, copy_function=shutil.copyfile, dirs_exist_ok=True)
    torch.set_rng_state(random_state)
    return folder


@cache
def _built(template: str | None, seed: int, shape: tuple[tuple[str, Any], ...]) -> tuple[Path, torch.Tensor]:
    """Build a base, and return it with the state in which that leaves torch's generator."""
    folder = Path(tempfile.mkdtemp(prefix="base-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _build(folder, tokenizer(template), seed, dict(shape))
    return folder, torch.get_rng_state()


def _build(folder: Path, speech: Any, seed: int, shape: dict[str, Any]) -> Path:
    torch.manual_seed(seed)
    settings = {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": True,
    }
    config = LlamaConfig(
        vocab_size=len(speech), max_position_embeddings=256, eos_token_id=2, **{**settings, **shape}
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    speech.save_pretrained(folder)
    return folder


def sample(number: int, prompt: str, completion: str | None, **more: Any) -> schema.Sample:
    """A row as the harvester would have stored it."""
    row: dict[str, Any] = {
        "key": f"{number:064x}",
        "prompt_id": f"p{number}",
        "messages": [{"role": "user", "content": prompt}],
        "completion": completion,
        "outcome": "ok",
        "finish_reason": "stop",
        "reference": completion,
        "teacher_id": "http://127.0.0.1/v1|mock",
        "terms_id": "mock-teacher",
        "mock": True,
        "run_id": "run-1",
        **more,
    }
    return schema.Sample(**row)


def skill(count: int, *, held_out: int = 0) -> list[schema.Sample]:
    """`count` prompts to learn and `held_out` to judge with: say a short word backwards."""
    rows = []
    for i in range(count + held_out):
        word = "".join("abcdefgh"[(i // 8**k) % 8] for k in range(4))
        split = "train" if i < count else "held_out"
        meta = f'{{"task": "reverse", "split": "{split}"}}'
        rows.append(sample(i, f"backwards: {word}", word[::-1], metadata_json=meta))
    return rows


def lineage(**changes: Any) -> dict[str, Any]:
    """Who taught: the mock teacher, under its own record."""
    return {
        "run_id": "run-1",
        "teacher_id": "http://127.0.0.1/v1|mock",
        "host": "127.0.0.1",
        "model": "mock-teacher",
        "terms_id": "mock-teacher",
        "permission_sha256": "",
        "purpose": "train",
        "mock": True,
        "duties": [],
        **changes,
    }


def corpus(
    folder: Path, rows: Iterable[schema.Sample], lineages: Sequence[dict[str, Any]] | None = None
) -> Path:
    """Shards in a folder."""
    shards = folder / "shards"
    shards.mkdir(parents=True, exist_ok=True)
    stored = [lineage()] if lineages is None else lineages
    with (
        (shards / "00000.parquet").open("wb") as sink,
        open_writer(sink, [Lineage(each) for each in stored]) as writer,
    ):
        writer.write_table(schema.to_table(rows).cast(writer.schema))
    return folder


def train_toml(folder: Path, rows: Sequence[schema.Sample], **sections: dict[str, Any]) -> Path:
    """A folder with base, corpus and train.toml, ready for `trainer train`."""
    base(folder / "base")
    corpus(folder / "store", rows)
    facts: dict[str, dict[str, Any]] = {
        "student": {"base": "base"},
        "data": {"corpus": "store"},
        "lora": {"rank": 4, "alpha": 8},
        "train": {
            "epochs": 1,
            "batch_tokens": 256,
            "max_length": 128,
            "lr": 1e-2,
            "threads": 1,
            "device": "cpu",
        },
        "out": {"path": "out"},
    }
    for name, values in sections.items():
        facts[name] = {**facts.get(name, {}), **values}
    path = folder / "train.toml"
    lines = []
    for name, values in facts.items():
        lines.append(f"[{name}]")
        lines += [f"{key} = {_toml(value)}" for key, value in values.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_toml, value))}]"
    return repr(value) if isinstance(value, (int, float)) else f'"{value}"'
