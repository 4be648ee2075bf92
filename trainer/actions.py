"""Train, evaluate and export a student, without a console: what the commands and the Python API share.

Importing this module loads no torch. A fault in configuration or corpus is reported before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from harvester.system.background import StopRequests
from trainer.config import TrainConfig
from trainer.training.logbook import Evaluation, StepLog, TrainingStarted

if TYPE_CHECKING:
    from trainer.publish.serving import ServingCommands
    from trainer.training.train import Trained

TrainingEvent = TrainingStarted | StepLog | Evaluation
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

    Args:
        emit: is called with each event.
        on_rows: is called while the token store of a large corpus is made.
    """
    from trainer.data import dataset

    rows = None if dataset.is_stored(config) else dataset.read(config)
    from trainer.training.reporter import Callbacks
    from trainer.training.train import train as run_training

    def started(done: int, steps: int, notes: Sequence[str]) -> None:
        emit(TrainingStarted(done, steps, tuple(notes)))

    return run_training(
        config,
        Callbacks(started, emit, emit, on_rows or (lambda _done, _rows, _doing: None)),  # type: ignore[arg-type]
        rows=rows,
        allow_change=allow_change,
        force_faults=force_faults,
        requests=requests,
    )


def show(event: TrainingEvent, update: Update, note: Note = lambda _: None) -> None:
    """Report an event of a training as progress in steps, and as lines for people."""
    match event:
        case TrainingStarted():
            for line in event.notes:
                note(line)
            update(event.steps_done, event.steps, "first step")
        case StepLog():
            description = (
                f"epoch {event.epoch + 1}, loss {event.loss:.3f}, {event.tokens_per_s:,.0f} tokens/s"
            )
            update(event.step, event.steps, description)
        case Evaluation():
            best = ", the lowest so far" if event.best_step == event.step else ""
            note(f"step {event.step:,}: held-out loss {event.held_out_loss:.4f}{best}")


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
        from trainer.evaluation import limited_devices

        files = limited_devices.GgufChoice(gguf, gguf_limit)
        limited_devices.check_choice(files)
    note("reading corpus and student")
    from trainer.evaluation.evaluate import evaluate as run_evaluation

    card = run_evaluation(
        config,
        lambda name, total, done: update(_MODELS_BEFORE[name] * total + done, 2 * total, name),
        note,
    )
    if tasks.names:
        from trainer.evaluation import harness

        choice = harness.HarnessChoice(tasks.names, tasks.folder, tasks.limit, tasks.merged)
        card |= {harness.KEY: harness.run(config, choice, lambda name: note(f"harness: {name}"))}
    if gguf is not None:
        served = limited_devices.run(config, files, lambda name: note(f"llama.cpp: {name}"))
        card |= {limited_devices.KEY: served}
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
