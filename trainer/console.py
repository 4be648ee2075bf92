"""Print what commands have to say: results on stdout (text or JSON), messages, tables and bars on stderr."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import TYPE_CHECKING, Any

import typer

from harvester.system.command_line.wrapped import for_terminal
from harvester.system.safe_text import one_line, visible

if TYPE_CHECKING:
    from rich.console import Console

# Longest time without a line of progress, in seconds, where there is no terminal.
QUIET_S = 30.0

# Longest time without a line of `progress_lines`, in seconds.
LINE_S = 5.0

MODELS = ("base", "student", "teacher")
# Fewer answers than this are too few to resample: trainer.evaluation.intervals.FEW.
FEWEST_ANSWERS = 10

# Consoles on which bars are drawn now.
_drawn_on: list[Console] = []

# Reports progress: units done, units in all, a short text about the current one.
Update = Callable[[int, int, str], None]


def print_result(data: Mapping[str, Any], lines: Sequence[str], *, as_json: bool) -> None:
    """Print a command's result on stdout: `data` as one JSON line, or `lines` as text."""
    if as_json:
        typer.echo(json.dumps(data, ensure_ascii=False, default=str))
        return
    for line in for_terminal(map(visible, lines), sys.stdout):
        typer.echo(line)


def print_message(line: str) -> None:
    """Print a line for people on stderr, above the bar that is drawn there."""
    for part in for_terminal([visible(line)], sys.stderr):
        if _drawn_on:
            from rich.text import Text

            _drawn_on[-1].print(Text(part), soft_wrap=True)
        else:
            typer.echo(part, err=True)


def excluded_phrase(reasons: Mapping[str, int]) -> str:
    """Return "; left out 3 empty; left out 1 too long" for counts by reason, empty for none."""
    return "".join(f"; left out {count:,} {reason}" for reason, count in sorted(reasons.items()))


def mark_supervised(tokens: Sequence[tuple[str, bool]]) -> str:
    """Join tokens into one line with a dot between them, and mark the supervised ones.

    Args:
        tokens: text of each token, and whether it is supervised.

    Returns:
        Supervised text is green on a terminal, else enclosed in ⟦⟧.
    """
    parts = []
    for supervised, group in groupby(tokens, key=lambda token: token[1]):
        text = "·".join(one_line(text) for text, _ in group)
        if supervised:
            text = typer.style(text, fg=typer.colors.GREEN) if sys.stdout.isatty() else f"⟦{text}⟧"
        parts.append(text)
    return "".join(parts)


def print_scorecard(card: Mapping[str, Any]) -> None:
    """Print a scorecard on stderr: the accuracies as a table, if there are any, then losses and cut answers.

    Args:
        card: the content of scorecard.json.
    """
    from rich.console import Console

    console = Console(stderr=True)
    if card["macro"]:
        console.print(_accuracy_table(card))
        console.print(f"recovery (student / teacher) {_recovery_text(card)}")
    for line in scorecard_lines(card):
        console.print(line)


def scorecard_lines(card: Mapping[str, Any]) -> list[str]:
    """Return what a scorecard says beyond accuracies: prompts without a reference, losses, cut answers."""
    lines = []
    if unjudged := card.get("without_reference", 0):
        lines.append(f"held-out prompts without a reference, so without an accuracy: {unjudged:,}")
    for reason, count in card.get("unverifiable", {}).items():
        lines.append(f"held-out prompts without an accuracy, {reason}: {count:,}")
    for task, facts in card.get("teacher_pass", {}).items():
        rates = {k: rate["value"] for k, rate in facts["pass_at"].items() if rate["value"] is not None}
        if len(rates) > 1:
            shown = ", ".join(f"pass@{k} {value:.3f}" for k, value in rates.items())
            lines.append(f"teacher's answers to {task.replace('_', ' ')}: {shown}")
    base, student = (card.get("loss", {}).get(model) for model in ("base", "student"))
    if student is not None:
        lines.append(f"loss on the teacher's answers: base {base:.3f}, student {student:.3f}")
    lines += text_score_lines(card)
    if cut := card.get("cut"):
        counts = ", ".join(f"{model} {cut[model]:,}" for model in ("base", "student"))
        lines.append(f"answers cut at {cut['max_new_tokens']:,} tokens, of {cut['answers']:,}: {counts}")
    return lines


# How a task's answers are judged, in words.
_JUDGED_BY = {
    "contains": "by what the answer contains",
    "normalised": "by normalised equality",
    "numeric": "by their last number",
    "choice": "by the letter they choose",
}


def text_score_lines(card: Mapping[str, Any]) -> list[str]:
    """Return what a scorecard says of answers as texts, each figure with its 95 % interval."""
    lines = []
    for task, kind in card.get("judged_by", {}).items():
        if kind in _JUDGED_BY:
            lines.append(f"answers to {task.replace('_', ' ')} are judged {_JUDGED_BY[kind]}")
    if paired := card.get("paired", {}).get("student_vs_base"):
        lines.append(
            f"student right where the base is wrong {paired['only_first']:,}, the reverse "
            f"{paired['only_second']:,}: McNemar p = {paired['p']:.2g}"
        )
    groups = (
        ("likelihood", ("perplexity", "bits_per_byte"), "the teacher's answers"),
        ("agreement", ("normalised", "chrf", "rouge_l"), "agreement with the teacher"),
        ("behaviour", ("refusals", "loops", "length_ratio"), "answers"),
        ("calibration", ("ece",), "calibration error"),
    )
    for group, names, title in groups:
        facts = card.get(group) or {}
        facts = facts.get("metrics", facts)
        for name in names:
            by_model = {m: _value_of(facts, group, m, name) for m in (*MODELS, "repeat")}
            shown = [f"{m} {interval_text(value)}" for m, value in by_model.items() if value]
            if shown:
                lines.append(f"{title}, {name.replace('_', ' ')}: {', '.join(shown)}")
    if increase := (card.get("forgetting") or {}).get("increase"):
        more = f"{increase['value']:+.1%} ({increase['low']:+.1%} to {increase['high']:+.1%})"
        lines.append(f"forgetting: bits for general answers, student against base: {more}")
    lines += _few_lines(card)
    if speed := card.get("speed"):
        lines += _speed_lines(speed)
    if missing := card.get("missing_packages"):
        lines.append(f"chrF or ROUGE-L left out, not installed: {', '.join(missing)} (the extra `eval`)")
    return lines


def _few_lines(card: Mapping[str, Any]) -> list[str]:
    """Return which intervals resample too few answers."""
    lines = []
    for group, what, figures in (
        ("likelihood", "held-out answers", "perplexity, bits per byte, calibration error and lengths"),
        ("forgetting", "general answers", "forgetting"),
    ):
        answers = (card.get(group) or {}).get("answers", 0)
        if 0 < answers < FEWEST_ANSWERS:
            lines.append(f"{answers:,} {what} are too few to resample: intervals of {figures} are too narrow")
    return lines


def _speed_lines(speed: Mapping[str, Any]) -> list[str]:
    """Return what the student's answers take on this machine, and what the teacher's took."""
    lines = []
    for name in ("student", "teacher"):
        facts = speed[name]
        parts = []
        if facts["tokens_per_s"]:
            how = "alone" if name == "student" else "under the load of its harvest"
            parts.append(f"writes {facts['tokens_per_s']['value']:,.0f} tokens/s {how}")
        if facts.get("tokens_per_s_in_batches"):
            parts.append(f"{facts['tokens_per_s_in_batches']:,.0f} in batches")
        if facts.get("first_token_s"):
            parts.append(f"its first token after {facts['first_token_s']['value'] * 1000:,.0f} ms")
        if facts["answer_s"]:
            parts.append(f"an answer in {facts['answer_s']['value']:.2f} s")
        if (cost := facts["usd_per_1000_answers"]) is not None:
            dollars = cost["value"] if isinstance(cost, Mapping) else cost
            parts.append(f"${dollars:,.4g} a thousand answers")
        if facts.get("parameters"):
            parts.append(
                f"{facts['parameters']:,} parameters, {facts['disk_bytes'] / 2**20:,.1f} MiB on disk"
            )
        if parts:
            lines.append(f"the {name} {', '.join(parts)}")
    return lines


def _value_of(facts: Mapping[str, Any], group: str, model: str, name: str) -> Any:
    """Return the figure of a model; metrics of agreement are listed by metric first."""
    first, second = (name, model) if group == "agreement" else (model, name)
    return (facts.get(first) or {}).get(second)


def interval_text(value: Mapping[str, float]) -> str:
    """Return a figure with its interval: "0.512 (0.48-0.54)"."""
    return f"{value['value']:.3f} ({value['low']:.2f}–{value['high']:.2f})"


def _accuracy_table(card: Mapping[str, Any]) -> Any:
    from rich.table import Table

    table = Table(title=f"accuracy on {card['split'].replace('_', ' ')} prompts, 95 % intervals")
    table.add_column("task", justify="left")
    for model in MODELS:
        table.add_column(model, justify="right")
    other_splits = {f"{name} (macro)": split["macro"] for name, split in card["splits"].items()}
    for name, row in {**card["tasks"], "macro": card["macro"], **other_splits}.items():
        cells = [
            f"{row[model]['accuracy']:.1%} ({row[model]['low']:.0%}–{row[model]['high']:.0%})"
            for model in MODELS
        ]
        table.add_row(name.replace("_", " "), *cells, style="bold" if name == "macro" else "")
    return table


def _recovery_text(card: Mapping[str, Any]) -> str:
    if card["recovery"] is None:
        return "- (the teacher is never correct)"
    return f"{card['recovery']:.3f} ({card['recovery_low']:.2f}–{card['recovery_high']:.2f})"


@contextmanager
def _drawing(console: Console) -> Iterator[None]:
    """Let messages be printed above what is drawn on a console during the block."""
    _drawn_on.append(console)
    try:
        yield
    finally:
        _drawn_on.remove(console)


@contextmanager
def progress_bar(title: str, unit: str) -> Iterator[Update]:
    """Show progress on stderr: a bar on a terminal, else a line at each fifth of the way and each `QUIET_S`.

    Args:
        unit: plural noun of what is counted, e.g. "steps".
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Column

    console = Console(stderr=True)
    if not console.is_terminal:
        yield progress_fifths(title, unit)
        return
    columns = (TextColumn("{task.description}"), BarColumn(16), MofNCompleteColumn(), TimeElapsedColumn())
    rest = Column(ratio=1, no_wrap=True, overflow="ellipsis")  # where it is narrow, the end of this is cut
    detail_column = TextColumn("{task.fields[detail]}", markup=False, table_column=rest)
    with Progress(*columns, detail_column, console=console, expand=True) as progress, _drawing(console):
        task = progress.add_task(title, total=None, detail="")

        def update(done: int, total: int, detail: str) -> None:
            progress.update(task, completed=done, total=total, detail=detail)

        yield update


def progress_lines(title: str, unit: str) -> Update:
    """Print progress on stderr as lines: when what is done changes, at the end, and each `LINE_S`.

    Args:
        unit: plural noun of what is counted, e.g. "rows".
    """
    last_doing, last_line_at, begun = "", 0.0, (0, 0.0)

    def update(done: int, total: int, doing: str) -> None:
        nonlocal last_doing, last_line_at, begun
        now = time.monotonic()
        if doing == last_doing and done < total and now - last_line_at < LINE_S:
            return
        if not last_doing:
            begun = (done, now)
        last_doing, last_line_at = doing, now
        seconds = now - begun[1]
        rate = f", {(done - begun[0]) / seconds:,.0f} {unit}/s" if done > begun[0] and seconds > 0 else ""
        print_message(f"{title}: {done:,}/{total:,} {unit}, {doing}{rate}" if total else f"{title}: {doing}")

    return update


def progress_fifths(title: str, unit: str) -> Update:
    """Print progress on stderr as lines: at each fifth of the way, and each `QUIET_S`.

    Args:
        unit: plural noun of what is counted, e.g. "steps".
    """
    last_fifth, last_line_at = -1, time.monotonic()

    def update(done: int, total: int, detail: str) -> None:
        nonlocal last_fifth, last_line_at
        fifth, now = done * 5 // max(total, 1), time.monotonic()
        if fifth != last_fifth or now - last_line_at >= QUIET_S:
            last_fifth, last_line_at = fifth, now
            print_message(f"{title}: {done:,}/{total:,} {unit}, {detail}")

    return update
