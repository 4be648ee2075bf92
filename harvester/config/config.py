"""Read harvest.toml into frozen values. An unknown key is an error that names the nearest known one."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from harvester.config.judge_section import JudgeSection, with_prompts
from harvester.config.number_limits import MAX_MIB, MAX_SAMPLES
from harvester.config.refused_keys import KEYS_WITH_OWN_PLACE, REFUSED_KEYS
from harvester.config.run_section import (
    AcceptSection,
    BatchSection,
    BudgetSection,
    CanarySection,
    Count,
    FrozenModel,
    PositiveInt,
    RunSection,
    ScheduleSection,
)
from harvester.config.teacher_section import TeacherSection
from harvester.quality.similarity.duplicates import DEFAULT_THRESHOLD, LEAST_THRESHOLD
from harvester.quality.similarity.settings import DecontaminateSection
from harvester.quality.verifiers.settings import VerifySection
from harvester.system.objects.url import parse as parse_object_url
from harvester.system.objects.url import refusals_of_a_setting, require_local
from harvester.system.toml_file import read_toml, validate

# Body fields that would change the model or the messages without the terms gate knowing.
_UNGATED_FIELDS = frozenset({"model", "models", "messages", "prompt", "input", "route", "preset", "engine"})

# Settings that change what is generated for one prompt, and nothing that the terms or the journal rest on.
RowSetting = Literal[
    "temperature",
    "top_p",
    "max_tokens",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "reasoning_effort",
]
ROW_SETTINGS: frozenset[str] = frozenset(get_args(RowSetting))


class PromptsSection(FrozenModel):
    """Where prompts come from.

    Attributes:
        files: names and globs, relative to the configuration file.
        system: system message put before each prompt that has none.
        max_bad: lines that can't be used and may be skipped; one more ends the run.
        last_assistant: what becomes of an assistant turn at the end of a conversation. "send" sends it, and
            the teacher continues it or answers it; "reference" keeps it as the row's reference instead.
        template: file of a jinja2 template that writes the prompt from the fields of a row.
        row_settings: settings that a row may hold for its own request, in place of those of `[sampling]`.
        dedupe: which prompts are not asked, since an earlier one asks the same: none; those equal but for
            Unicode form, case and white space; or near duplicates too.
        dedupe_threshold: least similarity of near duplicates, 0 to 1.
    """

    files: tuple[str, ...] = Field(min_length=1)
    system: str | None = None
    max_bad: Count = 0
    last_assistant: Literal["send", "reference"] = "send"
    template: str | None = Field(default=None, min_length=1)
    row_settings: tuple[RowSetting, ...] = ()
    dedupe: Literal["off", "exact", "near"] = "off"
    dedupe_threshold: float = Field(default=DEFAULT_THRESHOLD, ge=LEAST_THRESHOLD, le=1)


class SamplingSection(FrozenModel):
    """Fields of the request body; what is absent is not sent.

    Attributes:
        temperature: randomness of the answers; 0 takes the likeliest token.
        top_p: probability mass of the tokens that are drawn from.
        max_tokens: tokens after which an answer is cut.
        seed: seed of the draw, where the teacher has one; with `samples` each sample adds its number.
        stop: texts at which an answer ends.
        presence_penalty: penalty for tokens that occurred.
        frequency_penalty: penalty for tokens by how often they occurred.
        reasoning_effort: how much a reasoning model thinks, in the teacher's own words.
        samples: answers that are asked of each prompt.
        top_logprobs: likeliest tokens whose log-probabilities are asked for at each token; 0: none.
        stream: receive answers in pieces; they are stored as a whole.
        tools: tools that the teacher may call, for all prompts.
        response_format: form that the answer must have, such as a JSON Schema.
        extra: further fields of the body, sent as they are.
    """

    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    max_tokens: PositiveInt | None = None
    seed: int | None = None
    stop: tuple[str, ...] | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    reasoning_effort: str | None = None
    samples: int = Field(default=1, gt=0, le=MAX_SAMPLES)
    top_logprobs: int = Field(default=0, ge=0, le=20)
    stream: bool = False
    tools: tuple[dict[str, Any], ...] | None = None
    response_format: dict[str, Any] | None = None
    extra: dict[str, Any] = Field(default_factory=dict)

    @field_validator("extra")
    @classmethod
    def _without_keys_set_elsewhere(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in sorted(value.keys() & KEYS_WITH_OWN_PLACE.keys()):
            raise ValueError(f"{name!r} has a key of its own: {KEYS_WITH_OWN_PLACE[name]}")
        for name in sorted(value.keys() & cls.model_fields.keys()):
            raise ValueError(f"{name!r} has a key of its own: set [sampling] {name}")
        return value

    @field_validator("extra")
    @classmethod
    def _asks_the_gated_model(cls, value: dict[str, Any]) -> dict[str, Any]:
        if fields := sorted(set(value) & _UNGATED_FIELDS):
            raise ValueError(
                f"{', '.join(fields)} may not be set here: the terms were checked for [teacher] model alone"
            )
        return value


class StoreSection(FrozenModel):
    """Where answers are kept.

    Attributes:
        path: folder of the store, relative to the configuration file.
        read_also: other stores. What they hold for the prompts of a run is copied into this store, with its
            lineage, and not asked again.
        mirror: URL of object storage to which sealed shards are published during a run; "" for none.
        shard_mib: size of an answer file (shard), in MiB before compression, at which it is written.
        min_free_mib: free space of the disk below which no request is sent.
    """

    path: str = "store"
    read_also: tuple[str, ...] = ()
    mirror: str = ""
    shard_mib: float = Field(default=64, gt=0, le=MAX_MIB)
    min_free_mib: float = Field(default=256, ge=0, le=MAX_MIB)

    @field_validator("path")
    @classmethod
    def _path_names_a_folder(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("must name a folder")
        if value == "~" or value.startswith("~/"):
            raise ValueError(f"~ is not replaced here: write the whole path, or './{value}' for that name")
        return value

    @field_validator("read_also")
    @classmethod
    def _others_are_here(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        with refusals_of_a_setting():
            for name in value:
                require_local(name)
        return value

    @field_validator("mirror")
    @classmethod
    def _mirror_is_a_url(cls, value: str) -> str:
        if value:
            with refusals_of_a_setting():
                parse_object_url(value)
        return value


class ScoreSection(FrozenModel):
    """Ask for the log-probabilities of given texts instead of answers.

    Attributes:
        via: how the server is asked (`api.scoring.request_forms`); "auto" takes the first form
            that a probe proves.
        top_logprobs: likeliest tokens that are kept at each token of the text; None: that of the text alone.
    """

    via: Literal["auto", "prompt_logprobs", "echo", "generate", "chat"] = "auto"
    # A server can't be asked for fewer than one; a single one would be no distribution.
    top_logprobs: int | None = Field(default=None, ge=2, le=20)


# Rules of `[prompts]` for what is asked, with their defaults.
_ASKING_RULES = {
    name: PromptsSection.model_fields[name].default
    for name in ("system", "last_assistant", "template", "row_settings")
}


class HarvestConfig(FrozenModel):
    """A whole harvest.toml."""

    teacher: TeacherSection
    prompts: PromptsSection
    sampling: SamplingSection = SamplingSection()
    store: StoreSection = StoreSection()
    budget: BudgetSection = BudgetSection()
    run: RunSection = RunSection()
    schedule: ScheduleSection = ScheduleSection()
    canary: CanarySection = CanarySection()
    verify: VerifySection = Field(default_factory=dict)
    decontaminate: DecontaminateSection | None = None
    accept: AcceptSection | None = None
    score: ScoreSection | None = None
    batch: BatchSection = BatchSection()
    judge: JudgeSection | None = None

    @model_validator(mode="before")
    @classmethod
    def _judge_has_prompts_of_its_own(cls, data: Any) -> Any:
        return with_prompts(data)

    @model_validator(mode="after")
    def _judging_asks_once(self) -> HarvestConfig:
        if self.judge is not None and (self.most_samples != 1 or self.score is not None):
            raise ValueError("[judge] asks for one reply: leave out [sampling] samples, [accept] and [score]")
        return self

    @model_validator(mode="after")
    def _scoring_asks_for_no_answers(self) -> HarvestConfig:
        if self.score is None:
            return self
        unset = SamplingSection(extra=self.sampling.extra)
        if names := sorted(
            n for n in SamplingSection.model_fields if getattr(self.sampling, n) != getattr(unset, n)
        ):
            raise ValueError(f"[score] asks for no answers: leave out [sampling] {', '.join(names)}")
        if self.accept is not None or self.canary.prompts is not None:
            raise ValueError("[score] asks for no answers: leave out [accept] and [canary] prompts")
        if names := sorted(n for n in _ASKING_RULES if getattr(self.prompts, n) != _ASKING_RULES[n]):
            raise ValueError(f"[score] sends texts as they are: leave out [prompts] {', '.join(names)}")
        return self

    @model_validator(mode="after")
    def _accepting_needs_a_verifier(self) -> HarvestConfig:
        if self.accept is not None and not self.verify:
            raise ValueError('[accept] needs a verifier: [verify.TASK] kind = "exact", say')
        if self.accept is not None and self.sampling.samples != 1:
            raise ValueError("[accept] says how many samples are asked: leave out [sampling] samples")
        return self

    @property
    def skips_prompts(self) -> bool:
        """Whether prompts may be skipped for what they ask."""
        return self.prompts.dedupe != "off" or self.decontaminate is not None

    @property
    def first_samples(self) -> int:
        """Samples of a prompt that are asked in any case."""
        return self.sampling.samples if self.accept is None else self.accept.per_prompt

    @property
    def most_samples(self) -> int:
        """Most samples of a prompt that may be asked."""
        return self.sampling.samples if self.accept is None else self.accept.of

    @model_validator(mode="after")
    def _money_needs_a_price(self) -> HarvestConfig:
        has_usd = any(ceiling.usd is not None for ceiling in self.budget.by_span.values())
        if has_usd and self.teacher.price is None:
            raise ValueError("[budget] usd needs a [teacher.price]; without one, set [budget] tokens")
        return self

    @property
    def providers(self) -> tuple[str, ...]:
        """Providers that requests restrict a router to (`provider.only`); empty: no router or restriction."""
        provider = self.sampling.extra.get("provider")
        only = provider.get("only") if isinstance(provider, dict) else None
        return tuple(str(name) for name in only) if isinstance(only, list | tuple) else ()

    @property
    def sha256(self) -> str:
        """Hash of the values, stored in the lineage."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


def load(path: Path) -> HarvestConfig:
    """Read harvest.toml.

    Raises:
        ConfigError: missing or broken file, unknown key (with a suggestion), impossible value.
    """
    file = read_toml(path, "`harvester init DIR` makes one")
    return _validated(file.table, file.place_of)


def parse(data: dict[str, Any], *, place: str) -> HarvestConfig:
    """Validate already loaded TOML; `place` is named in errors.

    Raises:
        ConfigError: the first thing wrong, with its key and a remedy.
    """
    return _validated(data, lambda _location: place)


def _validated(data: dict[str, Any], place_of: Callable[[Sequence[int | str]], str]) -> HarvestConfig:
    return validate(
        HarvestConfig,
        data,
        place_of=place_of,
        missing="`harvester init DIR` writes a complete example",
        refused=REFUSED_KEYS,
    )
