"""Say what an on-policy distillation did: lines for the terminal, and onpolicy.html."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.experiments.curve_report import money
from trainer.experiments.macro_intervals import few_note, too_few
from trainer.experiments.page import Page, Table
from trainer.experiments.plot import Axis, Line, Measured, plot
from trainer.files import write_report

_ENDINGS = {"complete": "all rounds are complete", "budget": "the budget ended the distillation"}
# Most rounds with a number on the axis.
_MOST_TICKS = 12


def write(result: Mapping[str, Any], folder: Path, name: str) -> tuple[str, str]:
    """Write onpolicy.html and onpolicy.json into a folder; return their paths.

    Raises:
        StoreError: the disk refuses.
    """
    return write_report(folder, "onpolicy", page(result, name), result)


def nats(value: float) -> str:
    """Return a divergence as text."""
    return f"{value:.4f}"


def interval_text(facts: Mapping[str, float]) -> str:
    """Return a divergence with its interval."""
    return f"{nats(facts['reverse_kl'])} ({nats(facts['low'])} to {nats(facts['high'])})"


def verdict_text(result: Mapping[str, Any]) -> str:
    """Return what the first and the last measurement say."""
    first, last, fall = result["held_out"][0], result["held_out"][-1], result["fall"]
    falls = "fell" if fall["low"] > 0 else "rose" if fall["high"] < 0 else "did not clearly change"
    if too_few(count := result["held_out_prompts"]):
        falls += f" on {count:,} prompts, too few to tell of others"
    return (
        f"held-out reverse KL {falls}: from {nats(first['reverse_kl'])} to {nats(last['reverse_kl'])} nats "
        f"per token after round {last['round']}, a fall of {nats(fall['value'])} "
        f"({nats(fall['low'])} to {nats(fall['high'])}); {_ENDINGS[result['ending']]}"
    )


def notes(result: Mapping[str, Any]) -> list[str]:
    """Return what a reader has to know to judge the figures."""
    last = result["held_out"][-1]
    how = (
        "reverse KL is the mean over the student's own tokens of log p(student) - log p(teacher), estimated "
        "from samples at temperature 1; it can be below 0 by chance"
    )
    if (most := result.get("top_logprobs")) is not None:
        how = (
            "reverse KL is the mean over the student's own tokens, sampled at temperature 1, of the "
            f"divergence over the {most} tokens that the teacher lists and all others together, known for "
            f"{last['listed_tokens']:,} of {last['scored_tokens']:,} tokens; elsewhere of log p(student) - "
            "log p(teacher)"
        )
    lines = [
        how,
        "held-out prompts are answered with the same seeds each time; intervals resample the prompts",
    ]
    lines += few_note(result["held_out_prompts"])
    unknown = last["tokens"] - last["scored_tokens"]
    if unknown:
        lines.append(
            f"{unknown:,} of {last['tokens']:,} tokens of the last held-out answers have no score of the "
            "teacher and count nowhere"
        )
    if last["cut"]:
        lines.append(
            f"{last['cut']:,} of {last['answers']:,} of them have no end of turn: they were cut at "
            "max_new_tokens or after a token at which servers end an answer"
        )
    clipped = sum(row["clipped"] for row in (*result["rounds"], *result["held_out"]))
    if clipped:
        lines.append(f"{clipped:,} tokens that the teacher thinks impossible count as e^-30")
    if result["left_out"]:
        lines.append(f"{result['left_out']:,} prompts hold a special token of the teacher and are left out")
    return lines


def text_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the result as lines for the terminal."""
    lines = [
        f"round {row['round']:>4}: held-out reverse KL {interval_text(row)}" for row in result["held_out"]
    ]
    lines += [f"note: {line}" for line in notes(result)]
    lines += [verdict_text(result), f"adapter in {result['adapter']}"]
    return lines


def page(result: Mapping[str, Any], name: str) -> str:
    """Return onpolicy.html.

    Args:
        name: of the student.
    """
    held_out, rounds = result["held_out"], result["rounds"]
    first, last = held_out[0], held_out[-1]
    measured = [Measured(row["round"], row["reverse_kl"], row["low"], row["high"]) for row in held_out]
    path = [(row["round"], row["reverse_kl"]) for row in held_out]
    lines = [
        Line("held-out prompts", "one", measured, path if len(path) > 1 else ()),
        Line("prompts that are learned", "two", (), [(r["round"] - 1, r["reverse_kl"]) for r in rounds]),
    ]
    every = max(1, -(-len(held_out) // _MOST_TICKS))
    ticks = sorted({row["round"] for row in held_out[::every]} | {last["round"]})
    answers = sum(row["answers"] for row in (*rounds, *held_out))
    return Page(
        title=f"On-policy distillation of {name}",
        lead=f"{len(rounds)} rounds on {result['prompts']:,} prompts, measured on "
        f"{result['held_out_prompts']:,} held-out ones",
        verdict=verdict_text(result),
        stops=result["fall"]["low"] <= 0,
        tiles=[
            (nats(first["reverse_kl"]), "reverse KL before, nats per token"),
            (nats(last["reverse_kl"]), f"after round {last['round']}"),
            (f"{answers:,}", "answers of the student that were scored"),
            ("–" if result["dollars"] is None else money(result["dollars"]), "what the scores cost"),
        ],
        plot_title="Reverse KL of the student's answers by rounds, with 95 % intervals",
        plot=plot(
            lines, Axis("rounds", "{:,.0f}".format, ticks), Axis("nats per token", "{:.3g}".format), {}
        ),
        legend=[("one", "held-out prompts"), ("two", "prompts that are learned")],
        notes=notes(result),
        tables=[_table(result)],
    ).render()


def _table(result: Mapping[str, Any]) -> Table:
    rows = [
        [
            str(row["round"]),
            interval_text(row),
            f"{row['scored_tokens']:,} of {row['tokens']:,}",
            f"{row['cut']:,} of {row['answers']:,}",
        ]
        for row in result["held_out"]
    ]
    columns = ["round", "held-out reverse KL, 95 % interval", "tokens scored", "answers cut"]
    return Table("Measurements", columns, rows)
