"""Score texts under `[score]`: prove with one cheap request how the server can be asked, then run.

A probe is a row of the store like any other: it passes the same checks and limits, is charged to the budget,
and is not sent again once it is stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import orjson

from harvester.api.request_builder import ScoreRequestBuilder
from harvester.api.scoring.request_forms import Way, offered_by_prompt, probe_line
from harvester.api.types import Outcome, Prompt, Request
from harvester.config.config import HarvestConfig
from harvester.errors import Ending, TeacherRefused
from harvester.prompts import reader
from harvester.run import job
from harvester.run.background.heartbeat import Watch
from harvester.run.endings import Summary
from harvester.run.prepare import Prepared
from harvester.store.journal import sqlite
from harvester.store.journal.journal import Journal
from harvester.store.journal.records import HeldAnswer
from harvester.store.journal.sqlite import disk_error
from harvester.system import own_files
from harvester.system.background import StopRequests

# File of the probe, in the store's folder.
PROBE_FILE = "score-probe.jsonl"
# Statuses of a server that has no such route, method or field.
_NOT_OFFERED = frozenset({400, 404, 405, 415, 422, 501})


async def run(prepared: Prepared, watch: Watch, requests: StopRequests | None = None) -> Summary:
    """Probe the ways in turn, then score all texts by the first that is proved.

    Args:
        watch, requests: as of `job.run`.

    Raises:
        TeacherRefused: the server offers none of them; the message says what was tried.
        HarvesterError: as `job.run`.
    """
    ways = list(_candidates(prepared.config, prepared.root))
    proved = next((way for way in ways if _is_proved(_held_probe(prepared, way))), None)
    tried = []
    for way in () if proved is not None else ways:
        held = _held_probe(prepared, way)
        if held is None:
            probe = _probe(prepared, way)
            try:
                summary = await job.run(probe, watch, requests=requests)
            except TeacherRefused as error:
                if error.status not in _NOT_OFFERED:
                    raise
                tried.append(f"{way}: {error.message}")
                continue
            if summary.ending not in (Ending.COMPLETE, Ending.TEACHER_REFUSED):
                return summary
            held = _held_probe(prepared, way)
        if _is_proved(held):
            proved = way
            break
        tried.append(f"{way}: {_why_not(held)}")
    if proved is None:
        raise TeacherRefused(
            f"the server can't score a given text; tried {'; '.join(tried)}",
            place=prepared.config.teacher.base_url,
            remedy="vLLM and SGLang can; llama.cpp and most hosted APIs can't, and a text needs a line with "
            "'text' or a last turn of the assistant",
        )
    settled = replace(prepared, config=with_way(prepared.config, proved))
    return await job.run(settled, watch, requests=requests)


def with_way(config: HarvestConfig, way: Way) -> HarvestConfig:
    """Return the configuration with the way settled."""
    assert config.score is not None
    return config.model_copy(update={"score": config.score.model_copy(update={"via": way})})


def _candidates(config: HarvestConfig, root: Path) -> Iterator[Way]:
    """Yield the ways that the configuration names and the first prompt fits."""
    assert config.score is not None
    if config.score.via != "auto":
        yield config.score.via
        return
    first = next(iter(reader.read(config.prompts.files, root)))
    yield from offered_by_prompt(first)


def _probe_request(prepared: Prepared, way: Way) -> Request:
    line = probe_line(way)
    prompt = reader.to_prompt(line, file=PROBE_FILE, line=1)
    return _request(prompt, with_way(prepared.config, way))


def _request(prompt: Prompt, config: HarvestConfig) -> Request:
    return next(ScoreRequestBuilder(config).build(prompt, range(1)))


def _held_probe(prepared: Prepared, way: Way) -> HeldAnswer | None:
    """Return what the store holds for the probe of a way."""
    if not sqlite.has_journal(prepared.store):
        return None
    key = _probe_request(prepared, way).key
    with Journal.open(prepared.store, read_only=True) as journal:
        return journal.look_up([key]).get(key)


def _is_proved(held: HeldAnswer | None) -> bool:
    return held is not None and held.outcome == Outcome.SCORED


def _why_not(held: HeldAnswer | None) -> str:
    if held is None:
        return "no reply"
    if held.state == "dead":
        return f"refused ({held.outcome})"
    return "the reply does not have the log-probabilities of the text that was sent"


def _probe(prepared: Prepared, way: Way) -> Prepared:
    """Return a run of the probe alone."""
    path = prepared.store / PROBE_FILE
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with own_files.replacing(path) as file:
            file.write(orjson.dumps(probe_line(way)) + b"\n")
    except OSError as error:
        raise disk_error(error, path) from None
    config = with_way(prepared.config, way)
    config = config.model_copy(update={"prompts": config.prompts.model_copy(update={"files": (str(path),)})})
    tokens = _probe_request(prepared, way).input_tokens
    return replace(prepared, config=config, rows_total=1, input_tokens=tokens, bad=(), digest=None)
