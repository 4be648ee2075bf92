"""Train, evaluate and export a student, without a console: what the commands and the Python API share.

Importing this module loads no torch. A fault in configuration or corpus is reported before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harvester.system.background import StopRequests
from trainer.config import TrainConfig
from trainer.live.figures import TrainingEvent
from trainer.live.page import live_page
from trainer.process import is_leader
from trainer.training.logbook import TrainingStarted

if TYPE_CHECKING:
    from trainer.publish.serving import ServingCommands
    from trainer.training.train import Trained

# Reports progress: units done, units in all, what is done.
Update = Callable[[int, int, str], None]
Note = Callable[[str], None]
_MODELS_BEFORE = {"base": 0, "student": 1}


def train(
    config: TrainConfig,
    emit: Callable[[TrainingEvent], object],
    on_rows: Update | None = None,
    *,
    allow_change: bool = False,
    force_faults: bool = False,
    requests: StopRequests | None = None,
) -> Trained:
    """Train the adapter, or go on with an interrupted training; see `trainer.training.train.train`.

    The first process of a training keeps train.html in the output folder up to date.

    Args:
        emit: is called with each event.
        on_rows: is called while the token store of a large corpus is made.
    """
    from trainer.data import dataset

    rows = None if dataset.is_stored(config) else dataset.read(config)
    from trainer.training.reporter import Callbacks
    from trainer.training.train import train as run_training

    with live_page(config) if is_leader() else nullcontext(lambda _: None) as show:

        def on_event(event: TrainingEvent) -> None:
            show(event)
            emit(event)

        def started(done: int, steps: int, notes: Sequence[str]) -> None:
            on_event(TrainingStarted(done, steps, tuple(notes)))

        return run_training(
            config,
            Callbacks(started, on_event, on_event, on_event, on_rows or (lambda _done, _rows, _doing: None)),
            rows=rows,
            allow_change=allow_change,
            force_faults=force_faults,
            requests=requests,
        )


@dataclass(frozen=True, slots=True)
class HarnessTasks:
    """Tasks of lm-evaluation-harness to score as well; see `trainer.evaluation.harness.HarnessChoice`."""

    names: tuple[str, ...] = ()
    folder: Path | None = None
    limit: int | None = None
    merged: Path | None = None


def evaluate(
    config: TrainConfig,
    tasks: HarnessTasks,
    update: Update,
    note: Note,
    *,
    gguf: Path | None = None,
    gguf_limit: int | None = None,
) -> dict[str, Any]:
    """Let base and student answer the held-out prompts; ask the judge of `[evaluate]`, if there is one.

    Args:
        gguf: folder of `trainer export` whose GGUF files llama.cpp's server answers from; None: none.
        gguf_limit: held-out prompts for each of these files; None: all.

    Returns:
        The content of scorecard.json.

    Raises:
        What `trainer.evaluation.evaluate.evaluate`, the harness, the server and the judge raise.
    """
    if config.evaluate.judge:
        from trainer.evaluation.preferences import judge_table

        judge_table(config)  # refuses what can't be used before an hour of other work
    if tasks.names:
        from trainer.evaluation.harness import require_installed

        require_installed()  # before an hour of other work
    if gguf is not None:
        from trainer.evaluation import gguf_scores

        files = gguf_scores.GgufChoice(gguf, gguf_limit)
        gguf_scores.check_choice(files)
    note("reading corpus and student")
    from trainer.evaluation.evaluate import evaluate as run_evaluation

    card = run_evaluation(
        config,
        lambda name, total, done: update(_MODELS_BEFORE[name] * total + done, 2 * total, name),
        note,
        update,
    )
    if tasks.names:
        from trainer.evaluation import harness

        choice = harness.HarnessChoice(tasks.names, tasks.folder, tasks.limit, tasks.merged)
        card |= {harness.KEY: harness.run(config, choice, lambda name: note(f"harness: {name}"))}
    if gguf is not None:
        served = gguf_scores.run(config, files, lambda name: note(f"llama.cpp: {name}"))
        card |= {gguf_scores.KEY: served}
    if config.evaluate.judge:
        from trainer.evaluation import preferences

        note("the judge compares answers")
        card = preferences.judge(config)
    return card


@dataclass(frozen=True, slots=True)
class Exported:
    """A merged student.

    Attributes:
        merged: its folder.
        parity: how closely it agrees with base and adapter; see `trainer.publish.export.export_merged`.
        forgetting: what was measured for `[export] max_forgetting`; None: nothing.
        serving: commands that serve it.
        facts: the content of export.json: GGUF files, notes, what was checked for each server.
    """

    merged: Path
    parity: dict[str, Any]
    forgetting: dict[str, Any] | None
    serving: ServingCommands
    facts: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values for --json."""
        return {
            **self.parity,
            "forgetting": self.forgetting,
            "merged": str(self.merged),
            "serving": asdict(self.serving),
            **self.facts,
        }


def export(config: TrainConfig, out: Path, dtype: str = "", gguf: Sequence[str] = ()) -> Exported:
    """Merge the adapter into the base and check it; see `trainer.publish.export.export_merged`.

    Raises:
        What that raises; FindingsError: the student has forgotten more than `[export] max_forgetting`.
    """
    from trainer.data.chat_template import Renderer
    from trainer.evaluation.forgetting import require_kept
    from trainer.model import model, weights
    from trainer.publish import serving
    from trainer.publish.export import EXPORT_FILE, export_merged

    forgetting = require_kept(config)
    parity = export_merged(config, out, dtype, list(gguf))
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    commands = serving.commands(config, renderer, out.resolve())
    return Exported(out, parity, forgetting, commands, dict(weights.read_json(out / EXPORT_FILE)))
