"""Test the files of `trainer schedule`: syntax, what they hold, and the endings that they handle."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from harvester.system import unit_text
from tests.trainer import tiny
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from tests.waiting import until
from trainer import config as settings
from trainer import service_units
from trainer.errors import ConfigError
from trainer.training.rendezvous import Options, chosen

# Starts the command once for each machine, as srun does, passes SIGTERM on, and returns the highest code.
SRUN = """#!/bin/bash
shift
pids=()
for node in $(seq 0 $((SLURM_NNODES - 1))); do SLURM_NODEID=$node "$@" & pids+=($!); done
trap 'kill -TERM "${pids[@]}"' TERM
highest=0
for pid in "${pids[@]}"; do
  wait "$pid"; code=$?
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; code=$?; done
  (( code > highest )) && highest=$code
done
exit "$highest"
"""
SCONTROL = """#!/bin/bash
[ "$1" = show ] && { echo 127.0.0.1; exit; }
echo "$@" >> "$FOLDER/asked"
"""
# A trainer that writes down what it was told, and ends as $CODE says: at once, or by SIGTERM.
TRAINER = """#!/bin/bash
trap 'exit 143' TERM
printf '%s\\n' "$*" >> "$FOLDER/told"
[ -n "$CODE" ] && exit "$CODE"
while :; do sleep 0.05; done
"""


def config_of(folder: Path, **sections: dict[str, Any]) -> settings.TrainConfig:
    data = {"student": {"base": "base"}, "data": {"corpus": "store"}, **sections}
    return settings.parse(data, root=folder, place="x")


def training(folder: Path, **more: Any) -> service_units.Training:
    facts = {"name": "train-x", "command": ["trainer"], "file": folder / "train.toml"}
    return service_units.Training(**{**facts, "config": config_of(folder), **more})


class Cluster:
    """A folder with stand-ins for srun, scontrol and trainer, and the script for two machines."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("trainer", TRAINER)):
            (folder / name).write_text(text)
            (folder / name).chmod(0o755)
        made = training(folder, nodes=2, processes=4, command=[str(folder / "trainer")])
        self.script = folder / "train.sbatch"
        self.script.write_text(service_units.slurm(made)["train-x.sbatch"])

    def start(self, code: object = "", restarts: int = 0) -> subprocess.Popen[str]:
        variables = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "FOLDER": str(self.folder),
            "CODE": str(code),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_RESTART_COUNT": str(restarts),
        }
        return subprocess.Popen(["bash", str(self.script)], env={**os.environ, **variables}, text=True)

    @property
    def told(self) -> list[list[str]]:
        path = self.folder / "told"
        return [shlex.split(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def requeued(self) -> bool:
        path = self.folder / "asked"
        return path.exists() and path.read_text() == "requeue 4711\n"


def test_the_script_of_slurm_has_the_values_and_starts_every_machine(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    text = cluster.script.read_text()
    assert subprocess.run(["bash", "-n", str(cluster.script)], check=False).returncode == 0
    lines = [line for line in text.splitlines() if line.startswith("#SBATCH")]
    for wanted in (
        "--nodes=2",
        "--gpus-per-node=4",
        "--job-name=train-x",
        "--requeue",
        "--signal=B:USR1@300",
    ):
        assert f"#SBATCH {wanted}" in lines
    assert cluster.start(0).wait(60) == 0
    assert len(cluster.told) == 2
    for words in cluster.told:
        assert words[:2] == ["train", str(tmp_path / "train.toml")]
        options = dict(zip(words[2::2], words[3::2], strict=True))
        assert options == {
            "--processes": "4",
            "--nnodes": "2",
            "--rdzv-backend": "c10d",
            "--rdzv-endpoint": "127.0.0.1:30211",
            "--rdzv-id": "4711-0",
        }
    assert not cluster.requeued


def test_before_its_time_is_over_the_job_checkpoints_and_goes_back_into_the_queue(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    job = cluster.start()
    until(lambda: len(cluster.told) == 2)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0
    assert cluster.requeued


def test_a_cancelled_job_drains_and_stays_out_of_the_queue(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    job = cluster.start()
    until(lambda: len(cluster.told) == 2)
    job.terminate()
    assert job.wait(60) == 143
    assert not cluster.requeued


@pytest.mark.parametrize(
    ("code", "restarts", "ends", "requeued"), [(75, 0, 0, True), (75, 5, 75, False), (1, 0, 1, False)]
)
def test_a_lost_machine_is_tried_again_five_times_and_a_fault_is_not(
    tmp_path: Path, code: int, restarts: int, ends: int, requeued: bool
) -> None:
    cluster = Cluster(tmp_path)
    assert cluster.start(code, restarts).wait(60) == ends
    assert cluster.requeued is requeued


def test_a_training_on_the_cpu_asks_for_no_gpu_and_odd_paths_are_quoted(tmp_path: Path) -> None:
    folder = tmp_path / "a b'$(x)"
    folder.mkdir()
    made = training(folder, config=config_of(folder, train={"device": "cpu"}))
    [text] = service_units.slurm(made).values()
    assert "gpus" not in text
    assert f"cd {shlex.quote(str(folder))} || exit 2" in text.splitlines()
    (tmp_path / "s").write_text(text)
    assert subprocess.run(["bash", "-n", str(tmp_path / "s")], check=False).returncode == 0
    with pytest.raises(ConfigError, match="line break"):
        service_units.slurm(training(tmp_path / "a\nb"))


def job_of(**more: Any) -> dict[str, Any]:
    [text] = service_units.kubernetes(training(Path("/w"), **more)).values()
    loaded: dict[str, Any] = yaml.safe_load(text)
    return loaded


def container_of(replica: dict[str, Any]) -> dict[str, Any]:
    [container] = replica["template"]["spec"]["containers"]
    return dict(container)


def test_kubernetes_gets_a_job_of_a_master_and_workers() -> None:
    job = job_of(nodes=3, processes=8, image="registry.example/trainer:1")
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    assert job["metadata"]["name"] == "train-x"
    assert job["spec"]["nprocPerNode"] == "8"
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert {name: each["replicas"] for name, each in replicas.items()} == {"Master": 1, "Worker": 2}
    for each in replicas.values():
        assert each["restartPolicy"] == "ExitCode"
        container = container_of(each)
        assert container["name"] == "pytorch"  # the operator looks for it
        assert container["ports"] == [{"name": "pytorchjob-port", "containerPort": 23456}]
        assert container["image"] == "registry.example/trainer:1"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
        assert [each["name"] for each in container["env"]] == ["XDG_CACHE_HOME"]
        volumes = {volume["name"] for volume in each["template"]["spec"]["volumes"]}
        assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    assert "Worker" not in job_of(processes=2)["spec"]["pytorchReplicaSpecs"]
    on_cpu = job_of(config=config_of(Path("/w"), train={"device": "cpu"}))
    limits = container_of(on_cpu["spec"]["pytorchReplicaSpecs"]["Master"])["resources"]["limits"]
    assert "nvidia.com/gpu" not in limits


@pytest.mark.parametrize(("code", "ends"), [(0, 0), (1, 1), (2, 2), (75, 175), (77, 77), ("", 143)])
def test_a_pod_ends_with_a_code_that_the_operator_restarts_or_not(
    tmp_path: Path, code: object, ends: int
) -> None:
    (tmp_path / "trainer").write_text(TRAINER)
    (tmp_path / "trainer").chmod(0o755)
    shell, flag, text = container_of(job_of(nodes=2)["spec"]["pytorchReplicaSpecs"]["Worker"])["command"]
    pod = subprocess.Popen(
        [shell, flag, text.replace("$$", "$")],
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "FOLDER": str(tmp_path), "CODE": str(code)},
    )
    until((tmp_path / "told").exists)
    if code == "":
        pod.terminate()  # an eviction
    assert pod.wait(60) == ends
    words = (tmp_path / "told").read_text().split()
    assert words == ["train", "/train/train.toml", "--processes", "1", "--nnodes", "2"]
    # what the operator sets completes these options, also an older one that knows no PET_NODE_RANK
    kubeflow = {"MASTER_ADDR": "x-master-0", "MASTER_PORT": "23456", "RANK": "1", "WORLD_SIZE": "2"}
    found = chosen(Options(nodes=2), kubeflow)
    assert found is not None
    assert (found.node, found.backend, found.endpoint) == (1, "static", "x-master-0:23456")


def test_secrets_are_named_and_never_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden-value")
    sections = {"data": {"corpus": "s3://bucket/corpus"}, "train": {"trackers": ["wandb"]}}
    config = settings.parse({"student": {"base": "base"}, **sections}, root=Path("/w"), place="x")
    [text] = service_units.kubernetes(training(Path("/w"), config=config)).values()
    container = container_of(yaml.safe_load(text)["spec"]["pytorchReplicaSpecs"]["Master"])
    names = {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY"}
    hidden = [each for each in container["env"] if each["name"] != "XDG_CACHE_HOME"]
    assert {each["name"] for each in hidden} == names
    for each in hidden:
        assert each["valueFrom"]["secretKeyRef"] == {"name": "train-x-secrets", "key": each["name"]}
        assert "value" not in each
    [script] = service_units.slurm(training(Path("/w"), config=config)).values()
    assert "hidden-value" not in text + script
    assert all(name in script for name in names)


@pytest.mark.parametrize("key", ["base", "corpus", "out"])
def test_kubernetes_refuses_paths_outside_the_volume(key: str) -> None:
    sections = {
        "student": {"base": "/models/base" if key == "base" else "base"},
        "data": {"corpus": "../store" if key == "corpus" else "store"},
        "out": {"path": "/out" if key == "out" else "out"},
    }
    config = settings.parse(sections, root=Path("/w"), place="x")
    with pytest.raises(ConfigError, match="inside the folder") as refused:
        service_units.kubernetes(training(Path("/w"), config=config))
    assert key in refused.value.place


@pytest.mark.parametrize(
    ("folder", "name"), [("My Run_7", "train-my-run-7"), ("日本", "train"), ("--x--", "train-x")]
)
def test_names_are_fit_for_kubernetes(tmp_path: Path, folder: str, name: str) -> None:
    assert unit_text.name_of(tmp_path / folder / "train.toml", "train") == name


def test_the_command_prints_or_writes_one_of_them(run_trainer: Any, tmp_path: Path) -> None:  # noqa: F811
    toml = tiny.train_toml(tmp_path / "my run", tiny.skill(2))
    code, out, _ = run_trainer("schedule", "--slurm", "--nodes", 2, toml)
    assert code == 0
    assert "#SBATCH --job-name=train-my-run" in out
    code, out, _ = run_trainer("schedule", "--k8s", toml)
    assert yaml.safe_load(out)["kind"] == "PyTorchJob"
    code, out, _ = run_trainer("schedule", "--k8s", toml, "--out", tmp_path / "units", "--json")
    [(name, text)] = json.loads(out)["files"].items()
    assert (tmp_path / "units" / name).read_text() == text
    for words in (["--slurm", "--k8s"], [], ["--slurm", "--name", "A b"]):
        code, _, err = run_trainer("schedule", *words, toml)
        assert (code, "error[usage]" in err) == (2, True)


@pytest.mark.long  # a real training by the script, with stand-ins for srun and scontrol
def test_the_script_trains_and_resumes_after_its_time_was_over(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    shape = {"epochs": 10, "pack_tokens": 128, "save_every": 0, "log_every": 1}
    for name in ("whole", "stopped"):
        tiny.train_toml(tmp_path / name, tiny.skill(40), train=shape)
    cluster = Cluster(tmp_path)
    command = [sys.executable, "-W", "ignore", "-m", "trainer"]
    for name in ("whole", "stopped"):
        toml = tmp_path / name / "train.toml"
        made = training(
            toml.parent, config=settings.load(toml), nodes=2, processes=1, command=command, file=toml
        )
        cluster.script.write_text(service_units.slurm(made)["train-x.sbatch"])
        job = cluster.start()
        if name == "stopped":
            log = tmp_path / name / "out" / "train.jsonl"
            until(lambda log=log: log.exists() and log.read_text().count("\n") > 2, 200)
            job.send_signal(signal.SIGUSR1)
            assert job.wait(200) == 0
            assert cluster.requeued
            job = cluster.start(restarts=1)
        assert job.wait(300) == 0
    first, second = (
        load_file(tmp_path / name / "out/adapter/adapter_model.safetensors") for name in ("whole", "stopped")
    )
    assert all(bool((first[name] == second[name]).all()) for name in first)
