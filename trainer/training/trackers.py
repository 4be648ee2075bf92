"""Write the figures of a training for experiment trackers: TensorBoard, Weights & Biases, MLflow.

Everything goes to folders in `[out] path`. Nothing is sent: Weights & Biases runs offline and MLflow writes a
SQLite file, unless WANDB_MODE or MLFLOW_TRACKING_URI in the environment say otherwise. What both report about
their users by default is switched off. A tracker that fails is dropped with a note, and the training goes on.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from harvester.system.command_line.extras import require
from trainer.config import TrainConfig
from trainer.files import write_json

# Takes the figures of a step by name; None ends the run.
Write = Callable[[int, Mapping[str, float] | None], None]

# The extra that holds the package of each tracker.
EXTRAS = {"tensorboard": "board", "wandb": "wandb", "mlflow": "mlflow"}


def require_installed(config: TrainConfig) -> None:
    """Refuse a training whose `[train] trackers` are not installed.

    Raises:
        MissingPackage: one is not.
    """
    for name in config.train.trackers:
        require(EXTRAS[name], f'[train] trackers = ["{name}"]')


class Trackers:
    """Passes figures on to the trackers of a training, and drops one that fails.

    TensorBoard's is written wherever it is installed, the others only where `[train] trackers` names them.

    Attributes:
        problem: why a tracker was dropped, empty if none was.
    """

    def __init__(self, config: TrainConfig) -> None:
        self.problem = ""
        self._writers: dict[str, Write] = {}
        names = list(config.train.trackers)
        if "tensorboard" not in names and importlib.util.find_spec("tensorboard") is not None:
            names.insert(0, "tensorboard")
        for name in names:
            try:
                self._writers[name] = _STARTERS[name](config)
            except Exception as error:  # noqa: BLE001 - see `write`
                self._drop(name, error)

    def write(self, values: Mapping[str, Any]) -> None:
        """Write one line of the log: every finite number in it, under `values["step"]`."""
        numbers = {
            name: float(value)
            for name, value in values.items()
            if name not in {"step", "steps"} and isinstance(value, int | float) and math.isfinite(value)
        }
        self._each(int(values["step"]), numbers)

    def close(self) -> None:
        """End the runs. A training that is killed leaves them open; what was written stays."""
        self._each(0, None)
        self._writers.clear()

    def _each(self, step: int, numbers: Mapping[str, float] | None) -> None:
        for name, write in list(self._writers.items()):
            try:
                write(step, numbers)
            except Exception as error:  # noqa: BLE001 - a tracker of any kind may fail in any way
                self._drop(name, error)

    def _drop(self, name: str, error: Exception) -> None:
        self._writers.pop(name, None)
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        self.problem = f"tracker {name} failed and was dropped: {first_line}"


def _tensorboard(config: TrainConfig) -> Write:
    """Write event files to `tensorboard`; flushed at each line, so that a killed training keeps its curve."""
    from torch.utils.tensorboard import SummaryWriter

    board: Any = SummaryWriter(str(config.out_path / "tensorboard"))

    def write(step: int, numbers: Mapping[str, float] | None) -> None:
        if numbers is None:
            board.close()
            return
        for name, value in numbers.items():
            board.add_scalar(name, value, step)
        board.flush()

    return write


def _wandb(config: TrainConfig) -> Write:
    """Write an offline run to `wandb`, one for each start of the training; `wandb sync` uploads it.

    A project is named by WANDB_PROJECT in the environment, else by the student.
    """
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb

    folder = config.out_path / "wandb"
    folder.mkdir(parents=True, exist_ok=True)
    run = wandb.init(
        dir=str(config.out_path),
        project=os.environ.get("WANDB_PROJECT") or config.name,
        name=config.name,
        mode=os.environ.get("WANDB_MODE") or "offline",
        config=_settings(config),
        settings=wandb.Settings(
            console="off",
            silent=True,
            disable_code=True,
            disable_git=True,
            x_disable_machine_info=True,
            x_disable_meta=True,
            x_disable_stats=True,
            x_save_requirements=False,
        ),
    )

    def write(step: int, numbers: Mapping[str, float] | None) -> None:
        if numbers is None:
            run.finish()
        else:
            run.log(dict(numbers), step=step)

    return write


def _mlflow(config: TrainConfig) -> Write:
    """Write to the SQLite file `mlflow/mlflow.db`; a resumed training goes on with its run.

    `mlflow ui --backend-store-uri sqlite:///OUT/mlflow/mlflow.db` shows it.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Param

    folder = config.out_path / "mlflow"
    folder.mkdir(parents=True, exist_ok=True)
    client = MlflowClient(os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{folder / 'mlflow.db'}")
    memory = folder / "run.json"
    run_id = _remembered(memory)
    if run_id is None:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or config.name
        known = client.get_experiment_by_name(name)
        artifacts = (folder / "artifacts").as_uri()
        experiment = known.experiment_id if known else client.create_experiment(name, artifacts)
        run_id = client.create_run(experiment, run_name=config.name).info.run_id
        settings = [
            Param(f"{section}.{key}", str(value)[:500])
            for section, values in _settings(config).items()
            for key, value in values.items()
        ]
        client.log_batch(run_id, params=settings)
        write_json(memory, {"run_id": run_id})
    client.update_run(run_id, status="RUNNING")

    def write(step: int, numbers: Mapping[str, float] | None) -> None:
        if numbers is None:
            client.set_terminated(run_id)
            return
        now = int(time.time() * 1000)
        client.log_batch(run_id, metrics=[Metric(name, v, now, step) for name, v in numbers.items()])

    return write


def _remembered(path: Path) -> str | None:
    """Return the id of the run that an earlier start of this training began."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, LookupError, TypeError):
        return None


def _settings(config: TrainConfig) -> dict[str, dict[str, Any]]:
    """Return the settings that trackers show beside the curves."""
    dumped = config.model_dump(mode="json")
    return {section: dumped[section] for section in ("lora", "train")}


_STARTERS: dict[str, Callable[[TrainConfig], Write]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
}
