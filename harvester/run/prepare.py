"""Check all that can fail before a run spends money: configuration, terms, prompts, key.

Nothing is sent and nothing is written.
"""

from __future__ import annotations

import contextlib
import ssl
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from harvester.api import request_builder, response_format
from harvester.api.types import UNKNOWN_MODEL
from harvester.config import config as settings
from harvester.config import dotenv, provider_presets
from harvester.config import schedule as hours
from harvester.config.config import HarvestConfig
from harvester.config.overrides import Overrides
from harvester.config.schedule import OpeningHours
from harvester.config.shard import Shard
from harvester.config.teacher_section import BatchApiSection, api_key
from harvester.config.transport import Transport
from harvester.errors import ConfigError, NoPrompts, PromptError, StoreError
from harvester.observe.counters import OTHER_MODELS, PassLimits
from harvester.observe.status import budget_texts
from harvester.prompts import completed_files, reader
from harvester.prompts.bad_lines import BadLines
from harvester.prompts.duplicate_ids import DuplicateIds
from harvester.prompts.own_prompts import OwnPrompts
from harvester.prompts.row_rules import RowRules, rules_of
from harvester.prompts.screen import PromptScreen, SkippedPrompts
from harvester.quality.verifiers.verifiers import Verifiers
from harvester.run import sharding
from harvester.run.background import canary_task
from harvester.run.planning import plan
from harvester.run.planning.plan_result import Plan
from harvester.run.planning.prompt_notes import PromptNotes
from harvester.run.sharding import with_shard
from harvester.store import other_settings
from harvester.store.journal import sqlite
from harvester.store.terms_check import require_unsealed_permitted
from harvester.system.command_line.extras import require
from harvester.system.command_line.shell_words import shell_word
from harvester.system.hosts import printable
from harvester.system.objects.url import require_elsewhere
from harvester.system.path_names import require_utf8
from harvester.teacher import policies
from harvester.terms import gate as terms


@dataclass(frozen=True, slots=True)
class Prepared:
    """A run that may start: configuration read, prompts checked, terms permitted.

    `digest` is that of the prompt files as they were checked (`completed_files`), None where none is kept.
    `verifiers` are those of a configuration with `[accept]`. `skipped` are prompts that are not asked.
    `rules` say how rows become prompts. `prepared_at` is when, in monotonic seconds: nothing was sent since.
    """

    path: Path
    config: HarvestConfig
    flags: Overrides
    rows_total: int
    input_tokens: int
    verdict: terms.Verdict
    key: str | None = field(repr=False)
    bad: tuple[PromptError, ...] = ()
    warnings: tuple[str, ...] = ()
    digest: bytes | None = None
    verifiers: Verifiers | None = None
    skipped: SkippedPrompts = field(default_factory=SkippedPrompts)
    rules: RowRules = field(default_factory=RowRules)
    prepared_at: float = field(default_factory=time.monotonic)

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
        """When the run may work. The earlier deadline counts: of the file or of the command line."""
        schedule = self.config.schedule
        in_file = schedule.finish_by.timestamp() if schedule.finish_by else None
        ends = [end for end in (in_file, self.flags.finish_by) if end is not None]
        return OpeningHours(tuple(hours.parse(text) for text in schedule.hours), min(ends, default=None))

    def limits(self) -> PassLimits:
        """Return the ceilings of the pass that the command line and `[run] grace_s` set."""
        grace_s = self.config.run.grace_s if self.flags.grace_s is None else self.flags.grace_s
        flags = self.flags
        since = self.hours.opened_at(time.time()) if flags.share_opening else None
        return PassLimits(
            flags.rows, flags.usd, flags.tokens, flags.runtime_s, grace_s, flags.budget_span, since
        )

    def lines(self) -> list[str]:
        """Say in lines for the terminal what the run will do."""
        teacher = self.config.teacher
        proxies = _proxies(self.config)
        budgets: list[str] = []
        others: tuple[str, ...] = ()
        with contextlib.suppress(StoreError):  # the run itself reports it
            budgets = budget_texts(plan.budgets(self.config, self.root, self.limits()))
            others = (
                *other_settings.notes(self.store, self.config),
                *other_settings.teacher_notes(self.root, self.config),
            )
        return [
            f"teacher {teacher.model} at {teacher.base_url}",
            *(
                [f"shard   {sharding.note(self.config, is_allocated=self.flags.is_allocated)}"]
                if self.config.run.shard
                else []
            ),
            *(f"proxy   {host} (from the environment)" for host in proxies),
            f"terms   {self.verdict.summary()}",
            f"rows    {self.rows_total:,} (prompts x samples) into {self.store}",
            *([f"bad     {len(self.bad):,} lines passed over; the first: {self.bad[0]}"] if self.bad else []),
            *([f"skipped {note}"] if (note := self.skipped.note()) else []),
            *(f"budget  {text}" for text in budgets),
            *(f"note    {warning}" for warning in (*plan.warnings(self.config), *self.warnings, *others)),
        ]


def prepare(path: Path, flags: Overrides | None = None) -> Prepared:
    """Read the configuration, ask the terms, check the prompts. Sends nothing and writes nothing.

    Raises:
        ConfigError, PromptError, TermsRefused: before anything could cost.
    """
    config, flags = settings.load(path), flags or Overrides()
    flags.require(priced=config.teacher.price is not None)
    if flags.share_opening and not config.schedule.hours:
        raise ConfigError(
            "runs share an opening, and there are no opening hours",
            place="--share-opening",
            remedy="set [schedule] hours, or give --budget-per day",
        )
    root = path.resolve().parent
    verdict = gate(config, root)
    verdict.require()
    config = _with_epoch(_with_ca_file(_with_router_fields(config, verdict), root), flags)
    config, flags = with_shard(_with_transport(config, flags), flags)
    _check_store(root / config.store.path)
    _check_mirror(config, root)
    _check_read_also(config, watch=flags.watch)
    _check_requests(config, path)
    _check_canaries(config, root)
    rules = rules_of(config.prompts, root)
    with _prompts_of_judge(config, path):
        prompts = _check_prompts(config, root, rules, flags)
    return Prepared(
        path=path,
        config=config,
        flags=flags,
        rows_total=prompts.rows,
        input_tokens=prompts.input_tokens,
        verdict=verdict,
        key=api_key(config.teacher, dotenv.variables(root)),
        bad=prompts.bad,
        warnings=prompts.warnings,
        digest=prompts.digest,
        verifiers=_verifiers(config, root, watch=flags.watch),
        skipped=prompts.skipped,
        rules=rules,
    )


def _verifiers(config: HarvestConfig, root: Path, *, watch: bool) -> Verifiers | None:
    """Return the verifiers of `[accept]`, with every function imported; None without that table."""
    if config.accept is None:
        return None
    if watch:
        raise ConfigError(
            "a run that watches its prompts can't use [accept]: a file that changes is read again, and the "
            "answers to its prompts would count twice",
            place="accept",
            remedy="run without --watch; run again when there are new prompts, stored answers count",
        )
    verifiers = Verifiers(config.verify, root)
    verifiers.require_functions()
    return verifiers


def _check_store(store: Path) -> None:
    """Refuse a store that sealing would refuse after the money is spent: by its name, or by the terms."""
    _require_folder(store)
    require_utf8(store, "rename the folder, or set [store] path to another place")
    require_unsealed_permitted(store)


def _check_read_also(config: HarvestConfig, *, watch: bool) -> None:
    """Refuse to watch prompts with other stores: what these hold is copied once, before the pass."""
    if watch and config.store.read_also:
        raise ConfigError(
            "a run that watches its prompts can't read other stores",
            place="store.read_also",
            remedy="run without --watch; run again when there are new prompts",
        )


def _require_folder(store: Path) -> None:
    if store.exists() and not store.is_dir():
        raise ConfigError(
            f"{store} is a file, and a store is a folder", place="store.path", remedy="name another folder"
        )


def _check_mirror(config: HarvestConfig, root: Path) -> None:
    """Refuse a mirror in the store: its files would be foreign ones, and no copy of anything."""
    if config.store.mirror:
        require_elsewhere(root / config.store.path, config.store.mirror)


def _check_requests(config: HarvestConfig, path: Path) -> None:
    """Refuse a response format, sampling values or limits that no request could go through with."""
    response_format.check(config.sampling.response_format)
    request_builder.check(config)
    limits, endpoints = config.teacher.limits.model_dump(), len(config.teacher.base_urls)
    for name, value in limits.items():
        if value is not None and name.endswith("_per_minute"):
            place = f"{path}: teacher.limits"
            policies.require_rate_within_patience(name, value, endpoints, config.run.patience_s, place=place)
    for replica in config.teacher.replica:
        for name, value in replica.limits.model_dump().items():
            if value is not None and name.endswith("_per_minute"):
                place = f"{path}: teacher.replica {replica.base_url} limits"
                policies.require_rate_within_patience(name, value, 1, config.run.patience_s, place=place)


def _check_canaries(config: HarvestConfig, root: Path) -> None:
    """Read the canary prompts and ask the terms for `eval`: canaries evaluate the teacher."""
    if canary_task.check(config, root):
        evaluating = config.run.model_copy(update={"purpose": "eval"})
        gate(config.model_copy(update={"run": evaluating}), root).require()


@dataclass(frozen=True, slots=True)
class _PromptTotals:
    """What the prompt files hold: rows (prompts x samples), estimated input tokens, lines passed over.

    `digest` is that of the files, None where none is kept.
    """

    rows: int
    input_tokens: int
    bad: tuple[PromptError, ...] = ()
    warnings: tuple[str, ...] = ()
    digest: bytes | None = None
    skipped: SkippedPrompts = field(default_factory=SkippedPrompts)


def _check_prompts(config: HarvestConfig, root: Path, rules: RowRules, flags: Overrides) -> _PromptTotals:
    """Count the prompts; read them all, unless an earlier run completed the same files.

    Raises:
        PromptError: the first line that can't be used, once more than `max_bad` can't.
    """
    # Canaries are asked during a pass, a watching run never ends, and a retry sends: all need the whole pass.
    # How many rows [accept] asks depends on the answers, so it keeps no digest.
    # What [prompts] dedupe and [decontaminate] skip is listed anew by each run.
    asks_apart = config.canary.prompts is not None or config.accept is not None
    asks_apart = asks_apart or config.skips_prompts
    always_read = flags.watch or flags.retries or asks_apart
    digest = None if always_read else completed_files.digest_of(config, root, rules)
    known = completed_files.look_up(root / config.store.path, digest)
    if known is not None:
        return _PromptTotals(known.rows, known.input_tokens, digest=digest)
    # All ranks of a fleet check their prompts before one of them sends.
    part = Shard.parse(config.run.shard) if flags.is_allocated and config.run.shard else None
    totals = _read_prompts(config, root, rules, DuplicateIds(part), watch=flags.watch)
    return replace(totals, digest=digest)


def _read_prompts(
    config: HarvestConfig, root: Path, rules: RowRules, ids: DuplicateIds, *, watch: bool
) -> _PromptTotals:
    """Read every prompt; refuse two different prompts with one id, unless the run watches its files.

    Args:
        ids: collects ids; none has been collected yet.
    """
    if watch and config.skips_prompts:
        raise ConfigError(
            "a run that watches its prompts can't use [prompts] dedupe or [decontaminate]",
            place="prompts.dedupe" if config.decontaminate is None else "decontaminate",
            remedy="run without --watch",
        )
    screen, own = PromptScreen(config, root, rules), OwnPrompts(config)
    rows, tokens, notes = 0, 0, PromptNotes()
    max_bad = config.prompts.max_bad
    bad = BadLines(max_bad)
    # A watching run may name files that are not there yet.
    for files in [(pattern,) for pattern in config.prompts.files] if watch else [config.prompts.files]:
        try:
            for prompt in reader.read(files, root, bad, rules=rules):
                ids.note(prompt)
                if screen.is_skipped(prompt) or prompt not in own:
                    continue
                rows += 1
                notes.add(prompt)
                tokens += request_builder.input_tokens_of(prompt, config)
        except NoPrompts:
            if not watch:
                raise
    if not watch:
        ids.require_unique(lambda: reader.read(config.prompts.files, root, BadLines(max_bad), rules=rules))
    screen.close()
    samples = config.first_samples
    # A last turn of the assistant is what [score] is about, so it needs no note.
    lines = notes.lines() if config.score is None else ()
    return _PromptTotals(
        rows * samples, tokens * samples, tuple(bad.passed_over), lines, skipped=screen.skipped
    )


def _with_epoch(config: HarvestConfig, flags: Overrides) -> HarvestConfig:
    """Set the epoch of the command line: the same prompts are asked again under other keys."""
    if flags.epoch is None:
        return config
    return config.model_copy(update={"run": config.run.model_copy(update={"epoch": flags.epoch})})


def _with_transport(config: HarvestConfig, flags: Overrides) -> HarvestConfig:
    """Set the transport of the command line, and the bounds of batches where the file gives none.

    Raises:
        ConfigError: batches can't be used with this provider, or with --watch.
        MissingPackage: the extra `batch` is not installed.
    """
    if flags.transport is not None:
        run = config.run.model_copy(update={"transport": flags.transport})
        config = config.model_copy(update={"run": run})
    if config.run.transport is Transport.ONLINE:
        return config
    teacher, place = config.teacher, f'[run] transport = "{config.run.transport}"'
    require("batch", f'transport "{config.run.transport}"')
    if flags.watch:
        remedy = "run without --watch, on a timer: `harvester schedule --systemd` prints one"
        raise ConfigError("a run that watches its prompts can't use batches", place=place, remedy=remedy)
    if config.score is not None:
        raise ConfigError("[score] can't use batches", place=place, remedy='set [run] transport = "online"')
    if teacher.batch is not None:
        return config
    if provider := provider_presets.lacks_batches(teacher.preset.name, teacher.base_url):
        with_batches = ", ".join(provider_presets.names_with_batches())
        raise ConfigError(
            f"{provider} has no Batch API that is supported",
            place=place,
            remedy=f'set [run] transport = "online"; batches are supported with {with_batches}, and with '
            "any address that speaks OpenAI's: [teacher.batch] says so",
        )
    bounds = BatchApiSection()
    return config.model_copy(update={"teacher": teacher.model_copy(update={"batch": bounds})})


def _with_router_fields(config: HarvestConfig, verdict: terms.Verdict) -> HarvestConfig:
    """Add the fields that a router's terms require in every body; they win over the configuration."""
    if not verdict.body:
        return config
    extra = {**config.sampling.extra, **verdict.body}
    return config.model_copy(update={"sampling": config.sampling.model_copy(update={"extra": extra})})


def _proxies(config: HarvestConfig) -> list[str]:
    """Return host and port of the proxies that requests go through; never the credentials in their URLs."""
    if not config.run.trust_env:
        return []
    parts = [urlsplit(url) for url in config.teacher.base_urls]
    used = [getproxies().get(part.scheme) for part in parts if not proxy_bypass(part.hostname or "")]
    return sorted({urlsplit(url).netloc.rpartition("@")[2] for url in used if url})


def _with_ca_file(config: HarvestConfig, root: Path) -> HarvestConfig:
    """Make `ca_file` absolute, and check that it holds certificates."""
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
    """Ask the terms gate for the use `harvest`, for every endpoint of the teacher; the worst verdict counts.

    In the configuration's folder, `terms` adds to the shipped records, `permissions` holds permission files.

    Args:
        model: a model name that an answer gave; "" for the configured one.
    """
    recorded = terms.RecordedTerms.load(root, (root / config.store.path).resolve().parent)
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
        # Rows carry one lineage: duties of a replica's host alone would be lost.
        if (verdict.record_ids, verdict.permission_sha256) != (first.record_ids, first.permission_sha256):
            ids, first_ids = (", ".join(terms_of.record_ids) for terms_of in (verdict, first))
            why = f"replica {host} is under other terms ({ids}) than {first_host} ({first_ids})"
            return replace(verdict, permitted=False, reasons=(f"{why}: ask it as a teacher of its own",))
    return first


def require_still_permitted(prepared: Prepared, served_models: Collection[str]) -> None:
    """Check that the terms still permit a running harvest, also for the models that answer.

    Args:
        served_models: "model" or "model build", as answers name them.

    Raises:
        TermsRefused: they no longer do, or another model answers than they were asked for.
    """
    gate(prepared.config, prepared.root).require()
    for served_model in served_models:
        if served_model in {UNKNOWN_MODEL, OTHER_MODELS}:
            continue
        names = [name for name in (served_model.rpartition(" ")[0], served_model) if name]
        verdicts = [gate(prepared.config, prepared.root, name) for name in names]
        if not any(verdict.permitted for verdict in verdicts):
            first = verdicts[0]
            mismatch = f"asked for {prepared.config.teacher.model!r}, {printable(served_model)!r} answered"
            replace(first, reasons=tuple(f"{mismatch}: {reason}" for reason in first.reasons)).require()


def look_ahead(path: Path, flags: Overrides | None = None) -> Plan:
    """Return what a run of this configuration would do, also for a teacher that the terms refuse.

    Raises:
        ConfigError: what `run` would refuse before it asks the terms, such as batches that nobody offers.
    """
    flags = flags or Overrides()
    config, _ = with_shard(_with_transport(settings.load(path), flags), flags)
    root = path.resolve().parent
    response_format.check(config.sampling.response_format)
    _require_folder(root / config.store.path)
    _check_mirror(config, root)
    sqlite.require_journal(root / config.store.path)  # else all that is sealed would count as not held
    with _prompts_of_judge(config, path):
        outlook = plan.plan(config, root, gate(config, root), key_note=_key_note(config, root))
    return replace(outlook, shard=sharding.note(config) if config.run.shard else "")


@contextlib.contextmanager
def _prompts_of_judge(config: HarvestConfig, path: Path) -> Iterator[None]:
    """Say who writes the prompts of a judge, where they are missing."""
    try:
        yield
    except NoPrompts as error:
        if config.judge is not None:
            error.message = "the prompts of this judge are not written yet"
            error.remedy = (
                f"`harvester judge {shell_word(path)} --prompts-only` writes them, and asks nothing"
            )
        raise


def _key_note(config: HarvestConfig, root: Path) -> str:
    """Why a run would find no usable API key; "" if it would find one or needs none."""
    try:
        api_key(config.teacher, dotenv.variables(root))
    except ConfigError as error:
        return str(error)
    return ""
