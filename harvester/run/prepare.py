"""Everything that can fail for free: configuration, prompts, terms, key. Sends nothing, writes nothing."""

from __future__ import annotations

import ssl
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from harvester.api import request_builder, response_format
from harvester.api.types import UNKNOWN_MODEL, Prompt
from harvester.config import config as settings
from harvester.config import dotenv
from harvester.config import schedule as hours
from harvester.config.config import HarvestConfig
from harvester.config.overrides import Overrides
from harvester.config.schedule import OpeningHours
from harvester.errors import ConfigError, NoPrompts, PromptError
from harvester.observe.counters import OTHER_MODELS, PassLimits
from harvester.prompts import completed_files, duplicate_ids, reader
from harvester.prompts.bad_lines import BadLines
from harvester.prompts.duplicate_ids import DuplicateIds
from harvester.run import canary_task, plan
from harvester.store.terms_check import require_unsealed_permitted
from harvester.system.hosts import printable
from harvester.teacher import policies
from harvester.terms import gate as terms


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that may start: configuration read, prompts checked, terms permitted.

    `digest` is that of the prompt files as they were checked (`finished`), None where none is kept.
    """

    path: Path
    config: HarvestConfig
    flags: Overrides
    rows_total: int
    input_tokens: int
    verdict: terms.Verdict
    key: str | None = field(repr=False)
    bad: tuple[PromptError, ...] = ()
    digest: bytes | None = None

    @property
    def root(self) -> Path:
        """The folder that paths in the configuration are relative to."""
        return self.path.resolve().parent

    @property
    def store(self) -> Path:
        """The store's folder."""
        return self.root / self.config.store.path

    @property
    def hours(self) -> OpeningHours:
        """When the run may work; a deadline on the command line counts beside that of the file."""
        schedule = self.config.schedule
        told = schedule.finish_by.timestamp() if schedule.finish_by else None
        ends = [end for end in (told, self.flags.finish_by) if end is not None]
        return OpeningHours(tuple(hours.parse(text) for text in schedule.hours), min(ends, default=None))

    def limits(self) -> PassLimits:
        """The flags as the pass wants them."""
        grace_s = self.config.run.grace_s if self.flags.grace_s is None else self.flags.grace_s
        flags = self.flags
        return PassLimits(flags.rows, flags.usd, flags.tokens, flags.runtime_s, grace_s)

    def lines(self) -> list[str]:
        """What is about to happen, for people."""
        teacher = self.config.teacher
        proxies = _proxies(self.config)
        return [
            f"teacher {teacher.model} at {teacher.base_url}",
            *(f"proxy   {host} (from the environment)" for host in proxies),
            f"terms   {self.verdict.summary()}",
            f"rows    {self.rows_total:,} (prompts x samples) into {self.store}",
            *([f"bad     {len(self.bad):,} lines passed over; the first: {self.bad[0]}"] if self.bad else []),
        ]


def prepare(path: Path, flags: Overrides | None = None) -> Prepared:
    """Read, check and gate; sends nothing and writes nothing.

    Raises:
        ConfigError, PromptError, TermsRefused: before anything could cost.
    """
    config, flags = settings.load(path), flags or Overrides()
    flags.require(priced=config.teacher.price is not None)
    root = path.resolve().parent
    verdict = gate(config, root)
    verdict.require()
    config = _with_trust(_with_wire_fields(config, verdict), root)
    _require_name(root / config.store.path)
    require_unsealed_permitted(root / config.store.path)
    if flags.epoch is not None:  # ask again on purpose: other keys, same prompts
        run = config.run.model_copy(update={"epoch": flags.epoch})
        config = config.model_copy(update={"run": run})
    response_format.check(config.sampling.response_format)
    request_builder.check(config)
    _require_pace(config, path)
    if canary_task.check(config, root):  # canaries are asked to evaluate the teacher, not to learn from it
        evaluating = config.run.model_copy(update={"purpose": "eval"})
        gate(config.model_copy(update={"run": evaluating}), root).require()
    key = settings.api_key(config.teacher, dotenv.variables(root))
    bad = BadLines(config.prompts.max_bad)
    # Canaries are asked while a pass lives, and a watching run never ends: both take the whole walk.
    whole = flags.watch or config.canary.prompts is not None
    digest = None if whole else completed_files.digest_of(config, root)
    known = completed_files.look_up(root / config.store.path, digest)
    if known is None:
        rows, tokens = _count(config, root, bad, watch=flags.watch)
    else:
        rows, tokens = known.rows, known.input_tokens
    return Prepared(path, config, flags, rows, tokens, verdict, key, tuple(bad.passed_over), digest)


def _require_pace(config: HarvestConfig, path: Path) -> None:
    limits, addresses = config.teacher.limits.model_dump(), len(config.teacher.base_urls)
    try:
        for name, value in limits.items():
            if value is not None and name.endswith("_per_minute"):
                policies.require_rate_within_patience(name, value, addresses, config.run.patience_s)
    except ConfigError as error:
        error.place = f"{path}: teacher.limits"
        raise


def _require_name(store: Path) -> None:
    """Refuse a folder whose name is no text: sealing would meet it, after the paying."""
    if reader.legible(store) != str(store):
        raise ConfigError(
            "lies under a name that is no UTF-8: Parquet files can't be opened there",
            place=reader.legible(store),
            remedy="rename the folder, or set [store] path to another place",
        )


def _count(config: HarvestConfig, root: Path, bad: BadLines, *, watch: bool) -> tuple[int, int]:
    """Rows and their estimated input tokens; reads every prompt, so the first bad line is met here."""
    rows = tokens = 0
    ids = DuplicateIds()
    # A watching run may name files that are not there yet.
    for files in [(pattern,) for pattern in config.prompts.files] if watch else [config.prompts.files]:
        try:
            for prompt in reader.read(files, root, bad):
                rows += 1
                ids.note(prompt)
                tokens += request_builder.input_tokens_of(prompt, config)
        except NoPrompts:
            if not watch:
                raise
    if not watch and (repeated := ids.repeated()):

        def walk() -> Iterator[Prompt]:
            return reader.read(config.prompts.files, root, BadLines(config.prompts.max_bad))

        if (error := duplicate_ids.clash(walk, repeated)) is not None:
            raise error
    return rows * config.sampling.samples, tokens * config.sampling.samples


def _with_wire_fields(config: HarvestConfig, verdict: terms.Verdict) -> HarvestConfig:
    """The configuration with the fields that a router's terms want in every body; theirs win."""
    if not verdict.body:
        return config
    extra = {**config.sampling.extra, **verdict.body}
    return config.model_copy(update={"sampling": config.sampling.model_copy(update={"extra": extra})})


def _proxies(config: HarvestConfig) -> list[str]:
    """Host and port of the proxies that requests go through; never the credentials in their URLs."""
    if not config.run.trust_env:
        return []
    parts = [urlsplit(url) for url in config.teacher.base_urls]
    used = [getproxies().get(one.scheme) for one in parts if not proxy_bypass(one.hostname or "")]
    return sorted({urlsplit(url).netloc.rpartition("@")[2] for url in used if url})


def _with_trust(config: HarvestConfig, root: Path) -> HarvestConfig:
    """The configuration with `ca_file` found beside it, and found fit."""
    if config.teacher.ca_file is None:
        return config
    path = root / config.teacher.ca_file
    try:
        ssl.create_default_context(cafile=path)
    except OSError as error:
        raise ConfigError(
            f"can't be read as certificates: {error.strerror or error}",
            place=str(path),
            remedy="[teacher] ca_file names a PEM file of the certificates to trust",
        ) from None
    return config.model_copy(update={"teacher": config.teacher.model_copy(update={"ca_file": str(path)})})


def gate(config: HarvestConfig, root: Path, model: str = "") -> terms.Verdict:
    """Ask the terms gate for the use `harvest`, for every address of the teacher; the worst answer counts.

    Folders beside the configuration count: `terms` overlays the registry, `permissions` holds recorded ones.

    Args:
        model: another name to ask for, as an answer gave it; the configured one where empty.
    """
    recorded = terms.RecordedTerms.load(root)
    verdicts = {
        host: terms.allows(
            recorded,
            host=host,
            model=model or config.teacher.model,
            declared=config.teacher.terms,
            use="harvest",
            purpose=config.run.purpose,
        )
        for host in dict.fromkeys(urlsplit(url).hostname or "" for url in config.teacher.base_urls)
    }
    first_host, first = next(iter(verdicts.items()))
    for host, verdict in verdicts.items():
        if not verdict.permitted:
            return verdict
        # Rows carry one lineage: what only a replica's host asks for would be lost on the way.
        if (verdict.record_ids, verdict.permission_sha256) != (first.record_ids, first.permission_sha256):
            told, other = (", ".join(v.record_ids) for v in (verdict, first))
            why = f"replica {host} is under other terms ({told}) than {first_host} ({other})"
            return replace(verdict, permitted=False, reasons=(f"{why}: ask it as a teacher of its own",))
    return first


def ask_again(prepared: Prepared, voices: Collection[str]) -> None:
    """Do nothing when a living run may go on today, and with what answers call themselves.

    Args:
        voices: "model" or "model build", as answers name them.

    Raises:
        TermsRefused: no longer, or another model answers than the terms were asked for.
    """
    gate(prepared.config, prepared.root).require()
    for voice in voices:
        if voice in {UNKNOWN_MODEL, OTHER_MODELS}:
            continue
        asked = [
            gate(prepared.config, prepared.root, name) for name in (voice.rpartition(" ")[0], voice) if name
        ]
        if not any(verdict.permitted for verdict in asked):
            named = f"asked for {prepared.config.teacher.model!r}, {printable(voice)!r} answered"
            replace(asked[0], reasons=tuple(f"{named}: {reason}" for reason in asked[0].reasons)).require()


def look_ahead(path: Path) -> plan.Plan:
    """`harvester plan`: what a run would do. Also for teachers the gate would refuse."""
    config = settings.load(path)
    root = path.resolve().parent
    return plan.plan(config, root, gate(config, root))
