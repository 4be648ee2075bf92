"""Find the token store of a corpus, or make it: lock, render what is missing, choose the rows, clean up."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from harvester.store.reader import Corpus
from harvester.store.view import CorpusView
from harvester.system import failpoints
from harvester.system.files import try_lock
from harvester.terms.lineage import FACT_COLUMNS
from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.chat_template import Renderer
from trainer.data.tokens import part, soft_files, store_names, token_store, workers
from trainer.data.tokens.disk_errors import disk_errors
from trainer.data.tokens.part_reader import not_as_written
from trainer.data.tokens.row_ranges import Unit, UnitRenderer, units_of
from trainer.data.tokens.token_store import FACTS, PARTS, SELECTIONS, CorpusTerms, TokenStore
from trainer.model import weights
from trainer.provenance import terms_check

# Missing rows from which several processes render them: each of them first loads the tokenizer for seconds.
PARALLEL_ROWS = 40_000
# Stores in one cache folder, and selections in one store, that are kept; those used last.
KEPT_STORES = KEPT_SELECTIONS = 4

_LOCK, _IN_USE = "LOCK", "IN_USE"

# Reports progress: units done, units in all, what is done.
Progress = Callable[[int, int, str], None]


def no_progress(_done: int, _total: int, _what: str) -> None:
    """Report nothing."""


def prepare(
    config: TrainConfig, renderer: Renderer, on_progress: Progress = no_progress, processes: int = 0
) -> TokenStore:
    """Open the token store of a corpus; render first what it lacks.

    What is damaged is rendered again. A store that another process makes is waited for.

    Args:
        processes: that render; 0: one for each core that may be used, where that pays.

    Raises:
        DataError: no corpus, or no row to learn from. TermsRefused: see `terms_check.require_permission`.
        StudentError: the chat template refuses rows.
        StoreFull, StoreError: the store can't be written or read. ProcessLost: a process was killed.
    """
    dataset.require_folder(config)
    corpus = Corpus.open(config.corpus)
    home = config.cache / store_names.store_key(config, renderer, weights.vocabulary_size(config.base))
    with disk_errors(config.cache):
        store = _opened(config, corpus, home)
        if store is None:
            home.mkdir(parents=True, exist_ok=True)
            with _locked(home, on_progress):
                store = _opened(config, corpus, home)  # another process has made it meanwhile
                if store is None:
                    key = _make(config, corpus, home, renderer, on_progress, processes)
                    _remove_old(home)
                    store = _open_held(home, key)
    if store is None:
        raise not_as_written(home)
    terms_check.require_permission(config, store.terms.lineages, store.terms.facts)
    notes = (*store.rows.mixed, *dataset.beyond_decontamination(config))
    return replace(store, rows=replace(store.rows, mixed=notes))


def _opened(config: TrainConfig, corpus: Corpus, home: Path) -> TokenStore | None:
    """Open the store of the corpus as it is now, and note that it was used; None where it isn't whole."""
    if not (home / SELECTIONS).is_dir():
        return None
    with corpus.view(()) as view:
        names = [unit.name for unit in units_of(corpus, view, has_signal=_has_signal(config))]
    key = store_names.selection_key(config, names)
    store = _open_held(home, key)
    if store is not None:
        with contextlib.suppress(OSError):  # a cache that others own may be read only
            os.utime(home / SELECTIONS / key / FACTS)
            os.utime(home / _LOCK)
    return store


def _open_held(home: Path, key: str) -> TokenStore | None:
    """Open a selection; others see that the store is in use while it is read."""
    handle = _hold(home)
    store = token_store.open_selection(home, home / SELECTIONS / key)
    if store is not None:
        store.rows.reader.keep_open(handle)
    elif handle >= 0:
        os.close(handle)
    return store


def _make(
    config: TrainConfig,
    corpus: Corpus,
    home: Path,
    renderer: Renderer,
    on_progress: Progress,
    processes: int,
) -> str:
    """Render what is missing and choose the rows; return the key of the selection."""
    rendering = UnitRenderer(config, home / PARTS, renderer)
    with corpus.view(rendering.tail_columns) as view:
        terms = CorpusTerms(corpus.lineages(), corpus.distinct(FACT_COLUMNS))
        terms_check.require_permission(config, terms.lineages, terms.facts)
        units = list(units_of(corpus, view, has_signal=_has_signal(config)))
        _render_missing(config, rendering, home, units, view, on_progress, processes)
    names = [unit.name for unit in units]
    key = store_names.selection_key(config, names)
    rows = sum(unit.rows for unit in units)
    on_progress(rows, rows, "choosing rows")
    write_soft = None
    if _has_signal(config):
        processes = processes or _useful_processes(units)
        write_soft = partial(soft_files.write, config, renderer, processes)
    token_store.write_selection(
        home, home / SELECTIONS / key, names, config, rendering.fault_names, terms, write_soft
    )
    return key


def _has_signal(config: TrainConfig) -> bool:
    return config.train.soft_targets != "off"


def _render_missing(  # noqa: PLR0913 - as `_make`
    config: TrainConfig,
    rendering: UnitRenderer,
    home: Path,
    units: Sequence[Unit],
    view: CorpusView,
    on_progress: Progress,
    processes: int,
) -> None:
    (home / PARTS).mkdir(exist_ok=True)
    whole = token_store.read_parts([home / PARTS / unit.name for unit in units])
    missing = [unit for unit, facts in zip(units, whole, strict=True) if facts is None]
    rows = sum(unit.rows for unit in units)
    done = rows - sum(unit.rows for unit in missing)
    on_progress(done, rows, "tokenising")
    # Unsealed answers are read first, by this process: its snapshot has them.
    of_tail = [unit for unit in missing if unit.entry is None]
    sealed = [unit for unit in missing if unit.entry is not None]
    if not of_tail:
        for _ in view.unsealed:
            pass
    for unit in of_tail:
        rendering.write(unit, view)
        done += unit.rows
        on_progress(done, rows, "tokenising")
    processes = min(processes or _useful_processes(sealed), len(sealed))
    if processes > 1:
        for unit, _ in workers.run(partial(_writer, config, home / PARTS), sealed, processes):
            done += unit.rows
            on_progress(done, rows, f"tokenising in {processes} processes")
        return
    for unit in sealed:
        rendering.write(unit)
        done += unit.rows
        on_progress(done, rows, "tokenising")


def _writer(config: TrainConfig, parts: Path) -> Callable[[Unit], None]:
    """Return what renders units in another process."""
    return UnitRenderer(config, parts).write


def _useful_processes(units: Sequence[Unit]) -> int:
    enough = sum(unit.rows for unit in units) >= PARALLEL_ROWS
    return len(os.sched_getaffinity(0)) if enough else 1


@contextlib.contextmanager
def _locked(home: Path, on_progress: Progress) -> Iterator[None]:
    """Hold the lock of a store; wait for another process that makes it."""
    handle = os.open(home / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        if not try_lock(handle):
            on_progress(0, 0, "waiting for another process that tokenises this corpus")
            fcntl.flock(handle, fcntl.LOCK_EX)
        failpoints.reach("tokens.locked")
        yield
    finally:
        os.close(handle)


def _hold(home: Path) -> int:
    """Return a handle by which others see that the store is in use; -1 where the folder is read only."""
    try:
        handle = os.open(home / _IN_USE, os.O_RDONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(handle, fcntl.LOCK_SH)
    except OSError:
        return -1
    return handle


def _is_in_use(home: Path) -> bool:
    """Whether a process reads the store."""
    try:
        handle = os.open(home / _IN_USE, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        return not try_lock(handle)
    finally:
        os.close(handle)


def _remove_old(home: Path) -> None:
    """Remove what was used longest ago, from this store and from its cache folder, unless it is in use.

    This process holds the lock of the store. What can't be removed stays.
    """
    for hidden in (home / PARTS).glob(".*"):  # of a process that was killed
        shutil.rmtree(hidden, ignore_errors=True)
    if not _is_in_use(home):
        _remove_selections(home)
    stores = sorted(home.parent.glob(f"*/{_LOCK}"), key=_last_use, reverse=True)
    for lock in stores[KEPT_STORES:]:
        handle = os.open(lock, os.O_RDWR | os.O_CLOEXEC)
        try:
            if lock.parent != home and try_lock(handle) and not _is_in_use(lock.parent):
                shutil.rmtree(lock.parent, ignore_errors=True)
        finally:
            os.close(handle)


def _remove_selections(home: Path) -> None:
    """Remove old selections, and the parts that no selection names."""
    selections = sorted((home / SELECTIONS).glob(f"*/{FACTS}"), key=_last_use, reverse=True)
    named: set[str] = set()
    for facts in selections[:KEPT_SELECTIONS]:
        named.update((part.read_checked(facts) or {}).get("parts", ()))
    for facts in selections[KEPT_SELECTIONS:]:
        shutil.rmtree(facts.parent, ignore_errors=True)
    for folder in (home / PARTS).iterdir():
        if folder.name not in named:
            shutil.rmtree(folder, ignore_errors=True)


def _last_use(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0
