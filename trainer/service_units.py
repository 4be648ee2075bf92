"""Write the files with which Slurm or Kubernetes (Kubeflow) run a training on several machines.

The templates are in data/units. Sources: sbatch(1) and srun(1) of Slurm; the types of the API kubeflow.org/v1
in the training operator (`pytorch_types.go`, `common_types.go`, `envvar.go`).
"""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from harvester.system.objects.url import url_in
from harvester.system.unit_text import checked, fill, plain, yaml_argument, yaml_text
from trainer.config import TrainConfig
from trainer.errors import ConfigError, ProcessLost

# Seconds from the signal until the scheduler may kill the training: for the step and its checkpoint.
STOP_S = 300

# Folder in the container at which the training's folder is mounted.
MOUNT = PurePosixPath("/train")

# Added to an exit code that shall be tried again: the operator restarts pods that end above 127.
RETRY = 100

# Variables with the secrets of the places that a corpus can lie at, by the scheme of its URL.
_SECRETS = {
    "s3": ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
    "az": ("AZURE_STORAGE_CONNECTION_STRING",),
    "hf": ("HF_TOKEN",),
}


@dataclass(frozen=True, slots=True)
class Training:
    """What the files must contain.

    Attributes:
        name: name of the job.
        command: the command that starts the trainer.
        file: absolute path of train.toml; config: what it holds.
        nodes: machines; processes: on each of them.
        image: container image, for Kubernetes.
    """

    name: str
    command: Sequence[str]
    file: Path
    config: TrainConfig
    nodes: int = 1
    processes: int = 1
    image: str = "trainer"

    @property
    def gpus(self) -> int:
        """GPUs of each machine: one for each process, unless the training is one of the CPU."""
        return 0 if self.config.train.device == "cpu" else self.processes

    @property
    def secrets(self) -> tuple[str, ...]:
        """Names of the variables that hold secrets."""
        url = url_in(self.config.data.corpus)
        trackers = {"wandb": "WANDB_API_KEY", "mlflow": "MLFLOW_TRACKING_TOKEN"}
        named = _SECRETS.get(self.config.data.corpus.partition(":")[0], ()) if url else ()
        return (*named, *(trackers[name] for name in self.config.train.trackers if name in trackers))


def slurm(training: Training) -> dict[str, str]:
    """Return a script for `sbatch` that goes back into the queue when its time is over or a machine is lost.

    Raises:
        ConfigError: a script can't hold a path.
    """
    words = [checked(word) for word in (*training.command, "train", str(training.file))]
    secrets = ", ".join(training.secrets)
    values = {
        "name": training.name,
        "described": plain(str(training.file)),
        "nodes": str(training.nodes),
        "processes": str(training.processes),
        "gpus": f"#SBATCH --gpus-per-node={training.gpus}\n" if training.gpus else "",
        "stop_s": str(STOP_S),
        "folder": shlex.quote(checked(str(training.file.parent))),
        "command": shlex.join(words),
        "secrets": f"Secrets come from the environment of `sbatch`: {secrets}." if secrets else "No secrets.",
    }
    return {f"{training.name}.sbatch": fill("training.sbatch", values)}


def kubernetes(training: Training) -> dict[str, str]:
    """Return a PyTorchJob: a master, and a worker for each further machine.

    Raises:
        ConfigError: a path is outside the folder that is mounted.
    """
    config = training.config
    paths = {
        "student.base": config.student.base,
        "student.template": config.student.template,
        "data.corpus": "" if url_in(config.data.corpus) else config.data.corpus,
        "data.cache": config.data.cache,
        "out.path": config.out.path,
    }
    for key, path in paths.items():
        if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
            raise ConfigError(
                "must be inside the folder of train.toml",
                place=key,
                remedy="that folder becomes the volume of the pods; use a relative path",
            )
    start = shlex.join(
        [
            *("trainer", "train", str(MOUNT / training.file.name)),
            *("--processes", str(training.processes), "--nnodes", str(training.nodes)),
        ]
    )
    lost = ProcessLost.exit_code
    # The root of the container is read only, and a published corpus is downloaded into the cache.
    env: list[dict[str, object]] = [{"name": "XDG_CACHE_HOME", "value": "/tmp/cache"}]  # noqa: S108 - the pod's own
    env += [
        {"name": name, "valueFrom": {"secretKeyRef": {"name": f"{training.name}-secrets", "key": name}}}
        for name in training.secrets
    ]
    limits: dict[str, object] = {"memory": "64Gi"}
    if training.gpus:
        limits["nvidia.com/gpu"] = training.gpus
    pod = fill(
        "training.pod.yaml",
        {
            "name": training.name,
            "stop_s": str(STOP_S),
            "image": yaml_text(training.image),
            # A shell as process 1 would keep signals to itself while it waits: it passes them on.
            "start": yaml_argument(
                'child=; ended=; trap \'ended=1; [ -z "$child" ] || kill -TERM "$child"\' TERM INT; '
                f'{start} & child=$!; [ -z "$ended" ] || kill -TERM "$child"; wait "$child"; code=$?; '
                'while kill -0 "$child" 2>/dev/null; do wait "$child"; code=$?; done; '
                f'[ "$code" -eq {lost} ] && code={lost + RETRY}; exit "$code"'
            ),
            "env": json.dumps(env),
            "limits": json.dumps(limits),
        },
    )
    indented = textwrap.indent(pod.rstrip(), " " * 8)
    workers = ""
    if training.nodes > 1:
        workers = fill("training.workers.yaml", {"workers": str(training.nodes - 1), "pod": indented})
    values = {
        "name": training.name,
        "described": plain(str(training.file)),
        "nodes": str(training.nodes),
        "processes": str(training.processes),
        "pod": indented,
        "workers": workers,
    }
    return {f"{training.name}.pytorchjob.yaml": fill("training.pytorchjob.yaml", values)}
