"""Find the rows that `--retry` and `--retry-dead` ask again, and take their answers out of the store."""

from __future__ import annotations

import itertools

from harvester.api.request_builder import requests
from harvester.prompts.feed import PromptFeed
from harvester.run.prepare import Prepared
from harvester.store.journal.journal import Journal
from harvester.store.reuse import ReusableAnswer, ReuseIndex, find_answers

# Requests looked up in the store at once.
CHUNK = 1000


def reopen_rows(journal: Journal, prepared: Prepared) -> int:
    """Reopen the rows of this run's prompts that its options name; return how many answers that were.

    Raises:
        PromptError: a prompt that can't be used. StoreError, ShardsInUse: nothing was lost.
    """
    config, root = prepared.config, prepared.root
    if not prepared.flags.retries:
        return 0
    from harvester.store.maintain.reopen import reopen

    reuse, keys = ReuseIndex.of(journal, config), set()
    feed = requests(
        PromptFeed(config, root, skipped=prepared.skipped, rules=prepared.rules).prompts(), config
    )
    while chunk := list(itertools.islice(feed, CHUNK)):
        held = find_answers(journal, chunk, reuse).values()
        keys |= {answer.key for answer in held if _is_wanted(answer, prepared)}
    return reopen(journal, prepared.store, keys)


def _is_wanted(answer: ReusableAnswer, prepared: Prepared) -> bool:
    if answer.held.state == "dead":
        return prepared.flags.retry_dead
    return answer.held.outcome in prepared.flags.retry
