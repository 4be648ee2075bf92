"""Score base, student and merged student on tasks of lm-evaluation-harness (`trainer evaluate --harness`).

The harness loads what others would load: the folder of the base, the adapter by PEFT, the merged folder by
transformers, each with the published tokenizer and chat template; never code out of a model's folder. A task
may hold code of its own, so only name tasks that you trust.

Source: lm-evaluation-harness (github.com/EleutherAI/lm-evaluation-harness), `lm_eval.simple_evaluate`.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harvester.errors import ConfigError
from harvester.quality.verifiers.wilson import Z95
from trainer.config import TrainConfig
from trainer.errors import DataError, StudentError
from trainer.evaluation.scorecard import wilson_interval
from trainer.files import write_json
from trainer.model import model
from trainer.publish.adapter import check_same_base

KEY = "harness"
# Metrics of the harness that are means of 0 and 1.
_SHARES = frozenset({"acc", "acc_norm", "exact_match", "em"})


@dataclass(frozen=True, slots=True)
class HarnessChoice:
    """What is run.

    Attributes:
        tasks: names of tasks or groups.
        folder: with task files (YAML) of one's own; None: those of the harness alone, whose data is
            downloaded unless it lies in the cache.
        limit: examples of each task; None: all.
        merged: folder of `trainer export` to score too.
    """

    tasks: tuple[str, ...]
    folder: Path | None = None
    limit: int | None = None
    merged: Path | None = None


def require_installed() -> None:
    """Do nothing where lm-evaluation-harness can be imported.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ConfigError(
            "lm-evaluation-harness is not installed",
            place="--harness",
            remedy="pip install 'blackbox-distillation[harness]'",
        )


def run(
    config: TrainConfig, choice: HarnessChoice, on_model: Callable[[str], None] = lambda _: None
) -> dict[str, Any]:
    """Run the tasks on each model, and add the results to scorecard.json under "harness".

    Args:
        on_model: called with "base", "student" or "merged" before that model is scored.

    Returns:
        `version` of the harness, and by model and task the metrics: `value`, and `low` and `high` where the
        harness gives a standard error.

    Raises:
        ConfigError: the harness is not installed.
        DataError: a task is unknown or fails, or there is no scorecard yet.
        StudentError: the adapter belongs to another base.
    """
    require_installed()
    scorecard = config.out_path / "scorecard.json"
    if not scorecard.is_file():
        raise DataError("there is no scorecard", place=str(scorecard), remedy="run `trainer evaluate` first")
    if choice.merged is not None and not (choice.merged / "config.json").is_file():
        raise StudentError(
            "is no exported student", place=str(choice.merged), remedy="`trainer export` writes one"
        )
    adapter = config.student_path
    check_same_base(config, adapter)
    if config.student.quantise != "none":
        raise ConfigError(
            "lm-evaluation-harness would put the adapter on the unrounded base, which is another student",
            place="student.quantise",
            remedy="`trainer export` the student, and give the folder to the harness itself",
        )
    base = str(config.base)
    # The published chat template renders the prompts that were learned; the base's own may render others, and
    # a base may have none.
    spoken = {"tokenizer": str(adapter)}
    models: dict[str, dict[str, str]] = {
        "base": {"pretrained": base, **spoken},
        "student": {"pretrained": str(adapter)}
        if config.is_full
        else {"pretrained": base, "peft": str(adapter), **spoken},
    }
    if choice.merged is not None:
        models["merged"] = {"pretrained": str(choice.merged)}
    results: dict[str, Any] = {"tasks": list(choice.tasks), "limit": choice.limit, "models": {}}
    for name, folders in models.items():
        on_model(name)
        results["version"], results["models"][name] = _score(config, folders, choice)
    card = json.loads(scorecard.read_text(encoding="utf-8"))
    write_json(scorecard, {**card, KEY: results})
    return results


def _score(
    config: TrainConfig, folders: Mapping[str, str], choice: HarnessChoice
) -> tuple[str, dict[str, dict[str, Any]]]:
    """Return the harness's version, and the metrics of one model by task."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    device = model.select_device(config.train)
    with _quiet():
        tasks = TaskManager(include_path=None if choice.folder is None else str(choice.folder))
        unknown = [task for task in choice.tasks if not tasks.match_tasks([task])]
        if unknown:
            raise DataError(
                f"lm-evaluation-harness knows no task {unknown[0]!r}",
                place="--harness",
                remedy="name a task of the harness, or one whose YAML file lies in --harness-tasks",
            )
        scored = HFLM(**folders, device=str(device), batch_size=8, trust_remote_code=False)
        try:
            output = lm_eval.simple_evaluate(
                model=scored,
                tasks=list(choice.tasks),
                task_manager=tasks,
                limit=choice.limit,
                apply_chat_template=scored.tokenizer.chat_template is not None,
                bootstrap_iters=1000,
                log_samples=False,
            )
        except Exception as error:  # tasks are code and data of others
            raise DataError(
                f"the harness failed: {type(error).__name__}: {error}",
                place=", ".join(choice.tasks),
                remedy="check the names of the tasks, and that their data sets are on this machine; leave "
                "out a task that fails",
            ) from error
    counts = {task: each["effective"] for task, each in output["n-samples"].items()}
    found = {task: metrics(values, counts.get(task)) for task, values in output["results"].items()}
    return lm_eval.__version__, found


def metrics(values: Mapping[str, Any], count: int | None) -> dict[str, Any]:
    """Return the metrics of one task, by the harness's name (`acc,none`), with intervals of 95 %.

    Shares get Wilson's interval, which is no point at 0 and 1; other metrics get theirs from the standard
    error.

    Args:
        values: an entry of `results` of the harness: metric,filter and metric_stderr,filter to numbers.
        count: examples that were scored; None for a group of tasks.
    """
    found = {}
    for name, value in values.items():
        metric, comma, filtered = name.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        error = values.get(f"{metric}_stderr,{filtered}")
        entry = {"value": float(value)}
        if count and metric in _SHARES:
            interval = wilson_interval(round(value * count), count)
            entry |= {"low": interval["low"], "high": interval["high"]}
        elif isinstance(error, int | float) and math.isfinite(error):
            entry |= {"low": value - Z95 * error, "high": value + Z95 * error}
        found[name] = entry
    return found


def lines(results: Mapping[str, Any]) -> list[str]:
    """Return a line for each task and metric, the models side by side."""
    models: Mapping[str, Mapping[str, Mapping[str, Any]]] = results["models"]
    names: Sequence[tuple[str, str]] = [
        (task, metric) for task, found in models["base"].items() for metric in found
    ]
    return [
        f"{task} {metric.removesuffix(',none')}: "
        + ", ".join(f"{name} {_shown(found.get(task, {}).get(metric))}" for name, found in models.items())
        for task, metric in names
    ]


def _shown(entry: Mapping[str, float] | None) -> str:
    if entry is None:
        return "-"
    interval = f" ({entry['low']:.4f} to {entry['high']:.4f})" if "low" in entry else ""
    return f"{entry['value']:.4f}{interval}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send what the harness prints to stderr: stdout belongs to the result."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
