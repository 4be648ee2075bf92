"""Metrics + manifest + scorecard -> one self-contained HTML page; status.json -> lines for a terminal.

The page carries no remote asset; its only script is pinned by hash in a strict Content-Security-Policy,
and every word of a teacher passes through jinja2's escaping.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from harvester import charts
from harvester.corpus import Corpus
from harvester.errors import ConfigError
from harvester.schema import Sample
from harvester.status import read_status

SAMPLES_SHOWN = 300
SCRIPT = """
const rows = Array.from(document.querySelectorAll('#samples tr'));
const found = document.getElementById('found');
document.getElementById('search').addEventListener('input', (event) => {
  const wanted = event.target.value.toLowerCase();
  let shown = 0;
  for (const row of rows) {
    row.hidden = !row.textContent.toLowerCase().includes(wanted);
    shown += row.hidden ? 0 : 1;
  }
  found.textContent = wanted ? shown + ' match' : '';
});
""".strip()
_COLUMNS = (
    "messages", "completion", "outcome", "latency_s", "input_tokens", "output_tokens", "cost_microusd",
    "created_at", "endpoint", "request_model", "response_model", "terms_id", "mock", "tool_version", "run_id",
)  # fmt: skip


@dataclass(slots=True)
class _Seen:
    """What one walk over the corpus gathers for the page."""

    rows: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    latencies_ms: list[float] = field(default_factory=list)
    output_tokens: list[float] = field(default_factory=list)
    tokens: int = 0
    cost_microusd: int = 0
    minutes: Counter[int] = field(default_factory=Counter)
    facts: dict[str, Counter[str]] = field(default_factory=dict)
    shown: list[dict[str, Any]] = field(default_factory=list)


def write_report(store: Path, out: Path, *, scorecard: Path | None = None) -> Path:
    """Write the report of a store to `out`, atomically.

    Raises:
        StoreError: the store can't be read.
        ConfigError: the scorecard is missing or isn't one.
    """
    seen = _walk(Corpus.open(store).samples(columns=_COLUMNS))
    page = render(
        seen, title=f"Harvest of {_main_model(seen)}", status=read_status(store), card=_load(scorecard)
    )
    hidden = out.with_name(f".{out.name}.tmp")
    out.parent.mkdir(parents=True, exist_ok=True)
    hidden.write_text(page, encoding="utf-8")
    hidden.replace(out)
    return out


def render(seen: _Seen, *, title: str, status: Mapping[str, Any], card: Mapping[str, Any] | None) -> str:
    """The page as text."""
    environment = Environment(
        loader=PackageLoader("harvester", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return environment.get_template("report.html.j2").render(
        title=title,
        subtitle=_subtitle(seen),
        script=Markup(SCRIPT),  # noqa: S704 - our own constant, pinned by its hash
        script_hash=f"sha256-{digest}",
        tiles=_tiles(seen, status),
        charts=_charts(seen, status),
        scorecard=_scorecard(card) if card else None,
        provenance=[(name, _facts(found)) for name, found in seen.facts.items()],
        samples=seen.shown,
        total_samples=f"{seen.rows:,}",
    )


def _walk(samples: Iterable[Sample]) -> _Seen:
    seen = _Seen()
    names = ("endpoint", "request_model", "response_model", "terms_id", "tool_version", "run_id")
    seen.facts = {name.replace("_", " "): Counter() for name in (*names, "mock")}
    for sample in samples:
        seen.rows += 1
        seen.outcomes[sample.outcome] += 1
        seen.latencies_ms.append(sample.latency_s * 1000)
        seen.output_tokens.append(sample.output_tokens)
        seen.tokens += sample.input_tokens + sample.output_tokens
        seen.cost_microusd += sample.cost_microusd
        seen.minutes[int(sample.created_at.timestamp())] += 1
        for name in names:
            seen.facts[name.replace("_", " ")][str(getattr(sample, name)) or "(none)"] += 1
        seen.facts["mock"]["yes" if sample.mock else "no"] += 1
        if len(seen.shown) < SAMPLES_SHOWN:
            prompt = "\n".join(f"{m['role']}: {m.get('content') or ''}" for m in sample.messages)
            seen.shown.append(
                {
                    "prompt": prompt[:2000],
                    "completion": (sample.completion or "")[:2000],
                    "outcome": sample.outcome,
                    "tokens": sample.output_tokens,
                }
            )
    return seen


def _main_model(seen: _Seen) -> str:
    found = seen.facts["request model"].most_common(1)
    return found[0][0] if found else "no teacher yet"


def _subtitle(seen: _Seen) -> str:
    models = ", ".join(name for name, _ in seen.facts["request model"].most_common(3)) or "no teacher yet"
    mock = " (mock teacher: rows are marked, never pass as real)" if seen.facts["mock"]["yes"] else ""
    return f"{seen.rows:,} answers from {models}{mock}"


def _facts(found: Counter[str]) -> str:
    return ", ".join(f"{name} ({count:,})" for name, count in found.most_common(5))


def _tiles(seen: _Seen, status: Mapping[str, Any]) -> list[dict[str, Any]]:
    billed = int(status.get("possibly_billed", 0))
    dead = int(status.get("dead", 0))
    return [
        {"name": "answers held", "value": f"{seen.rows:,}", "bad": False},
        {"name": "requests sent, last run", "value": f"{status.get('requests_sent', 0):,}", "bad": False},
        {"name": "from cache, last run", "value": f"{status.get('from_cache', 0):,}", "bad": False},
        {"name": "tokens", "value": charts.compact(seen.tokens), "bad": False},
        {"name": "cost", "value": f"${seen.cost_microusd / 1e6:,.2f}", "bad": False},
        {"name": "failed rows", "value": f"{dead:,}", "bad": dead > 0},
        {"name": "possibly billed, not held", "value": f"{billed:,}", "bad": billed > 0},
    ]


def _charts(seen: _Seen, status: Mapping[str, Any]) -> list[dict[str, Any]]:
    first = min(seen.minutes, default=0)
    rate = [(float(second - first), float(seen.minutes[second])) for second in sorted(seen.minutes)]
    drawn = [
        {
            "title": "Answers per second",
            "drawing": charts.line(rate, x_unit="s", y_unit="answers"),
            "note": "",
        },
        {"title": "Latency", "drawing": charts.histogram(seen.latencies_ms, unit="ms"), "note": ""},
        {
            "title": "Output tokens",
            "drawing": charts.histogram(seen.output_tokens, unit="tokens"),
            "note": "",
        },
        {"title": "How answers ended", "drawing": charts.shares(seen.outcomes), "note": ""},
    ]
    errors = status.get("errors") or {}
    if errors:
        drawn.append(
            {"title": "Errors met, last run", "drawing": charts.shares(errors), "note": "Attempts, not rows."}
        )
    return drawn


def _load(scorecard: Path | None) -> Mapping[str, Any] | None:
    if scorecard is None:
        return None
    try:
        loaded = json.loads(scorecard.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"scorecard can't be read: {error}", place=str(scorecard)) from None
    if not isinstance(loaded, dict) or not {"tasks", "macro", "recovery"} <= set(loaded):
        raise ConfigError("not a scorecard", place=str(scorecard), remedy="`trainer evaluate` writes one")
    return loaded


def _scorecard(card: Mapping[str, Any]) -> dict[str, Any]:
    who: Sequence[str] = ("base", "student", "teacher")
    named = {**card["tasks"], "macro": card["macro"]}
    points = {
        task: {name: charts.Interval(s[name]["accuracy"], s[name]["low"], s[name]["high"]) for name in who}
        for task, s in named.items()
    }
    rows = []
    for task, score in points.items():
        teacher = score["teacher"].accuracy
        cells = {name: f"{p.accuracy:.1%} ({p.low:.0%}–{p.high:.0%})" for name, p in score.items()}
        recovery = f"{score['student'].accuracy / teacher:.2f}" if teacher else "–"
        rows.append({"name": task, "total": task == "macro", "recovery": recovery, **cells})
    return {"drawing": charts.accuracies(points, who), "rows": rows, "notes": _notes(card)}


def _notes(card: Mapping[str, Any]) -> list[str]:
    notes = [f"Macro recovery {card['recovery']:.3f}"]
    for name, split in (card.get("splits") or {}).items():
        macro = split.get("macro") if isinstance(split, dict) else None
        if macro:
            figures = ", ".join(
                f"{who} {macro[who]['accuracy']:.1%}" for who in ("base", "student", "teacher")
            )
            notes.append(f"{name.replace('_', ' ')}: {figures}")
    return notes
