"""Use the public API wrongly; `tests/test_typed_api.py` expects an error of mypy in each marked line."""

from __future__ import annotations

import harvester
import trainer

harvester.harvest("harvest.toml", max_rows=5)  # wrong
harvester.harvest("harvest.toml", transport="post")  # wrong
harvester.open("store").to_arrows()  # wrong
trainer.train("train.toml", force=True)  # wrong
trained: int = trainer.train("train.toml")  # wrong
