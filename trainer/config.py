"""train.toml as frozen values. An unknown key is an error that names the nearest known one.

Paths are resolved beside the file, so a folder can be moved as a whole.
"""

from __future__ import annotations

import difflib
import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from harvester.system.toml_file import read_toml
from trainer.errors import ConfigError

Positive = Annotated[float, Field(gt=0)]
PositiveInt = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

PACK_TOKENS = 2048  # measured on two cores with a 1M-parameter student: 512 -> 18k, 2048 -> 25k tokens/s


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StudentSection(_Frozen):
    """The local model to tune: a folder with safetensors weights, tokenizer and chat template.

    Attributes:
        template: a chat template to use instead of the folder's own; a part of a training's identity.
        sha256: hash of the base (`trainer plan` prints it); another base is refused.
    """

    base: str = Field(min_length=1)
    template: str = ""
    sha256: str = Field(default="", pattern="^([0-9a-f]{64})?$")


class DataSection(_Frozen):
    """Where samples come from and which of them are learned.

    Attributes:
        corpus: a store folder, or any folder of shards.
        split_field: metadata field that names a row's split; rows whose split is not "train" are judged
            with, never trained on.
        eval_share: share of the prompts without a split that is held out, chosen by the prompt's content.
        truncated: rows cut by the teacher's token limit: left out, or learned without an end of turn.
        reasoning: the teacher's reasoning: left out, put before the answer as plain text in think tags, or
            kept where the student's template has its place for it.
    """

    corpus: str = Field(min_length=1)
    split_field: str = "split"
    eval_share: Share = 0.1
    truncated: Literal["exclude", "unterminated"] = "exclude"
    reasoning: Literal["drop", "inline", "keep"] = "drop"


class LoraSection(_Frozen):
    """The adapter. Names follow PEFT; `plus_ratio` multiplies the rate of B (LoRA+)."""

    rank: PositiveInt = 32
    alpha: Positive = 64
    dropout: Share = 0.0
    target: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    rslora: bool = False
    dora: bool = False
    plus_ratio: Positive = 1.0


class TrainSection(_Frozen):
    """The loop.

    Attributes:
        batch_tokens: tokens of one optimiser step, prompt and completion together.
        pack_tokens: tokens of one forward pass; a step is one or more packs.
        max_length: longer examples are left out and counted.
        warmup: share of all steps with a rising rate.
        lr_floor: share of the peak rate that the cosine ends at.
        clip: bound of the gradient's norm.
        save_every: steps between checkpoints; 0 means one at the end.
        checkpointing: recompute activations in the backward pass; "planned" does so only where the memory
            plan says that they would not fit.
        shard: deal the base's layers to the processes of a fleet; "planned" does so only where the base would
            take more than half of a device.
        compile: torch.compile for the layers and the loss; the first step takes its time, last bits differ.
        threads: CPU threads, 0 means as many as there are cores for this process.
    """

    epochs: PositiveInt = 3
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
    save_every: int = Field(default=200, ge=0)
    threads: int = Field(default=0, ge=0)
    device: Literal["cpu", "cuda", "fastest"] = "fastest"
    checkpointing: Literal["never", "always", "planned"] = "planned"
    shard: Literal["never", "always", "planned"] = "planned"
    compile: bool = False

    @property
    def pack_budget(self) -> int:
        """Tokens of one pack: as told, else the measured default, never above a step."""
        return self.pack_tokens or min(self.batch_tokens, max(self.max_length, PACK_TOKENS))

    @property
    def packs_per_step(self) -> int:
        """Packs of one optimiser step."""
        return max(1, round(self.batch_tokens / self.pack_budget))


class EvaluateSection(_Frozen):
    """How the held-out prompts are answered: greedily, in batches."""

    max_new_tokens: PositiveInt = 64
    batch: PositiveInt = 256
    resamples: PositiveInt = 2000


class OutSection(_Frozen):
    """Folder that receives adapter/, checkpoints/, train.jsonl, answers.jsonl and scorecard.json.

    Attributes:
        name: what the student will be called (default: the folder's name); some terms ask for a prefix.
        licence: id for its card; some terms force one. Empty: what the duties force.
    """

    path: str = "out"
    name: str = ""
    licence: str = ""


class TrainConfig(_Frozen):
    """A whole train.toml."""

    student: StudentSection
    data: DataSection
    lora: LoraSection = LoraSection()
    train: TrainSection = TrainSection()
    evaluate: EvaluateSection = EvaluateSection()
    out: OutSection = OutSection()
    root: Path = Field(default=Path(), exclude=True)

    @model_validator(mode="after")
    def _a_row_fits_a_pack(self) -> TrainConfig:
        if self.train.max_length > self.train.pack_budget:
            raise ValueError(
                f"[train] max_length {self.train.max_length} doesn't fit a pack of "
                f"{self.train.pack_budget} tokens; lower it or raise batch_tokens"
            )
        return self

    @property
    def base(self) -> Path:
        """Folder of the untouched student."""
        return (self.root / self.student.base).resolve()

    @property
    def template(self) -> Path | None:
        """File of the chat template to use instead of the base's own."""
        return (self.root / self.student.template).resolve() if self.student.template else None

    @property
    def corpus(self) -> Path:
        """Folder of the corpus."""
        return (self.root / self.data.corpus).resolve()

    @property
    def out_path(self) -> Path:
        """Folder of everything written."""
        return (self.root / self.out.path).resolve()

    @property
    def name(self) -> str:
        """What the student is called."""
        return self.out.name or self.out_path.name

    @property
    def sha256(self) -> str:
        """Hash of the values, without the place they were read from."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def load(path: Path) -> TrainConfig:
    """Read train.toml.

    Raises:
        ConfigError: missing or broken file, unknown key (with a suggestion), impossible value.
    """
    data = read_toml(path, "a train.toml needs [student] base and [data] corpus")
    return parse(data, root=path.parent, place=str(path))


def parse(data: dict[str, Any], *, root: Path, place: str) -> TrainConfig:
    """Validate already loaded TOML; `place` is named in errors, `root` is where paths start.

    Raises:
        ConfigError: the first thing wrong, with its key and a remedy.
    """
    if "root" in data:
        raise ConfigError("unknown key 'root'", place=place, remedy=_suggestion(("root",)))
    try:
        return TrainConfig.model_validate({**data, "root": root})
    except ValidationError as error:
        found = error.errors(include_url=False)
        # A misspelt key often also leaves a required one missing: name the spelling first.
        first = next((e for e in found if e["type"] == "extra_forbidden"), found[0])
        where = ".".join(str(part) for part in first["loc"]) or "file"
        if first["type"] == "extra_forbidden":
            raise ConfigError(
                f"unknown key {where!r}", place=place, remedy=_suggestion(first["loc"])
            ) from None
        wants = "a train.toml needs [student] base and [data] corpus" if first["type"] == "missing" else ""
        said = first["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"{where}: {said}", place=place, remedy=wants or "change the key named here"
        ) from None


def _suggestion(loc: tuple[int | str, ...]) -> str:
    model: Any = TrainConfig
    for part in loc[:-1]:
        found = model.model_fields.get(str(part))
        kinds = [found.annotation, *get_args(found.annotation)] if found else []
        model = next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)
        if model is None:
            return ""
    known = [name for name in model.model_fields if name != "root"]
    near = difflib.get_close_matches(str(loc[-1]), known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
