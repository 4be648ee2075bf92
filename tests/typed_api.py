"""Use the public API with types; `tests/test_typed_api.py` checks this file with mypy --strict."""

from __future__ import annotations

import pyarrow as pa

import harvester
import trainer
from harvester.errors import ConfigError, HarvesterError


async def harvest_and_train(folder: str) -> tuple[int, str, str]:
    """Call everything once."""
    plan: harvester.Plan = harvester.plan(f"{folder}/harvest.toml")
    events: list[harvester.HarvestEvent] = []
    summary: harvester.Summary = harvester.harvest(
        f"{folder}/harvest.toml", max_usd=5, max_runtime="2h", retry=["empty"], on_event=events.append
    )
    running = harvester.start(f"{folder}/harvest.toml")
    async for event in running:
        done: int = event.rows_done
        if done > plan.rows:
            running.stop()
    summary = await running
    samples = harvester.open(f"{folder}/store", columns=["prompt_id"], where={"outcome": "ok"})
    for sample in samples:
        prompt_id: str = sample.prompt_id
    table: pa.Table = samples.to_arrow()
    try:
        counts: harvester.CurateCounts = harvester.curate(f"{folder}/curate.toml")
    except ConfigError as error:
        raise HarvesterError(error.message, place=error.place, remedy=error.remedy) from None
    training = trainer.start(f"{folder}/train.toml", allow_change=True)
    async for step in training:
        if isinstance(step, trainer.StepLog):
            loss: float = step.loss
    trained: trainer.Trained = trainer.train(f"{folder}/train.toml")
    card: dict[str, object] = trainer.evaluate(f"{folder}/train.toml")
    exported: trainer.Exported = trainer.export(f"{folder}/train.toml", "merged", gguf=["q8_0"])
    print(prompt_id, table.num_rows, counts.kept, loss, card, exported.merged)
    return summary.exit_code, trained.adapter, harvester.__version__
