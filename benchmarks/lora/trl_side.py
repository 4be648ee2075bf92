"""Run TRL's SFTTrainer on a task of `lora_task`: python trl_side.py TASK.json. Needs TRL's environment."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import lora_task
import torch
from datasets import Dataset
from transformers import AttentionInterface, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

WINDOW = 10  # steps a logged loss is the mean of
DEFAULT_BATCH = 8  # rows a step, TRL's own default


class Marks(TrainerCallback):
    def __init__(self, clock: lora_task.Clock) -> None:
        self.clock = clock

    def on_step_end(self, *_args: Any, **_kwargs: Any) -> None:
        self.clock.mark()


def varlen() -> str:
    """torch's variable-length kernel under transformers' attention interface, fed by TRL's own bounds;
    without a mask function, so that transformers neither builds a mask nor waits for the device."""
    from torch.nn.attention.varlen import varlen_attn

    takes = inspect.signature(varlen_attn).parameters

    def attend(
        _module: Any, query: Any, key: Any, value: Any, _mask: Any, scaling: Any = None, **extra: Any
    ) -> Any:
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        options: dict[str, Any] = {"scale": scaling}
        options |= {"window_size": (-1, 0)} if "window_size" in takes else {"is_causal": True}
        if "enable_gqa" in takes:
            options["enable_gqa"] = True
        else:
            repeats = q.shape[1] // k.shape[1]
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        at, longest = extra["cu_seq_lens_q"], extra["max_length_q"]
        return varlen_attn(q, k, v, at, at, longest, longest, **options)[None], None

    AttentionInterface.register("varlen_of_torch", attend)
    return "varlen_of_torch"


def packed(steps: list[list[list[lora_task.Document]]]) -> Dataset:
    """One row a pack, as TRL's own best-fit packing would hand it on."""
    rows: dict[str, list[Any]] = {"input_ids": [], "labels": [], "seq_lengths": []}
    for step in steps:
        for pack in step:
            rows["input_ids"].append([i for ids, _ in pack for i in ids])
            rows["labels"].append([x for ids, n in pack for x in [-100] * n + ids[n:]])
            rows["seq_lengths"].append([len(ids) for ids, _ in pack])
    return Dataset.from_dict(rows)


def plain(steps: list[list[list[lora_task.Document]]]) -> Dataset:
    """One row a document."""
    documents = [document for step in steps for pack in step for document in pack]
    return Dataset.from_dict(
        {
            "input_ids": [ids for ids, _ in documents],
            "completion_mask": [[0] * n + [1] * (len(ids) - n) for ids, n in documents],
        }
    )


def settings(task: lora_task.Task, packs_per_step: int) -> SFTConfig:
    shared: dict[str, Any] = {
        "output_dir": str(Path(task.folder) / "trl"),
        "max_steps": task.total,
        "learning_rate": task.lr,
        "seed": task.seed,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": task.device == "cpu",
        "logging_steps": WINDOW,
    }
    if task.variant == "defaults":
        return SFTConfig(**shared)
    return SFTConfig(
        **shared,
        packing=True,
        max_length=task.pack_tokens,
        dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=packs_per_step,
        gradient_checkpointing=False,
        bf16=False,  # the base is in the dtype it computes in; no autocast
        optim="adamw_torch_fused",
        adam_beta1=lora_task.BETAS[0],
        adam_beta2=lora_task.BETAS[1],
        lr_scheduler_type="constant",
        max_grad_norm=task.clip,
        torch_compile=task.compile,
    )


def main() -> None:
    task = lora_task.load(sys.argv[1])
    torch.set_num_threads(task.threads)
    steps = task.steps()
    attention = varlen() if task.attention == "varlen" else task.attention
    student = lora_task.adapted(task, lora_task.base(task, attention))
    first = lora_task.fingerprint(student)
    clock = lora_task.Clock(task.device)
    trainer = SFTTrainer(
        model=student,
        args=settings(task, len(steps[0])),
        train_dataset=plain(steps) if task.variant == "defaults" else packed(steps),
        processing_class=AutoTokenizer.from_pretrained(task.tokenizer, local_files_only=True),
        callbacks=[Marks(clock)],
    )
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    if task.variant == "defaults":
        documents = [document for step in steps for pack in step for document in pack]
        batches = [documents[i : i + DEFAULT_BATCH] for i in range(0, len(documents), DEFAULT_BATCH)]
        per_step = [counts([batch]) for batch in batches[: task.total]]
    else:
        per_step = [counts(step) for step in steps]
    print(lora_task.told(task, clock, losses, per_step, first))


def counts(step: list[list[lora_task.Document]]) -> tuple[int, int]:
    """Tokens that predict something, and supervised ones."""
    documents = [document for pack in step for document in pack]
    return sum(len(ids) - 1 for ids, _ in documents), sum(len(ids) - n for ids, n in documents)


if __name__ == "__main__":
    main()
