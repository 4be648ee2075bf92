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
# Of a hybrid run, whose batches are late at once.
HYBRID_STEPS = (
    "batch.before_cancel",
    "batch.after_cancel",
    "batch.after_create",
    "batch.after_chunk",
    "batch.after_results",
    "batch.before_end",
)
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


def write(folder: Path, base_url: str, rows: int, transport: str, patience: float) -> Path:
    prompts = [{"id": f"p{n}", "prompt": f"What is {n} + {7 * n}?"} for n in range(rows)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    config = folder / "harvest.toml"
    config.write_text(CONFIG.format(base_url=base_url, transport=transport, patience=patience))
    return config


@pytest.mark.parametrize(
    ("transport", "steps", "patience"),
    [("batch", STEPS, 86_400), pytest.param("hybrid", HYBRID_STEPS, 0.02, marks=pytest.mark.slow)],
)
def test_a_kill_at_any_step_sends_nothing_twice(mock_teacher, transport, steps, patience):
    rows = 60
    settings = BatchSettings(validating_s=HOUR, latency_s=HOUR, tick_s=HOUR, shuffle=True)
    mock = mock_teacher(batches=settings)
    with quick_folder() as folder:
        config = write(folder, mock.base_url, rows, transport, patience)
        with KilledRuns(config) as runs:
            for step in steps:
                assert runs.run(20, step)[0] == -9, f"{step} was not reached"
            assert runs.run(60)[0] == 0
        require_whole(folder / "store", mock, rows)
    assert mock.batches()["served"]["create"] >= len(steps) / 2
