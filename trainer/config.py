"""Read train.toml into frozen values. An unknown key is an error that names the nearest known key.

Relative paths start from the file's folder, so a folder can be moved as a whole.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    field_validator,
    model_serializer,
    model_validator,
)

from harvester.errors import ConfigError as HarvestConfigError
from harvester.quality.held_out import DEFAULT_EVAL_SHARE
from harvester.quality.verifiers.settings import VerifySection
from harvester.system.objects.url import refusals_of_a_setting, require_path_or_url, url_in
from harvester.system.toml_file import Matching, read_toml, suggest_key, validate
from trainer.errors import ConfigError

Positive = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0)]
# The packs of every epoch are counted before the first step.
MOST_EPOCHS = 10_000
Share = Annotated[float, Field(ge=0, lt=1)]
Every = (
    Annotated[int, Field(ge=0)]
    | Annotated[str, Matching("([1-9][0-9]?|100)%", 'a share of all steps from "1%" to "100%"')]
)

# Default tokens of a pack on the CPU. Measured on two cores with a 1M-parameter student: 512 -> 18k tokens/s,
# 2,048 -> 25k tokens/s.
PACK_TOKENS = 2048

# Default tokens of a pack on CUDA. A pack of a 24-layer student takes about 4,200 kernel launches whatever
# its size (counted: 4,231 at 2,048 tokens, 4,418 at 16,384): with small packs the device waits for the host.
CUDA_PACK_TOKENS = 16_384

# Default peak learning rate where all weights are trained: a tenth of an adapter's, whose weights begin at
# zero. Published recipes for small models take 1e-5 to 2e-5.
FULL_LR = 2e-5

_LEAST = "a train.toml needs [student] base and [data] corpus"


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    # Keys that a dump leaves out at their default: trainings and hashes of earlier versions don't know them.
    later_keys: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_unused_later_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        dumped: dict[str, Any] = handler(self)
        fields = type(self).model_fields
        unused = (key for key in self.later_keys if getattr(self, key) == fields[key].default)
        for key in unused:
            dumped.pop(key, None)
        return dumped


class StudentSection(_Frozen):
    """Configure the local model to tune: a folder with safetensors weights, tokenizer and chat template.

    Attributes:
        base: folder of a transformers model: config.json, tokenizer, chat template, *.safetensors.
        template: file with a chat template to use instead of the folder's own. A training can only be
            resumed with the same template.
        sha256: expected hash of the base (`trainer plan` prints it); another base is refused. Empty: any.
        quantise: keep the linear layers of the base's decoder in 4 bits, NF4 with quantised scales (QLoRA,
            arXiv 2305.14314; extra `qlora`). The adapter is trained on these rounded weights and belongs to
            them. The whole base passes through the host's memory once.
    """

    later_keys: ClassVar[frozenset[str]] = frozenset({"quantise"})

    base: str = Field(min_length=1)
    template: str = ""
    sha256: Annotated[str, Matching("([0-9a-f]{64})?", "must be 64 hexadecimal digits")] = ""
    quantise: Literal["none", "nf4"] = "none"


class DataSection(_Frozen):
    """Configure which samples are learned.

    Attributes:
        corpus: a store folder, any folder of shards, or the URL of a published store
            (`s3://bucket/prefix`).
        split_field: metadata field with a row's split. Only rows with "train" are learned; the others are
            held out for evaluation. Names such as "Train" or "trian" are noted with their rows.
        eval_share: share (0 to 1) of the prompts without a split that is held out. The choice depends on
            the prompt's content only.
        truncated: what to do with rows cut by the teacher's token limit: leave them out, or learn them
            without an end of turn.
        reasoning: what to do with the teacher's reasoning: drop it, put it inline before the answer in
            think tags, or keep it in the place that the student's template has for it.
        where: which rows are read, held-out ones too, by run, configuration, model, system prompt, sampling,
            tags or outcome: a table, or the inside of its braces as text. Absent: all.
        answers: which answers of a prompt are learned: all; the best one (passed before unverifiable before
            failed by `[verify]`, then the one that most others agree with); those that pass `[verify]`; or
            those equal to the most frequent one, once normalised.
        per_prompt: most answers of a prompt that are learned, the first or the best ones. Absent: all that
            `answers` leaves, and 1 for "best".
        cache: folder for the token store of a large corpus, which several configurations may share. Empty:
            `tokens` in `[out] path`.
        weights: how much a row counts in the loss: each row alike; each prompt alike, so that its rows share
            its weight; or by the share of the prompt's answers that agree with the row's.
    """

    corpus: str = Field(min_length=1)
    cache: str = ""
    split_field: str = "split"
    eval_share: Share = DEFAULT_EVAL_SHARE
    truncated: Literal["exclude", "unterminated"] = "exclude"
    reasoning: Literal["drop", "inline", "keep"] = "drop"
    where: str | dict[str, Any] = ""
    answers: Literal["all", "best", "verified", "majority"] = "all"
    per_prompt: PositiveInt | None = None
    weights: Literal["row", "prompt", "agreement"] = "row"

    @field_validator("corpus")
    @classmethod
    def _is_path_or_url(cls, value: str) -> str:
        with refusals_of_a_setting():
            require_path_or_url(value)
        return value

    @field_validator("where")
    @classmethod
    def _is_condition(cls, value: str | dict[str, Any]) -> str | dict[str, Any]:
        from harvester.store.where import Where  # loads Arrow

        if value:
            try:
                Where.parse(value)
            except HarvestConfigError as error:
                raise ValueError("; ".join(filter(None, (error.message, error.remedy)))) from None
        return value


class LoraSection(_Frozen):
    """Configure the LoRA adapter (Hu et al. 2021, arXiv 2106.09685). Names follow PEFT.

    Attributes:
        rank: inner dimension r of the adapter.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: probability of dropping an input of A.
        target: names of linear layers, or all of them except the output layer.
        rslora: scale by alpha / sqrt(rank) instead (arXiv 2312.03732).
        dora: decompose weights into magnitude and direction (arXiv 2402.09353).
        plus_ratio: learning rate of B divided by that of A (LoRA+, arXiv 2402.12354).
        trainable_tokens: tokens whose rows of embedding and output layer are trained too, such as control
            tokens that the base never learned.
        modules_to_save: modules that are trained as a whole and saved with the adapter, by the last part of
            their name, such as "embed_tokens" and "lm_head" for new tokens. Where input and output share one
            weight, "embed_tokens" trains that.
    """

    later_keys: ClassVar[frozenset[str]] = frozenset({"modules_to_save"})

    rank: PositiveInt = 32
    alpha: Positive = 64
    dropout: Share = 0.0
    target: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    rslora: bool = False
    dora: bool = False
    plus_ratio: Positive = 1.0
    trainable_tokens: tuple[str, ...] = ()
    modules_to_save: tuple[str, ...] = ()


class TrainSection(_Frozen):
    """Configure the training loop.

    Attributes:
        method: what is trained: a LoRA adapter, or "full": all weights of a small student, in fp32. Then the
            output is the folder of a model, and `[lora]` has no part.
        epochs: passes over the data.
        max_steps: optimiser steps at most; the learning rate falls over these. Absent: those of all epochs.
        batch_tokens: tokens of one optimiser step, prompts and completions together.
        pack_tokens: tokens of one forward pass; a step is one or more packs. Absent: 2,048 on the CPU,
            16,384 on CUDA; never more than a step or less than `max_length`.
        max_length: tokens of the longest example; longer ones are left out and counted. So are those that the
            base has no positions for (GPT-2, OPT).
        lr: peak learning rate of A; that of B is `[lora] plus_ratio` times as high. With `method = "full"` it
            is that of all weights, and 2e-5 where it is left out.
        warmup: share of all steps during which the learning rate rises.
        schedule: how the learning rate falls after the warm-up.
        lr_floor: learning rate at the end of the cosine schedule, as a share of the peak.
        weight_decay: AdamW's weight decay of the adapter.
        clip: largest L2 norm of the gradient; a larger gradient is scaled down.
        seed: seed of the order of the rows, of A and of dropout.
        log_every: steps between two lines of the log.
        log_every_s: seconds after which a line is written all the same; 0: lines go by steps only.
        trackers: write the figures for "wandb" (offline, extra `wandb`) or "mlflow" (a SQLite file, extra
            `mlflow`), too. Nothing is sent. TensorBoard's files are written wherever it is installed;
            "tensorboard" demands that it is.
        save_every: steps between checkpoints; 0: only one at the end.
        checkpointing: recompute activations in the backward pass to save memory; "planned": only if the
            estimate says that they would not fit.
        shard: split the base's layers over the processes (FSDP2); "planned": only if the base would take
            more than half of a device.
        compile: use torch.compile for the layers and the loss, of students whose rows are packed. The first
            step is slow, and results differ in the last bits.
        deterministic: on CUDA, use kernels that give the same bits each time: slower, but a training that was
            resumed then ends as one that was not. On the CPU that always holds.
        soft_targets: learn the teacher's probabilities, too, where rows have log-probabilities ("auto").
        soft_weight: share of the KL divergence in the loss of a token with soft targets; the rest is
            cross-entropy. The log has this loss; the held-out loss stays cross-entropy.
        soft_temperature: temperature of both distributions, over the listed tokens and the tail. A higher
            one raises what is improbable. The tail counts as one token, so it is an approximation above 1.
        soft_tail: keep the probability of unlisted tokens as one more event, or renormalise the listed ones.
            The latter is biased: the student becomes more certain than the teacher is.
        threads: CPU threads of each process; 0: the cores that may be used, divided among the processes.
        device: where to train; "fastest" is CUDA if present, else the CPU.
    """

    later_keys: ClassVar[frozenset[str]] = frozenset({"method", "trackers"})

    method: Literal["lora", "full"] = "lora"
    epochs: Annotated[int, Field(gt=0, le=MOST_EPOCHS)] = 3
    max_steps: PositiveInt | None = None
    batch_tokens: PositiveInt = 16_384
    pack_tokens: PositiveInt | None = None
    max_length: PositiveInt = 2048
    lr: Positive = 2e-4
    warmup: Share = 0.03
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    lr_floor: Share = 0.1
    weight_decay: float = Field(default=0.0, ge=0)
    clip: Positive = 1.0
    seed: int = Field(default=0, ge=0)
    log_every: PositiveInt = 10
    log_every_s: float = Field(default=30.0, ge=0)
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    save_every: int = Field(default=200, ge=0)
    threads: int = Field(default=0, ge=0)
    device: Literal["cpu", "cuda", "fastest"] = "fastest"
    checkpointing: Literal["never", "always", "planned"] = "planned"
    shard: Literal["never", "always", "planned"] = "planned"
    compile: bool = False
    deterministic: bool = False
    soft_targets: Literal["off", "auto"] = "off"
    soft_weight: Annotated[float, Field(gt=0, le=1)] = 0.5
    soft_temperature: Positive = 1.0
    soft_tail: Literal["bucket", "renormalise"] = "bucket"

    @model_validator(mode="before")
    @classmethod
    def _all_weights_learn_slowly(cls, given: Any) -> Any:
        """Fill in the peak learning rate of a full fine-tuning, where none is given."""
        if isinstance(given, Mapping) and given.get("method") == "full" and "lr" not in given:
            return {**given, "lr": FULL_LR}
        return given

    @model_validator(mode="after")
    def _a_temperature_needs_the_tail(self) -> TrainSection:
        if self.soft_tail == "renormalise" and self.soft_temperature != 1:
            raise ValueError(
                'soft_tail "renormalise" compares with the whole vocabulary, where soft_temperature must be '
                '1; set it to 1, or soft_tail = "bucket"'
            )
        return self

    @property
    def pack_budget(self) -> int:
        """Tokens of one pack: `pack_tokens`, else a measured default that is no larger than a step."""
        return self.pack_tokens or min(self.batch_tokens, max(self.max_length, PACK_TOKENS))

    @property
    def packs_per_step(self) -> int:
        """Packs of one optimiser step."""
        return max(1, round(self.batch_tokens / self.pack_budget))


class EvaluateSection(_Frozen):
    """Configure the evaluation: held-out prompts are answered greedily, in batches.

    Attributes:
        every: evaluate during the training: steps from one evaluation to the next, or a share of all steps
            such as "10%"; 0: only afterwards, by `trainer evaluate`. The adapter with the lowest held-out
            loss is the one that is written at the end.
        patience: stop the training after this many evaluations in a row without a lower loss; 0: never.
        loss_rows: held-out answers whose loss is measured during the training; 0: all.
        sample_answers: held-out prompts that the student answers at each evaluation, for log and live view.
        sample_every: let it answer these between evaluations, too, without measuring a loss: steps, or a
            share of all steps such as "5%"; 0: only at evaluations. No weight depends on it.
        max_new_tokens: tokens after which an answer is cut. Left out: those of the longest taught answer or
            reference, at least 64 and at most `[train] max_length`.
        batch: prompts answered together; halved when memory runs out.
        resamples: bootstrap resamples for the intervals.
        speed_prompts: held-out prompts that are answered once more, alone, to measure the speed; 0: none.
        general_prompts: JSON lines with "prompt" (or "messages") and "answer" that tell what the student has
            forgotten; empty: a small set of this program's own.
        machine_usd_per_hour: price of this machine, for the dollars that a thousand answers cost.
        judge: a harvest.toml whose teacher compares the answers of student and base with the teacher's, each
            pair in both orders; its prompts don't count. Empty: nobody judges.
        judge_prompts: most held-out prompts that it is asked about, up to four requests each; 0: all.
    """

    later_keys: ClassVar[frozenset[str]] = frozenset({"sample_every"})

    every: Every = 0
    patience: int = Field(default=0, ge=0)
    loss_rows: int = Field(default=256, ge=0)
    sample_answers: int = Field(default=3, ge=0)
    sample_every: Every = 0
    max_new_tokens: PositiveInt | None = None
    batch: PositiveInt = 256
    resamples: PositiveInt = 2000
    speed_prompts: int = Field(default=8, ge=0)
    general_prompts: str = ""
    machine_usd_per_hour: Positive | None = None
    judge: str = ""
    judge_prompts: int = Field(default=0, ge=0)

    def interval(self, steps: int) -> int:
        """Return the steps from one evaluation to the next in a training of `steps` steps; 0: none."""
        return _steps_of(self.every, steps)

    def sample_interval(self, steps: int) -> int:
        """Return the steps between samples of answers in a training of `steps` steps; 0: none."""
        return _steps_of(self.sample_every, steps) if self.sample_answers else 0


def _steps_of(every: int | str, steps: int) -> int:
    """Return a number of steps that is given as such or as a share of all steps."""
    if isinstance(every, int):
        return every
    return max(1, round(steps * int(every.removesuffix("%")) / 100))


class ExportSection(_Frozen):
    """Configure what `trainer export` refuses.

    Attributes:
        max_forgetting: by what share the student may need more bits than its base for the answers to general
            prompts, e.g. 0.1; the export of one that needs more fails. Absent: it is not measured.
    """

    max_forgetting: float | None = Field(default=None, ge=0)


class OutSection(_Frozen):
    """Configure the output folder: adapter/, checkpoints/, train.jsonl, train.html, scorecard.json, ...

    Attributes:
        path: the output folder.
        name: name of the student (default: the folder's name); some terms require a prefix.
        licence: licence id for the model card. Empty: the one that the teachers' terms require.
    """

    path: str = "out"
    name: str = ""
    licence: str = ""


class TrainConfig(_Frozen):
    """All of train.toml. `root` is the folder of the file; relative paths start there."""

    student: StudentSection
    data: DataSection
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    export: ExportSection = ExportSection()
    out: OutSection = OutSection()
    verify: VerifySection = Field(default_factory=dict)
    root: Path = Field(default=Path(), exclude=True)

    @model_validator(mode="after")
    def _a_row_fits_a_pack(self) -> TrainConfig:
        if self.train.max_length > self.train.pack_budget:
            raise ValueError(
                f"[train] max_length {self.train.max_length} doesn't fit a pack of "
                f"{self.train.pack_budget} tokens; lower it or raise batch_tokens"
            )
        return self

    @model_validator(mode="after")
    def _verified_answers_need_a_verifier(self) -> TrainConfig:
        if self.data.answers == "verified" and not self.verify:
            raise ValueError('[data] answers = "verified" needs a table [verify.TASK]; `*` is every task')
        return self

    @model_validator(mode="after")
    def _all_weights_are_no_adapter(self) -> TrainConfig:
        if not self.is_full:
            return self
        if self.lora != LoraSection():
            raise ValueError('[train] method = "full" trains no adapter: leave [lora] out')
        if self.student.quantise != "none":
            raise ValueError('[train] method = "full" can\'t train weights in 4 bits: quantise = "none"')
        if self.train.compile:
            raise ValueError('[train] method = "full" can\'t be compiled: compile = false')
        return self

    @property
    def is_full(self) -> bool:
        """Whether all weights are trained, and not an adapter."""
        return self.train.method == "full"

    @property
    def has_mergeable_base(self) -> bool:
        """Whether an adapter is trained, and can be merged into the loaded base."""
        return not self.is_full and self.student.quantise == "none"

    @property
    def student_path(self) -> Path:
        """Folder of what was trained: an adapter, or a model."""
        return self.out_path / ("model" if self.is_full else "adapter")

    @property
    def base(self) -> Path:
        """Folder of the untouched student."""
        return (self.root / self.student.base).resolve()

    @property
    def template(self) -> Path | None:
        """File of the chat template to use instead of the base's own."""
        return (self.root / self.student.template).resolve() if self.student.template else None

    @property
    def general_prompts(self) -> Path | None:
        """File of general prompts; None: the built-in ones."""
        name = self.evaluate.general_prompts
        return (self.root / name).resolve() if name else None

    @property
    def corpus(self) -> Path:
        """Folder of the corpus; of a published one the copy in the cache, downloaded at the first look.

        Raises:
            RemoteStoreError, StoreCorrupt: a published corpus can't be read.
        """
        if url_in(self.data.corpus):
            return _copy_of_published(self.data.corpus)
        return (self.root / self.data.corpus).resolve()

    @property
    def cache(self) -> Path:
        """Folder of token stores."""
        return (self.root / self.data.cache).resolve() if self.data.cache else self.out_path / "tokens"

    @property
    def out_path(self) -> Path:
        """Folder that everything is written to."""
        return (self.root / self.out.path).resolve()

    @property
    def name(self) -> str:
        """Name of the student."""
        return self.out.name or self.out_path.name

    @property
    def sha256(self) -> str:
        """SHA-256 of the values, without the folder that they were read from."""
        return hashlib.sha256(self.model_dump_json(exclude={"data": {"cache"}}).encode()).hexdigest()


@lru_cache(maxsize=16)
def _copy_of_published(url: str) -> Path:
    """Return the copy of a published corpus: the same one for all who ask after the last `load`."""
    from harvester.store.published import local_store  # loads pyarrow

    return local_store(url)


def load(path: Path) -> TrainConfig:
    """Read train.toml.

    Raises:
        ConfigError: missing or broken file, unknown key (with a suggestion), impossible value.
    """
    _copy_of_published.cache_clear()
    file = read_toml(path, _LEAST)
    config = _validated(file.table, path.parent, file.place_of)
    _check_out_path(config, file.place_of(("out", "path")))
    return config


def _check_out_path(config: TrainConfig, place: str) -> None:
    """Refuse an output folder that would write into the base or the corpus, or that is no folder."""
    out, remedy = config.out_path, "set [out] path to a folder of its own"
    untouched = [(config.base, "the untouched base")]
    if not url_in(config.data.corpus):
        untouched.append((config.corpus, "the corpus"))
    for folder, words in untouched:
        if out.is_relative_to(folder):
            raise ConfigError(f"out.path: {out} would write into {words}", place=place, remedy=remedy)
        if config.cache.is_relative_to(folder):
            raise ConfigError(
                f"data.cache: {config.cache} would write into {words}",
                place=place,
                remedy="set [data] cache to a folder of its own",
            )
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out.path: {out} is not a folder", place=place, remedy=remedy)


def parse(data: Mapping[str, Any], *, root: Path, place: str) -> TrainConfig:
    """Validate parsed TOML.

    Args:
        root: folder that relative paths start from.
        place: the file, for errors.

    Raises:
        ConfigError: the first thing that is wrong, with its key and a remedy.
    """
    return _validated(data, root, lambda _location: place)


# The field of `TrainConfig` that no file may set.
_HIDDEN = frozenset({"root"})


def _validated(
    data: Mapping[str, Any], root: Path, place_of: Callable[[Sequence[int | str]], str]
) -> TrainConfig:
    if "root" in data:  # the field exists, but a file may not set it
        remedy = suggest_key(TrainConfig, ("root",), _HIDDEN)
        raise ConfigError("unknown key 'root'", place=place_of(("root",)), remedy=remedy)
    return validate(TrainConfig, {**data, "root": root}, place_of=place_of, missing=_LEAST, hidden=_HIDDEN)
