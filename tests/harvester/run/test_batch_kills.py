"""Kill a harvest in batches at every step: whatever the step, nothing is sent twice and nothing is lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from harvester.mock_teacher.settings import BatchSettings
from tests.harvester.killed_runs import KilledRuns, quick_folder
from tests.harvester.run.batch_bench import HOUR, require_whole

# In the order in which a run meets them. After a kill between creation and its record, the next run finds the
# batch in the provider's list, and is killed again before it can write that down.
STEPS = (
    "batch.before_intent",
    "batch.after_intent",
    "batch.after_upload",
    "batch.after_upload_noted",
    "batch.after_create",
    "batch.after_list",
    "batch.after_create_noted",
    "batch.after_poll",
    "batch.after_chunk",
    "batch.after_results",
    "batch.before_end",
    "batch.after_end",
    "batch.after_create:3",
    "batch.after_intent:2",
    "batch.after_poll:4",
    "batch.after_end:2",
)
# What a hybrid run does with a batch that is late, in order.
HYBRID_STEPS = (
    "batch.before_cancel",
    "batch.after_cancel",
    "batch.after_chunk",
    "batch.after_results",
    "batch.before_end",
)
ROWS = 60
CONFIG = """\
[teacher]
base_url = "{base_url}"
model = "mock-teacher"
terms = "mock-teacher"
[teacher.price]
input = 2.0
output = 4.0
[teacher.batch]
max_requests = 6
[sampling]
max_tokens = 64
[prompts]
files = ["prompts.jsonl"]
[store]
path = "store"
shard_mib = 0.2
min_free_mib = 1
[run]
transport = "{transport}"
[batch]
poll = 0.01
poll_max = 0.02
settle = 0.02
patience = {patience}
"""


def write(folder: Path, base_url: str, transport: str, patience: float) -> Path:
    prompts = [{"id": f"p{n}", "prompt": f"What is {n} + {7 * n}?"} for n in range(ROWS)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    config = folder / "harvest.toml"
    config.write_text(CONFIG.format(base_url=base_url, transport=transport, patience=patience))
    return config


def test_a_kill_at_any_step_sends_nothing_twice(mock_teacher):
    mock = mock_teacher(batches=BatchSettings(validating_s=HOUR, latency_s=HOUR, tick_s=HOUR, shuffle=True))
    with quick_folder() as folder:
        config = write(folder, mock.base_url, "batch", patience=86_400)
        with KilledRuns(config) as runs:
            for step in STEPS:
                assert runs.run(20, step)[0] == -9, f"{step} was not reached"
            assert runs.run(600.0)[0] == 0
        require_whole(folder / "store", mock, ROWS)
    assert mock.batches()["served"]["create"] >= len(STEPS) / 2


@pytest.mark.slow
def test_a_kill_at_any_step_of_a_hybrid_run_sends_nothing_twice(mock_teacher):
    """Nothing but this test and the looks let time pass, so no batch ends before it is cancelled."""
    mock = mock_teacher(batches=BatchSettings(latency_s=6 * HOUR, cancelling_s=10, tick_s=11, shuffle=True))
    with quick_folder() as folder:
        config = write(folder, mock.base_url, "hybrid", patience=0.02)
        with KilledRuns(config) as runs:
            assert runs.run(20, "batch.after_create")[0] == -9
            mock.advance(HOUR)  # a row is answered, which is there to collect once the batch is cancelled
            for step in HYBRID_STEPS:
                assert runs.run(20, step)[0] == -9, f"{step} was not reached"
            assert runs.run(600.0)[0] == 0
        require_whole(folder / "store", mock, ROWS)
    served = mock.batches()["served"]
    assert served["create"] >= 1
    assert served["cancel"] >= 1
