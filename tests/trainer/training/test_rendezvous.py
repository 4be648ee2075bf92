"""Test how the machines of a training find each other: options, schedulers' variables, refusals by name."""

from __future__ import annotations

import pytest

from trainer.errors import ConfigError
from trainer.training.rendezvous import Options, Rendezvous, chosen, processes_of, workers_environment

# What the training operator of Kubeflow (1.7 on) sets in the pods of a PyTorchJob with a master and a worker.
KUBEFLOW = {
    "MASTER_ADDR": "train-master-0",
    "MASTER_PORT": "23456",
    "WORLD_SIZE": "8",
    "RANK": "1",
    "PET_MASTER_ADDR": "train-master-0",
    "PET_MASTER_PORT": "23456",
    "PET_NNODES": "2",
    "PET_NPROC_PER_NODE": "4",
    "PET_NODE_RANK": "1",
}
SLURM = {"SLURM_JOB_ID": "811", "SLURM_NNODES": "2", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
    ("options", "environment", "expected"),
    [
        (Options(), {}, None),
        (Options(nodes=1), KUBEFLOW, None),  # a worker of ours
        (Options(), {**KUBEFLOW, "TORCHELASTIC_RUN_ID": "1"}, None),  # a worker of torchrun
        (Options(), SLURM, None),  # an allocation of two nodes is no training on two
        (Options(), KUBEFLOW, Rendezvous(2, 1, "static", "train-master-0:23456", "none")),
        (
            Options(nodes=2, endpoint="head:29500"),
            SLURM,
            Rendezvous(2, 1, "static", "head:29500", "811"),
        ),
        (
            Options(nodes=2, backend="c10d", endpoint="head", run_id="x", join_s=5.0),
            SLURM,
            Rendezvous(2, 1, "c10d", "head:29400", "x", 5.0),
        ),
        (
            Options(nodes=3, endpoint="[fd00::5]:1"),
            {},
            Rendezvous(3, None, "c10d", "[fd00::5]:1", "none"),
        ),
        (
            Options(),
            {"PET_NNODES": "2:2", "PET_RDZV_BACKEND": "c10d", "PET_RDZV_ENDPOINT": "a:1", "PET_RDZV_ID": "i"},
            Rendezvous(2, None, "c10d", "a:1", "i"),
        ),
        (
            Options(nodes=2, node=0, endpoint="flag:1"),
            KUBEFLOW,
            Rendezvous(2, 0, "static", "flag:1", "none"),
        ),
    ],
)
def test_options_win_over_the_environment_of_a_scheduler(options, environment, expected):
    assert chosen(options, environment) == expected


@pytest.mark.parametrize(
    ("options", "environment", "place"),
    [
        (Options(nodes=2), {}, "--rdzv-endpoint"),
        (Options(nodes=2, endpoint="a:b:c"), {}, "--rdzv-endpoint"),
        (Options(nodes=2, endpoint="a:99999"), {}, "--rdzv-endpoint"),
        (Options(nodes=2, endpoint="http://a/:1"), {}, "--rdzv-endpoint"),
        (Options(nodes=2, backend="static", endpoint="a:1"), {}, "--node-rank"),
        (Options(nodes=2, node=2, endpoint="a:1"), {}, "--node-rank"),
        (Options(endpoint="a:1"), {"PET_NNODES": "1:4"}, "PET_NNODES"),
        (Options(endpoint="a:1"), {"PET_NNODES": "two"}, "PET_NNODES"),
        (Options(nodes=2, endpoint="a:1"), {"PET_NODE_RANK": "-1"}, "PET_NODE_RANK"),
    ],
)
def test_what_is_missing_or_contradicts_is_named(options, environment, place):
    with pytest.raises(ConfigError) as refused:
        chosen(options, environment)
    assert place in refused.value.place
    assert refused.value.exit_code == 2


def test_processes_of_a_machine(monkeypatch):
    assert processes_of({}) == 1
    assert processes_of(KUBEFLOW) == 4
    assert processes_of({**KUBEFLOW, "TORCHELASTIC_RUN_ID": "1"}) == 1
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert processes_of({"PET_NPROC_PER_NODE": "gpu"}) == processes_of({"PET_NPROC_PER_NODE": "auto"}) == 3
    with pytest.raises(ConfigError, match="no number of processes"):
        processes_of({"PET_NPROC_PER_NODE": "many"})


def test_a_worker_does_not_inherit_what_makes_a_launcher():
    assert workers_environment({**KUBEFLOW, "HOME": "/root"}) == {
        "MASTER_ADDR": "train-master-0",
        "MASTER_PORT": "23456",
        "WORLD_SIZE": "8",
        "RANK": "1",
        "HOME": "/root",
    }
