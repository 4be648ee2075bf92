"""Show a scorecard's figures of answers as texts: tables with intervals, and plots of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup

from harvester.observe.report import charts
from harvester.observe.report.figures import figure

MODELS = ("base", "student", "teacher", "repeat")
# Metrics in the order of the tables, with their names there. All are shares.
_METRICS = {
    "exact": "equal",
    "normalised": "normalised equal",
    "contains": "contains it",
    "numeric": "same number",
    "choice": "same letter",
    "token_f1": "token F1",
    "chrf": "chrF",
    "rouge_l": "ROUGE-L",
}
_BEHAVIOUR = {
    "refusals": "refusals",
    "empty": "empty",
    "loops": "endless repetition",
    "cut": "cut by the limit",
    "length_ratio": "length, teacher = 1",
}
_LIKELIHOOD = {
    "nats_per_token": "nats a token",
    "perplexity": "perplexity",
    "bits_per_byte": "bits a byte",
}
_EXPLAINED = {
    "references": "Shares of held-out prompts with a reference, or means over them.",
    "agreement": "The teacher's first answer is the reference.",
    "behaviour": "Shares of answers; found by their text, so they indicate, and prove nothing.",
    "likelihood": "How probable the teacher's held-out answers are. Bits a byte compare tokenizers, too.",
}
# Tags and tasks in a table of paired comparisons.
_MOST_ROWS = 40


def text_parts(card: Mapping[str, Any]) -> dict[str, Any]:
    """Return tables and figures of a scorecard; each is empty where the card has no such figures.

    The first column of a table, or the first `texts` of them, are text; the others are figures.

    Raises:
        KeyError, TypeError, ValueError, AttributeError: the card has another shape.
    """
    tables = [
        _by_metric("Answers against the reference", "references", card),
        _by_metric("Answers against the teacher's", "agreement", card),
        _preferences(card),
        _by_model("How likely the teacher's answers are", "likelihood", _LIKELIHOOD, card),
        _likelihood_by_group(card),
        _forgetting(card),
        _by_model("How they answer", "behaviour", _BEHAVIOUR, card),
        _speed(card),
        _limited_devices(card),
        _paired(card),
        _tags(card),
        _teacher_pass(card),
    ]
    return {
        "tables": [table for table in tables if table["rows"]],
        "has_repeat": "repeat" in (card.get("behaviour") or {}),
        "figures": [*_preference_figures(card), *_agreement_figures(card), *_calibration_figures(card)],
    }


def _teacher_pass(card: Mapping[str, Any]) -> dict[str, Any]:
    """How many of several answers of the teacher to a prompt pass; only tasks with more than one answer."""
    rows = []
    for task, facts in (card.get("teacher_pass") or {}).items():
        rates = {int(k): rate["value"] for k, rate in facts["pass_at"].items() if rate["value"] is not None}
        if (most := max(rates, default=1)) > 1:
            first, best = f"{rates[1]:.1%}", f"{rates[most]:.1%} (pass@{most})"
            rows.append([task, f"{facts['prompts']:,}", f"{facts['answers']:,}", first, best])
    return {
        "title": "All answers of the teacher",
        "columns": ["task", "prompts", "answers", "pass@1", "best of all"],
        "rows": rows,
        "note": "pass@k: the chance that at least one of k answers to a prompt passes.",
    }


def shown(value: Mapping[str, float] | None, *, percent: bool = False) -> str:
    """Return a figure with its 95 % interval; "–" for none."""
    if value is None:
        return "–"
    numbers = (float(value["value"]), float(value["low"]), float(value["high"]))
    if percent:
        return f"{numbers[0]:.1%} ({numbers[1]:.0%}{_until(numbers[1])}{numbers[2]:.0%})"
    return f"{numbers[0]:.3f} ({numbers[1]:.3f}{_until(numbers[1])}{numbers[2]:.3f})"


def _until(low: float) -> str:
    """Return what stands between the ends of an interval; a dash before a minus is hard to read."""
    return "–" if low >= 0 else " to "


def _by_metric(title: str, group: str, card: Mapping[str, Any]) -> dict[str, Any]:
    metrics = (card.get(group) or {}).get("metrics") or {}
    models = [m for m in MODELS if any(m in by_model for by_model in metrics.values())]
    rows = [
        [
            name,
            *(shown(metrics[metric].get(m), percent=True) for m in models),
            shown(metrics[metric].get("student_minus_base"), percent=True),
        ]
        for metric, name in _METRICS.items()
        if metric in metrics
    ]
    prompts = (card.get(group) or {}).get("prompts", 0)
    note = f"{_note(group, models)} {prompts:,} prompts."
    return {"title": title, "columns": ["", *models, "student − base"], "rows": rows, "note": note}


def _note(group: str, models: Sequence[str]) -> str:
    """Explain a group of figures."""
    if "repeat" not in models:
        return _EXPLAINED[group]
    return (
        f"{_EXPLAINED[group]} Repeat is the teacher's second answer to the same prompt: no student can be "
        "expected to do better."
    )


def _by_model(title: str, group: str, names: Mapping[str, str], card: Mapping[str, Any]) -> dict[str, Any]:
    facts = card.get(group) or {}
    models = [m for m in MODELS if m in facts]
    is_share = group == "behaviour"
    rows = [
        [
            label,
            *(shown(facts[m].get(name), percent=is_share and name != "length_ratio") for m in models),
        ]
        for name, label in names.items()
        if models
    ]
    return {"title": title, "columns": ["", *models], "rows": rows, "note": _EXPLAINED[group]}


def _likelihood_by_group(card: Mapping[str, Any]) -> dict[str, Any]:
    """Show the likelihoods by task and tag; a single task is shown in the table of all answers."""
    facts = card.get("likelihood") or {}
    tasks, tags = facts.get("tasks") or {}, facts.get("tags") or {}
    groups = {**(tasks if len(tasks) > 1 else {}), **{tag: tags[tag] for tag in tags if tag not in tasks}}
    rows = []
    for name, group in list(groups.items())[:_MOST_ROWS]:
        for measure, label in {**_LIKELIHOOD, "ece": "calibration error"}.items():
            is_first = measure == next(iter(_LIKELIHOOD))
            difference = group["student_minus_base"].get(measure)
            rows.append(
                [
                    f"{name}, {group['answers']:,} answers" if is_first else "",
                    label,
                    *(shown(group[m][measure], percent=measure == "ece") for m in MODELS[:2]),
                    shown(difference) if difference else "",
                ]
            )
    return {
        "title": "How likely the teacher's answers are, by task and tag",
        "columns": ["task or tag", "measure", *MODELS[:2], "student − base"],
        "texts": 2,
        "rows": rows,
        "note": "As above. In a small group the calibration error is above 0 by chance.",
    }


def _paired(card: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for pair, facts in (card.get("paired") or {}).items():
        first, _, second = pair.partition("_vs_")
        for task, of_task in [("all", facts), *list(facts["tasks"].items())[:_MOST_ROWS]]:
            if task == "all" or len(facts["tasks"]) > 1:
                rows.append(
                    [
                        f"{first} – {second}",
                        task,
                        f"{of_task['only_first']:,}",
                        f"{of_task['only_second']:,}",
                        f"{float(of_task['p']):.2g}",
                        shown(of_task["difference"], percent=True),
                    ]
                )
    note = (
        "Right answers to the same prompts: how often only one of the two is right, the exact p of McNemar's "
        "test that they are equally good, and the paired difference."
    )
    columns = ["models", "task", "only first", "only second", "p", "difference"]
    return {
        "title": "Who is right where the other is wrong",
        "columns": columns,
        "texts": 2,
        "rows": rows,
        "note": note,
    }


def _forgetting(card: Mapping[str, Any]) -> dict[str, Any]:
    facts = card.get("forgetting") or {}
    rows = [
        [
            m,
            shown(facts[m]["bits_per_byte"]),
            shown(facts["increase"], percent=True) if m == "student" else "–",
        ]
        for m in ("base", "student")
        if m in facts
    ]
    note = (
        f"How likely the answers to {facts.get('answers', 0):,} general prompts are. What the student needs "
        "more than its base it has forgotten."
    )
    columns = ["", "bits a byte", "increase"]
    return {"title": "What the student has forgotten", "columns": columns, "rows": rows, "note": note}


def _preferences(card: Mapping[str, Any]) -> dict[str, Any]:
    facts = card.get("preferences") or {}
    rows = []
    for model in MODELS[:2][::-1]:
        of_model = (facts.get("pairs") or {}).get(f"{model}_vs_teacher")
        if not of_model:
            continue
        tasks = of_model["tasks"] if len(of_model["tasks"]) > 1 else {}
        for name, counts in [("all", of_model), *list(tasks.items())[:_MOST_ROWS]]:
            rows.append(
                [
                    model,
                    name,
                    *(f"{counts[key]:,}" for key in ("win", "tie", "loss", "not_judged")),
                    shown(counts["win_rate"], percent=True),
                ]
            )
    return {
        "title": "What a judge prefers",
        "columns": ["model", "task", "won", "tied", "lost", "not judged", "against the teacher"],
        "texts": 2,
        "rows": rows,
        "note": _preference_note(facts),
    }


def _preference_note(facts: Mapping[str, Any]) -> str:
    """Say who judged, how, and how far the judge can be trusted."""
    if not facts:
        return ""
    position = facts["position"]
    parts = [
        f"{facts['judge'] or 'A judge'} compared each answer with the teacher's to the same prompt, in both "
        "orders. Ties count half, so 50 % is as good as the teacher; equal answers tie without being asked."
    ]
    if difference := facts["student_minus_base"]:
        parts.append(f"Student − base: {shown(difference, percent=True)}.")
    if first := position["first_wins"]:
        parts.append(
            f"Bias to a position: the answer shown first won {shown(first, percent=True)} of the comparisons "
            f"that were decided (50 % is fair); {position['order_decided']:,} of {position['pairs']:,} pairs "
            "were decided by the order alone and count as ties."
        )
    if facts.get("is_teacher"):
        parts.append("The judge is the teacher itself; models tend to prefer their own answers.")
    if facts.get("exit_code") not in {0, 3}:
        parts.append(f"The judge ended early ({facts.get('ending')}).")
    return " ".join(parts)


def _preference_figures(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    pairs = (card.get("preferences") or {}).get("pairs") or {}
    drawn: dict[str, dict[str, Any]] = {}
    for model in MODELS[:2]:
        of_model = pairs.get(f"{model}_vs_teacher") or {"tasks": {}}
        tasks = of_model["tasks"] if len(of_model["tasks"]) > 1 else {}
        for name, counts in [("all", of_model), *list(tasks.items())[:_MOST_ROWS]]:
            if counts.get("win_rate"):
                drawn.setdefault(name, {})[model] = counts["win_rate"]
    if not drawn:
        return []
    note = "How often the judge prefers an answer to the teacher's; ties count half, 50 % is as good."
    return [figure("Preferred to the teacher", share_dots(drawn), note)]


def _speed(card: Mapping[str, Any]) -> dict[str, Any]:
    speed = card.get("speed") or {}
    student, teacher = speed.get("student") or {}, speed.get("teacher") or {}
    scales = {
        "first_token_s": ("first token, ms", 1000.0),
        "answer_s": ("one answer, ms", 1000.0),
        "tokens_per_s": ("tokens/s, one answer at a time", 1.0),
        "tokens_per_s_in_batches": ("tokens/s, in batches", 1.0),
        "usd_per_1000_answers": ("dollars a thousand answers", 1.0),
        "parameters": ("parameters, millions", 1e-6),
        "weight_bytes": ("weights in memory, MiB", 2.0**-20),
        "disk_bytes": ("weights on disk, MiB", 2.0**-20),
        "process_peak_bytes": ("peak memory of the evaluation, MiB", 2.0**-20),
    }
    rows = [
        [label, *(_scaled(facts.get(name), scale) for facts in (student, teacher))]
        for name, (label, scale) in scales.items()
        if student or teacher
    ]
    note = (
        f"The student on this machine ({student.get('device', 'none')}), "
        f"{student.get('answers_timed', 0)} answers timed alone; the teacher over the network, "
        f"as stored with {teacher.get('answers', 0):,} answers: under the load of its harvest, with other "
        "requests in flight, so an idle teacher may be faster."
    )
    return {
        "title": "What an answer takes",
        "columns": ["", "student", "teacher"],
        "rows": rows,
        "note": note,
    }


def _limited_devices(card: Mapping[str, Any]) -> dict[str, Any]:
    """Show size, speed and accuracy of the GGUF files, as llama.cpp's server answered from them."""
    facts = card.get("limited_devices") or {}
    rows = [
        [
            file["kind"],
            f"{file['bytes'] / 2**20:,.1f}",
            f"{file['bits_per_weight']:.2f}",
            _scaled(file["tokens_per_s"], 1.0),
            shown({**file["accuracy"], "value": file["accuracy"]["accuracy"]}, percent=True)
            if file["accuracy"]
            else "–",
            shown({**file["equal"], "value": file["equal"]["accuracy"]}, percent=True),
            f"{file['cut']:,}",
        ]
        for file in facts.get("files", ())
    ]
    note = (
        f"GGUF files of the student behind llama.cpp's server, {facts.get('threads', 0)} CPU threads, one of "
        f"{facts.get('prompts', 0):,} held-out prompts at a time. Equal: the same string as the student's "
        "answer in transformers."
    )
    columns = ["type", "MiB", "bits a weight", "tokens/s", "accuracy", "equal answers", "cut"]
    return {"title": "On limited devices", "columns": columns, "rows": rows, "note": note}


def _scaled(value: Mapping[str, float] | float | None, scale: float) -> str:
    """Return a figure, with its interval if it has one; "–" for none."""
    if value is None:
        return "–"
    if not isinstance(value, Mapping):
        return f"{float(value) * scale:,.4g}"
    number, low, high = (float(value[key]) * scale for key in ("value", "low", "high"))
    return f"{number:,.4g} ({low:,.4g}{_until(low)}{high:,.4g})"


def _tags(card: Mapping[str, Any]) -> dict[str, Any]:
    rows = []
    for tag, facts in (card.get("tags") or {}).items():
        if tag in card["tasks"]:  # shown above
            continue
        scores = [{**facts[m], "value": facts[m]["accuracy"]} for m in MODELS[:3]]
        rows.append([tag, f"{facts['prompts']:,}", *(shown(score, percent=True) for score in scores)])
    note = "Accuracy of the prompts with a tag."
    return {"title": "By tag", "columns": ["tag", "prompts", *MODELS[:3]], "rows": rows, "note": note}


def _agreement_figures(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    metrics = (card.get("agreement") or {}).get("metrics") or {}
    models = [m for m in MODELS if any(m in by_model for by_model in metrics.values())]
    drawn = {
        _METRICS[metric].removesuffix(" equal"): {
            m: metrics[metric][m] for m in models if m in metrics[metric]
        }
        for metric in ("normalised", "token_f1", "chrf", "rouge_l")
        if metric in metrics
    }
    if not drawn:
        return []
    return [figure("Agreement with the teacher", share_dots(drawn), _note("agreement", models))]


def _calibration_figures(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    facts = {m: card["calibration"][m] for m in MODELS if m in (card.get("calibration") or {})}
    if not facts:
        return []
    errors = ", ".join(f"{m} {shown(of_model['ece'], percent=True)}" for m, of_model in facts.items())
    note = (
        "Next tokens of the teacher's held-out answers: how often the likeliest token is right, by how "
        f"likely the model thinks it. On the diagonal it is calibrated. Expected calibration error: {errors}."
    )
    bins = {m: of_model["bins"] for m, of_model in facts.items()}
    return [figure("Calibration", reliability(bins), note)]


def share_dots(rows: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Markup:
    """Draw a dot with its interval for each model, one band a row, on an axis from 0 to 100 %."""
    left, right = 116, charts.WIDE - 20
    band = 18 + 11 * max(len(scores) for scores in rows.values())
    parts = []
    for tick in range(0, 101, 25):
        x = left + (right - left) * tick / 100
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="0" y2="{band * len(rows)}"/>'
            f'<text x="{x:.1f}" y="{band * len(rows) + 16}" text-anchor="middle">{tick} %</text>'
        )
    for number, (name, scores) in enumerate(rows.items()):
        top = number * band
        parts.append(
            f'<text class="name" x="{left - 12}" y="{top + band / 2 + 4}" text-anchor="end">'
            f"{charts.words(charts.short(name, 16))}</text>"
        )
        for place, (model, score) in enumerate(scores.items()):
            y = top + 14 + 11 * place
            x, low, high = (
                left + (right - left) * min(1.0, max(0.0, float(score[key])))
                for key in ("value", "low", "high")
            )
            parts.append(
                f'<g class="who-{charts.words(model)}">'
                f'<line x1="{low:.1f}" x2="{high:.1f}" y1="{y}" y2="{y}"/>'
                f'<circle cx="{x:.1f}" cy="{y}" r="4.5"/><title>{charts.words(name)}, {charts.words(model)}: '
                f"{charts.words(shown(score, percent=True))}</title></g>"
            )
    return charts.svg("".join(parts), band * len(rows) + 24, "shares with 95 % intervals", charts.WIDE)


def reliability(bins: Mapping[str, Sequence[Mapping[str, float]]]) -> Markup:
    """Draw the share of right tokens by confidence, one dot a bin, larger where more tokens are in it."""
    left, right, top, base = 60, charts.WIDE - 20, 10, 250
    span, height = right - left, base - top
    parts = []
    for tick in range(0, 101, 25):
        x, y = left + span * tick / 100, base - height * tick / 100
        parts.append(
            f'<line class="grid" x1="{left}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{tick} %</text>'
            f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{tick} %</text>'
        )
    parts.append(f'<line class="mark" x1="{left}" x2="{right}" y1="{base}" y2="{top}"/>')
    for model, of_model in bins.items():
        most = max((float(b["tokens"]) for b in of_model), default=1.0)
        for each in of_model:
            x = left + span * min(1.0, max(0.0, float(each["confidence"])))
            y = base - height * min(1.0, max(0.0, float(each["correct"])))
            radius = 2.5 + 5.5 * (float(each["tokens"]) / most) ** 0.5
            parts.append(
                f'<g class="who-{charts.words(model)}"><circle cx="{x:.1f}" cy="{y:.1f}" r="{radius:.1f}"/>'
                f"<title>{charts.words(model)}: confident {float(each['confidence']):.1%}, right "
                f"{float(each['correct']):.1%}, {int(each['tokens']):,} tokens</title></g>"
            )
    return charts.svg("".join(parts), base + 24, "share of right tokens by confidence", charts.WIDE)
