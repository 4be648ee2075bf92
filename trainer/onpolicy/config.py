"""Read onpolicy.toml into frozen values. Loads no torch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from harvester.system.toml_file import read_toml, validate
from trainer.config import TrainConfig
from trainer.errors import ConfigError
from trainer.experiments.harvest_file import load_both, system_prompt

_LEAST = "an onpolicy.toml needs harvest, train and prompts"
PositiveInt = Annotated[int, Field(gt=0)]


class OnPolicyConfig(BaseModel):
    """All of onpolicy.toml.

    Attributes:
        harvest: the harvest.toml with teacher, terms, limits, price and store; its prompts and sampling are
            not used. Scored texts lie in its store.
        train: the train.toml with student, adapter and step settings; `[data] corpus` is the same store.
        prompts: JSON-lines files of prompts; those of the training split are learned from, the others are
            held out.
        start: folder of the adapter to begin with; empty: a new one.
        teacher_tokenizer: folder with the teacher's tokenizer and chat template, to send texts in its own
            form; empty: the server puts the chat into its template, which only vLLM can.
        via: how the server is asked (`[score] via` of harvest.toml).
        rounds: rounds of answering, scoring and one optimiser step.
        prompts_per_round: prompts that the student answers in a round.
        samples: answers to each of them.
        max_new_tokens: tokens after which an answer is cut.
        lr: learning rate, constant; absent: `[train] lr`.
        advantage_clip: largest advantage of a token in nats, of either sign; larger ones count as that.
            Absent: none is bounded. A bound makes steps less noisy, and no longer unbiased.
        baseline: what is subtracted from all advantages of a round: nothing, or their mean. The mean makes
            steps much less noisy while the student is far from the teacher, and changes no expected gradient.
        top_logprobs: likeliest tokens that the teacher lists at each token of an answer, 2 to 20. A round
            then learns the divergence over these and one event for all others, instead of one number a
            token, which is much less noisy. Absent: none are asked for.
        held_out_every: rounds between two measurements on held-out prompts; 0: before and after only.
        held_out_prompts: most held-out prompts that are answered for a measurement.
        held_out_samples: answers to each of them.
        seed: seed of the order of the prompts and of the samples.
        max_usd: ceiling of what all runs of the store may cost together.
        max_tokens: the same in tokens.
        resamples: bootstrap resamples for the intervals.
        out: folder of onpolicy.json, onpolicy.html and adapter/.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    harvest: str = Field(min_length=1)
    train: str = Field(min_length=1)
    prompts: Annotated[tuple[str, ...], Field(min_length=1)]
    start: str = ""
    teacher_tokenizer: str = ""
    via: Literal["auto", "prompt_logprobs", "echo", "generate", "chat"] = "auto"
    rounds: Annotated[int, Field(ge=1, le=100_000)] = 20
    prompts_per_round: PositiveInt = 64
    samples: PositiveInt = 4
    max_new_tokens: PositiveInt = 256
    lr: Annotated[float, Field(gt=0)] | None = None
    advantage_clip: Annotated[float, Field(gt=0)] | None = None
    baseline: Literal["none", "mean"] = "none"
    top_logprobs: Annotated[int, Field(ge=2, le=20)] | None = None
    held_out_every: int = Field(default=5, ge=0)
    held_out_prompts: PositiveInt = 200
    held_out_samples: PositiveInt = 4
    seed: int = Field(default=0, ge=0)
    max_usd: Annotated[float, Field(gt=0)] | None = None
    max_tokens: PositiveInt | None = None
    resamples: Annotated[int, Field(ge=100, le=100_000)] = 2000
    out: str = "onpolicy"


@dataclass(frozen=True, slots=True)
class OnPolicyFiles:
    """Hold onpolicy.toml with what it names.

    Attributes:
        harvest: path of harvest.toml; `harvest_table` is its content.
        prompts: the files of prompts.
        start: folder of the adapter to begin with; None: a new one.
        teacher_tokenizer: folder of the teacher's tokenizer; None: it is not known here.
        folder: the output folder.
    """

    config: OnPolicyConfig
    train: TrainConfig
    harvest: Path
    harvest_table: dict[str, Any]
    prompts: tuple[Path, ...]
    start: Path | None
    teacher_tokenizer: Path | None
    folder: Path

    @property
    def system(self) -> str | None:
        """The system prompt that the harvest adds."""
        return system_prompt(self.harvest_table)


def load_onpolicy(path: Path) -> OnPolicyFiles:
    """Read onpolicy.toml, and the train.toml and harvest.toml that it names.

    Raises:
        ConfigError: a file is missing or broken, or names what does not fit.
    """
    file = read_toml(path, _LEAST)
    config = validate(OnPolicyConfig, file.table, place_of=file.place_of, missing=_LEAST)
    if not config.teacher_tokenizer and config.via not in ("auto", "chat"):
        raise ConfigError(
            f"via = {config.via!r} sends a text in the teacher's chat template, which is not named",
            place=file.place_of(("via",)),
            remedy="set teacher_tokenizer to a folder with the teacher's tokenizer and chat template",
        )
    for name in ("advantage_clip", "baseline"):
        if config.top_logprobs is not None and name in config.model_fields_set:
            raise ConfigError(
                f"{name} makes single log-ratios less noisy; with top_logprobs there are none",
                place=file.place_of((name,)),
                remedy=f"leave out {name} or top_logprobs",
            )
    shared = load_both(path.parent, config.harvest, config.train)
    folder = (path.parent / config.out).resolve()
    if folder == shared.train.out_path:
        raise ConfigError(
            "out is the output folder of train.toml",
            place=file.place_of(("out",)),
            remedy="name a folder of its own",
        )
    return OnPolicyFiles(
        config,
        shared.train,
        shared.harvest,
        shared.harvest_table,
        tuple((path.parent / name).resolve() for name in config.prompts),
        (path.parent / config.start).resolve() if config.start else None,
        (path.parent / config.teacher_tokenizer).resolve() if config.teacher_tokenizer else None,
        folder,
    )
