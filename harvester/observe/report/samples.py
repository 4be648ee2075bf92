"""Answers as the pages show them: a text and its facts, nothing cut without saying so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from harvester.observe.report import charts
from harvester.observe.report.census import Census
from harvester.store.shards.schema import Sample

TEXT_SHOWN = 4000
"""Characters of one text on the page; the corpus holds all of it."""


def browser(census: Census, samples: Sequence[Sample]) -> dict[str, Any]:
    """The samples, and the choices to filter them by."""
    return {
        "samples": [shown(sample) for sample in samples],
        "outcomes": [name for name, _ in census.outcomes.most_common()],
        "total_samples": f"{census.rows:,}",
    }


def shown(sample: Sample) -> dict[str, Any]:
    """One sample in the browser; long texts are cut, and say so."""
    prompt = "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in sample.messages)
    further = [
        ("reasoning", sample.reasoning),
        ("refusal", sample.refusal),
        ("tool calls", sample.tool_calls_json),
        ("reference", sample.reference),
    ]
    facts = [
        ("prompt", f"{sample.prompt_id} ({sample.source_file}:{sample.source_line})"),
        ("finish reason", sample.finish_reason or "(none)"),
        ("tokens", f"{sample.input_tokens:,} in, {sample.output_tokens:,} out"),
        ("latency", charts.milliseconds(sample.latency_s * 1000)),
        ("cost", charts.dollars(sample.cost_microusd / 1e6)),
        ("answered", f"{sample.created_at:%Y-%m-%d %H:%M:%S} UTC by {sample.response_model or '(unnamed)'}"),
        ("run", sample.run_id),
        ("key", sample.key),
    ]
    return {
        "prompt": _cut(prompt),
        "completion": _cut(sample.completion or ""),
        "outcome": sample.outcome,
        "tokens": f"{sample.output_tokens:,}",
        "further": [(name, _cut(text)) for name, text in further if text],
        "facts": facts,
    }


def _cut(text: str) -> str:
    left = len(text) - TEXT_SHOWN
    return text if left <= 0 else f"{text[:TEXT_SHOWN]}… ({left:,} more characters in the corpus)"
