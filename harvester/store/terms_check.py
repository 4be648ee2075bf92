"""Re-check the terms before sealing and export, using the lineage stored with the rows.

The first check (before a request is sent) is in `run.prepare`, the last one (training) in the trainer. Terms
may have changed or expired since the harvest; a refusal here leaves every answer where it is.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from harvester.errors import TermsRefused
from harvester.store.journal import sqlite
from harvester.terms import gate, lineage
from harvester.terms.gate import RecordedTerms, Use

if TYPE_CHECKING:
    from harvester.store.reader import Corpus
    from harvester.store.shards.schema import Sample

# Largest number of rows that a message names.
MOST_ROWS_NAMED = 5


def require_permitted(corpus: Corpus, use: Use, *beside: Path) -> None:
    """Do nothing when the lineage of every row permits this use today.

    Args:
        beside: folders from which own records and permissions are looked for; see `terms.places`.

    Raises:
        TermsRefused: exit 77; names record, gist, URL, day seen, and the remedies.
    """
    lineages = corpus.lineages(sealed=use != "seal")
    facts = corpus.distinct(lineage.FACT_COLUMNS, sealed=use != "seal")
    if not lineages and not facts:  # there are no rows
        return
    verdicts = gate.judge_lineages(RecordedTerms.load(*beside), lineages, facts, use=use)
    refused = [verdict for verdict in verdicts if not verdict.permitted]
    if not refused:
        return
    try:
        replace(
            refused[0],
            record_ids=tuple(dict.fromkeys(i for verdict in refused for i in verdict.record_ids)),
            reasons=tuple(dict.fromkeys(reason for verdict in refused for reason in verdict.reasons)),
        ).require()
    except TermsRefused as error:
        if rows := _rows_of_other_models(corpus, sealed=use != "seal"):
            error.remedy += (
                f"; or remove the rows that another model answered ({', '.join(rows)}) with"
                f" `harvester purge STORE --prompt-id ID`"
            )
        raise


def _rows_of_other_models(corpus: Corpus, *, sealed: bool) -> list[str]:
    """Return prompt ids of rows that a model answered whose name does not begin with the one asked for.

    Without `sealed` only unsealed rows are read. At most five are returned.
    """
    columns = ("prompt_id", "request_model", "response_model")
    with contextlib.ExitStack() as stack:
        if sealed:
            rows: Iterable[Sample] = corpus.samples(columns)
        else:
            _, rows = stack.enter_context(corpus.snapshot(columns))
        other = (
            row.prompt_id
            for row in rows
            if row.response_model and not row.response_model.startswith(row.request_model)
        )
        return list(itertools.islice(other, MOST_ROWS_NAMED))


def require_unsealed_permitted(store: Path) -> None:
    """Check the terms for answers that an earlier run left unsealed: the next run would seal them.

    Raises:
        TermsRefused: as `require_permitted`; no request was sent.
    """
    if sqlite.has_journal(store):
        from harvester.store.reader import Corpus

        require_permitted(Corpus.open(store), "seal", store.resolve().parent)


def require_lineage(corpus: Corpus) -> None:
    """Do nothing when the lineage of every row is present and agrees with the row.

    Raises:
        TermsRefused: exit 77.
    """
    disagreements = lineage.disagreements(corpus.lineages(), corpus.distinct(lineage.FACT_COLUMNS))
    if disagreements:
        raise TermsRefused(
            f"the rows' lineage is missing or contradicts them: {'; '.join(disagreements[:5])}",
            place=str(corpus.folder),
            remedy="take the shards as the harvester wrote them; a hand-made file has no lineage",
        )
