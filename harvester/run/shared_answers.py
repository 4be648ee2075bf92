"""Copy what other stores hold for the prompts of a run into its store, before anything is asked.

After that the answers are stored ones like all others: for the pass, `status`, exports and the trainer.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from functools import partial

from harvester.api.request_builder import requests
from harvester.api.types import Request
from harvester.prompts import completed_files
from harvester.prompts.feed import PromptFeed
from harvester.run.prepare import Prepared
from harvester.store.journal.group_commit import GroupCommit, on_writer
from harvester.store.journal.journal import Journal
from harvester.store.reuse import ReuseIndex, find_answers
from harvester.system.counted import counted
from harvester.terms.gate import RecordedTerms

# Requests that are looked up, and whose answers are copied, at once: some 20 MB of prompts.
WINDOW = 10_000


async def copy_shared(prepared: Prepared, writer: GroupCommit) -> tuple[str, ...]:
    """Copy the answers of `[store] read_also`; return a line for each store: how many, or that none fits.

    Raises:
        PromptError: a prompt that can't be used. TermsRefused: the terms of an answer do not permit it.
        ConfigError, StoreError: a store can't be read; StoreFull: this one can't be written.
    """
    if not prepared.config.store.read_also:
        return ()
    known = await on_writer(writer, lambda journal: completed_files.recall(journal, prepared.digest))
    if known is not None:  # every row is held
        return ()
    from harvester.store.maintain.other_store import open_others

    others = open_others(prepared.config, prepared.root, mock=prepared.verdict.mock)
    try:
        recorded = RecordedTerms.load(prepared.store.resolve().parent)
        copied = dict.fromkeys(others, 0)
        for window in _windows(prepared):
            for other in others:
                wanted = await on_writer(writer, partial(_missing, prepared, window))
                keys = other.find(wanted)
                by_key = {keys[request.key]: request for request in wanted if request.key in keys}
                if by_key:
                    copied[other] += await on_writer(writer, partial(other.copy, by_key, recorded))
        totals = await on_writer(writer, lambda journal: journal.totals())
        # Where copies lie here, an earlier run took what fits, and rows that are left are no surprise.
        notes = [other.note() for other in others] if not totals.copied else []
    finally:
        for other in others:
            other.close()
    lines = (
        f"copied {counted(count, 'answer')} from {os.path.normpath(other.path)}, and asked for none of them"
        + (" (also rows that this run did not reach)" if prepared.flags.rows is not None else "")
        for other, count in copied.items()
        if count
    )
    return (*lines, *(note for note in notes if note))


def _windows(prepared: Prepared) -> Iterator[list[Request]]:
    """Yield the requests of a run, further samples of `[accept]` among them."""
    feed = PromptFeed(
        prepared.config, prepared.root, skipped=prepared.skipped, rules=prepared.rules
    ).prompts()
    built = requests(feed, prepared.config, range(prepared.config.most_samples))
    while window := list(itertools.islice(built, WINDOW)):
        yield window


def _missing(prepared: Prepared, window: list[Request], journal: Journal) -> list[Request]:
    """Return the requests, each key once, for which this store holds no answer."""
    held = find_answers(journal, window, ReuseIndex.of(journal, prepared.config))
    missing: dict[bytes, Request] = {}
    for request in window:
        if request.key not in held or held[request.key].held.state == "dead":
            missing.setdefault(request.key, request)
    return list(missing.values())
