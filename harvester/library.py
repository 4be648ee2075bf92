"""Offer the harvester to Python programs: `import harvester`, then `harvester.harvest("harvest.toml")`.

The commands call the same functions. None of them needs the main thread, a free event loop, or changes
anything of the process: no signal handlers, environment, memory settings or imports of others. Errors are
those of `harvester.errors`, with place and remedy.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, Unpack

from harvester.config.number_limits import MAX_EXACT_INT, MAX_USD, YEAR_S
from harvester.errors import UsageError
from harvester.store import paths
from harvester.system.background import Running, StopRequests
from harvester.system.command_line.known_options import with_known_options
from harvester.system.objects.url import require_local, url_in

if TYPE_CHECKING:
    from harvester.config.overrides import Overrides
    from harvester.export.curate import CurateCounts
    from harvester.run.endings import Summary
    from harvester.run.planning.plan_result import Plan
    from harvester.run.prepare import Prepared
    from harvester.store.samples import Samples

FilePath = str | os.PathLike[str]
Status = Mapping[str, Any]
Value = TypeVar("Value")
Choice = TypeVar("Choice", bound=Enum)

_STORE_REMEDY = "name the folder of a store, or the harvest.toml that sets it"


class HarvestOptions(TypedDict, total=False):
    """Options of a harvest, named after those of `harvester run`; left out, the file decides.

    Attributes:
        limit: most new answers of this run. max_usd, max_tokens: most that it may cost and use.
        budget_per: what these two hold for: "run", "store", "day" or "month".
        share_opening: runs since `[schedule] hours` began count as one, and share the ceilings of a run.
        max_runtime: time after which it stops, in seconds or as "90s", "30m", "2h".
        grace: seconds to wait for answers in flight when it is stopped.
        epoch: a new number asks every prompt once more.
        retry: outcomes of stored answers to ask again for: "empty", "invalid", "filtered" and others.
        retry_dead: ask again for failed rows.
        watch: keep running, and take prompt files that appear or grow.
        finish_by: when it stops, as "2026-11-27T18:00+01:00" or an aware datetime.
        metrics_file: receives Prometheus text every 15 s. otel: send metrics by OTLP.
        transport: "online", "batch" or "hybrid".
        shard: "2/8" asks the second of eight parts of the prompts, into a store of its own.
    """

    limit: int | None
    max_usd: float | None
    max_tokens: int | None
    budget_per: Literal["run", "store", "day", "month"]
    share_opening: bool
    max_runtime: float | str | None
    grace: float | None
    epoch: int | None
    retry: str | Collection[str] | None
    retry_dead: bool
    watch: bool
    finish_by: str | datetime | None
    metrics_file: FilePath | None
    otel: bool
    transport: Literal["online", "batch", "hybrid"] | None
    shard: str | None


@dataclass(frozen=True, slots=True)
class HarvestEvent:
    """How far a harvest is; five of them come a second.

    Attributes:
        state: "running", "on hold", "draining", "sealing", or how it ended.
        rows_done, rows_total: prompts x samples.
        answers_stored: by this run; from_cache: rows that were answered before; failed: dead letters.
        cost_usd: of this run.
        status: all that status.json holds; see FORMAT.md.
    """

    state: str
    rows_done: int
    rows_total: int
    answers_stored: int
    from_cache: int
    failed: int
    cost_usd: float
    status: Status = field(repr=False)

    @classmethod
    def of(cls, status: Status) -> HarvestEvent:
        """Return the event of a status."""
        from harvester.observe.status import rows_done

        return cls(
            state=str(status["state"]),
            rows_done=rows_done(status),
            rows_total=status["rows_total"],
            answers_stored=status["answers_stored"],
            from_cache=status["from_cache"],
            failed=status["dead"],
            cost_usd=status["cost_microusd"] / 1e6,
            status=status,
        )


OnHarvestEvent = Callable[[HarvestEvent], object]


def harvest(
    config: FilePath,
    *,
    on_event: OnHarvestEvent | None = None,
    progress: bool | None = None,
    **options: Unpack[HarvestOptions],
) -> Summary:
    """Harvest until all rows are done or a limit is reached, as `harvester run`; the same call resumes.

    Ctrl-C lets the answers in flight arrive, seals them, and is raised then.

    Args:
        config: path of a harvest.toml.
        on_event: is called with each event, in the thread of the harvest. What it raises ends the harvest as
            Ctrl-C does.
        progress: show two bars: in the notebook (with ipywidgets), or on a terminal. None: where they can be
            shown.

    Returns:
        How it ended: `ending`, `exit_code` (that of the command; 10 at a limit), `counts`.

    Raises:
        ConfigError, PromptError, TermsRefused: nothing was sent.
        HarvesterError: what ended the run; what was paid is stored.
    """
    return start(config, on_event=on_event, progress=progress, **options).result()


def start(
    config: FilePath,
    *,
    on_event: OnHarvestEvent | None = None,
    progress: bool | None = False,
    **options: Unpack[HarvestOptions],
) -> Running[HarvestEvent, Summary]:
    """Start a harvest in a thread of its own; see `harvest`.

    If the program ends meanwhile, it waits until the answers in flight have arrived and are sealed.

    Returns:
        The harvest that runs: `async for event in running`, `await running`, `running.result()`,
        `running.stop()`.
    """

    path = _path(config)
    if on_event is not None and not callable(on_event):
        raise UsageError(f"{on_event!r} can't be called", place="on_event", remedy="give a function")

    def work(emit: Callable[[HarvestEvent], None], requests: StopRequests) -> Summary:
        from harvester.system.open_files import limit_kept

        ready = prepared(path, options)
        with limit_kept(), _bars(progress) as show:

            def watch(status: Status) -> None:
                show(status)
                emit(HarvestEvent.of(status))

            return run_prepared(ready, watch, requests=requests)

    return Running("harvest", work, on_event)


@contextlib.contextmanager
def _bars(wanted: bool | None) -> Iterator[Callable[[Status], None]]:
    if wanted is False:
        yield lambda _: None
        return
    from harvester.observe import progress

    with progress.where_it_can_be_shown("harvest") as show:
        yield show


@with_known_options
def plan(config: FilePath, *, shard: str | None = None) -> Plan:
    """Return rows, cost, duration and terms of a harvest, as `harvester plan`; sends nothing.

    Args:
        config: path of a harvest.toml.
        shard: "2/8" plans the second of eight parts.

    Raises:
        ConfigError, PromptError: what `harvest` would refuse.
    """
    from harvester.run import prepare

    return prepare.look_ahead(_path(config), overrides(HarvestOptions(shard=shard)))


@with_known_options
def open(
    store: FilePath,
    *,
    columns: Sequence[str] | None = None,
    where: str | Mapping[str, Any] = "",
    include_unsealed: bool = True,
) -> Samples:
    """Open the samples of a store, also while a run writes.

        for sample in harvester.open("my-run/store", where={"outcome": "ok"}): ...
        harvester.open("my-run/store", columns=["prompt_id", "completion"]).to_pandas()
        harvester.open("s3://bucket/my-run")

    Args:
        store: folder of a store or of shards, a harvest.toml, whose store is meant, or the URL of a published
            store, which is downloaded into the cache as it is now.
        columns: that are read; None: all. data/FORMAT.md lists them.
        where: which samples, as `where` in curate.toml.
        include_unsealed: also answers that are not in a shard yet.

    Raises:
        UsageError: no store is there, or a column or condition can't be used.
        StoreError: the store is damaged. RemoteStoreError: the storage can't be reached, or refuses.
    """
    from harvester.store.samples import Samples

    if isinstance(columns, str):
        raise UsageError(f"{columns!r} is a text", place="columns", remedy=f"name a list: [{columns!r}]")
    folder = readable_store(_path(store))
    return Samples(folder, columns=columns, where=where, include_unsealed=include_unsealed)


@with_known_options
def curate(config: FilePath, *, out: FilePath | None = None, page: FilePath | None = None) -> CurateCounts:
    """Filter answers into a curated corpus, as `harvester curate`.

    Args:
        config: path of a curate.toml.
        out: folder of the corpus instead of that in the file.
        page: HTML page to write: kept rows beside dropped ones, and what each filter drops by itself.

    Returns:
        The counts: `kept`, `dropped` by reason, `out`.

    Raises:
        ConfigError, TermsRefused, StoreError: nothing was written.
    """
    from dataclasses import replace

    from harvester.export import curate as curation
    from harvester.export import curation_page
    from harvester.system import output_path

    path = _path(config)
    settings = curation.load(path)
    if out is not None:
        settings = replace(settings, out=Path(out))
    if page is None:
        return curation.curate(settings)
    page = Path(page)
    output_path.check(page, settings.corpus)
    curation_page.check_target(page)
    counts = curation.curate(settings, curation.load(path).filters)
    with output_path.replacing(page, settings.corpus) as file:
        file.write(curation_page.render(settings, counts).encode("utf-8", "replace"))
    return counts


def _path(value: FilePath) -> Path:
    """Return a path.

    Raises:
        UsageError: it is none.
    """
    try:
        return Path(value)
    except TypeError:
        raise UsageError(f"{value!r} is no path", remedy="give the path of a file or folder") from None


def prepared(config: Path, options: HarvestOptions, name_of: Callable[[str], str] = str) -> Prepared:
    """Check a harvest as far as that costs nothing.

    Args:
        name_of: how the caller's user calls an option, for errors.

    Raises:
        ConfigError, PromptError, TermsRefused: the harvest can't start.
        UsageError: an option can't be used.
    """
    from harvester.run import prepare

    return prepare.prepare(config, overrides(options, name_of))


def store_of(config: Path, options: HarvestOptions, name_of: Callable[[str], str] = str) -> Path:
    """Return the folder of the store that a harvest writes, which may not exist yet.

    Args:
        name_of: how the caller's user calls an option, for errors.

    Raises:
        ConfigError, UsageError: the file or an option can't be used.
    """
    from harvester.config import config as settings
    from harvester.run.sharding import with_shard

    loaded, _ = with_shard(settings.load(config), overrides(options, name_of))
    return (config.resolve().parent / loaded.store.path).resolve()


def run_prepared(
    ready: Prepared,
    watch: Callable[[Status], None],
    *,
    note: Callable[[str], None] = lambda _: None,
    requests: StopRequests | None = None,
) -> Summary:
    """Run a harvest on an event loop of this thread; export its metrics meanwhile where that is asked for.

    Args:
        watch: is called with each status.
        note: is called with what stands in the way of the metrics.
        requests: how it is ended; None: by the signals of the process, if this is its main thread.

    Raises:
        HarvesterError: what ended the run.
    """
    from harvester.run import job, scoring

    flags, teacher = ready.flags, ready.config.teacher
    watchers = [watch]
    with contextlib.ExitStack() as stack:
        if flags.metrics_file is not None:
            from harvester.observe.report.prometheus import updating_textfile

            stack.enter_context(updating_textfile(ready.store, flags.metrics_file, note))
        if flags.otel:
            from harvester.observe.otel import exporting

            watchers.append(stack.enter_context(exporting(teacher.base_url, teacher.model, note)))

        def notify(status: Status) -> None:
            for each in watchers:
                each(status)

        if ready.config.score is not None:
            return asyncio.run(scoring.run(ready, notify, requests))
        return asyncio.run(job.run(ready, notify, requests=requests))


# The least and the most that an option may be.
_RANGES: Mapping[str, tuple[float, float]] = {
    "limit": (1, MAX_EXACT_INT),
    "max_usd": (0, MAX_USD),
    "max_tokens": (1, MAX_EXACT_INT),
    "grace": (0, YEAR_S),
    "epoch": (0, MAX_EXACT_INT),
}


_WHOLE = frozenset({"limit", "max_tokens", "epoch"})


def overrides(options: HarvestOptions, name_of: Callable[[str], str] = str) -> Overrides:
    """Return options as what overrides the file.

    Args:
        name_of: how the caller's user calls an option, for errors.

    Raises:
        UsageError: an option is unknown, of another type, or out of its range.
    """
    from harvester.config.budget_spans import BudgetSpan
    from harvester.config.overrides import Overrides
    from harvester.config.transport import Transport

    values: dict[str, Any] = dict(options)
    _check_names_and_numbers(values, name_of)

    def parsed(name: str, parse: Callable[[Any], Value]) -> Value | None:
        value = values.get(name)
        if value is None:
            return None
        try:
            return parse(value)
        except ValueError as error:
            raise UsageError(str(error), place=name_of(name)) from None
        except (TypeError, AttributeError):  # of another type
            raise UsageError(f"{value!r} can't be used", place=name_of(name)) from None

    return Overrides(
        rows=values.get("limit"),
        usd=values.get("max_usd"),
        tokens=values.get("max_tokens"),
        runtime_s=parsed("max_runtime", _seconds),
        grace_s=values.get("grace"),
        epoch=values.get("epoch"),
        watch=values.get("watch", False),
        finish_by=parsed("finish_by", _instant),
        metrics_file=parsed("metrics_file", Path),
        otel=values.get("otel", False),
        budget_span=parsed("budget_per", partial(_member, BudgetSpan)) or BudgetSpan.RUN,
        share_opening=values.get("share_opening", False),
        retry=parsed("retry", outcomes) or frozenset(),
        retry_dead=values.get("retry_dead", False),
        transport=parsed("transport", partial(_member, Transport)),
        shard=parsed("shard", _text),
    )


def _check_names_and_numbers(values: Mapping[str, Any], name_of: Callable[[str], str]) -> None:
    for name in values:
        if name not in HarvestOptions.__annotations__:
            known = ", ".join(HarvestOptions.__annotations__)
            raise UsageError("there is no such option", place=name_of(name), remedy=f"known: {known}")
    for name, (least, most) in _RANGES.items():
        value = values.get(name)
        kind: Any = int if name in _WHOLE else int | float
        is_number = isinstance(value, kind) and not isinstance(value, bool)
        if value is not None and not (is_number and least <= value <= most):
            number = "a whole number" if name in _WHOLE else "a number"
            remedy = f"name {number} from {least:,} to {most:,.0f}"
            raise UsageError(f"{value!r} can't be used", place=name_of(name), remedy=remedy)


def _member(kind: type[Choice], value: object) -> Choice:
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{value!r} is none of {', '.join(each.value for each in kind)}") from None


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _seconds(value: float | str) -> float:
    from harvester.config import schedule

    return schedule.seconds(value) if isinstance(value, str) else float(value)


def _instant(value: str | datetime) -> float:
    from harvester.config import schedule

    return schedule.instant(value if isinstance(value, str) else value.isoformat())


def outcomes(value: str | Collection[str]) -> frozenset[str]:
    """Return the outcomes in a list, or in a text with commas.

    Raises:
        ValueError: one of them is not an outcome that can be asked again.
    """
    from harvester.api.types import Outcome

    known = [outcome.value for outcome in Outcome if outcome not in (Outcome.OK, Outcome.SCORED)]
    parts = value.split(",") if isinstance(value, str) else value
    names = [name.strip() for name in parts if name.strip()]
    for name in names:
        if name not in known:
            raise ValueError(f"{name!r} is no outcome to ask again for; those are {', '.join(known)}")
    if not names:
        raise ValueError(f"name at least one outcome of {', '.join(known)}")
    return frozenset(names)


def store_folder(path: Path) -> Path:
    """Return the store that `path` means: a store itself, a harvest.toml, or a folder with a harvest.toml.

    Raises:
        UsageError: nothing is at `path`, or a file, or a folder that is no store, or the store of a
            harvest.toml does not exist.
    """
    require_local(path)
    if not path.exists():
        raise UsageError("no such file or folder", place=str(path), remedy=_STORE_REMEDY)
    if path.suffix != ".toml" and not path.is_dir():
        raise UsageError("is a file, and a store is a folder", place=str(path), remedy=_STORE_REMEDY)
    config_file = path if path.suffix == ".toml" else path / "harvest.toml"
    if _is_store(path):
        return path
    if not config_file.is_file():
        raise UsageError("no store is here", place=str(path), remedy=_STORE_REMEDY)
    from harvester.config import config

    store = config_file.parent / config.load(config_file).store.path
    if not store.is_dir():
        if store.exists():
            raise UsageError(
                f"its store {store} is a file, and a store is a folder",
                place=str(config_file),
                remedy="name another folder in [store] path",
            )
        raise UsageError(
            f"its store {store} does not exist yet",
            place=str(config_file),
            remedy="`harvester run` with this file makes it",
        )
    if not _is_store(store):
        raise UsageError(
            f"its store {store} is a folder without a store",
            place=str(config_file),
            remedy="`harvester run` with this file makes it",
        )
    return store


def readable_store(path: Path) -> Path:
    """Return the store that `path` means, to be read only; a published one is downloaded into the cache.

    Raises:
        UsageError: no store is there, or the URL can't be used. RemoteStoreError, StoreCorrupt by cause.
    """
    if not url_in(path):
        return store_folder(path)
    from harvester.store.published import local_store

    return local_store(path)


def _is_store(path: Path) -> bool:
    """Whether a folder holds a part of a store, or shards. True where that can't be seen."""
    parts = (paths.JOURNAL, paths.SHARDS, paths.STATUS, paths.LOCK, paths.QUARANTINE)
    try:
        return any((path / part).exists() for part in parts) or any(path.glob("*.parquet"))
    except OSError:
        return True
