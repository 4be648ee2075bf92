"""Define `[judge]`: a harvest that asks a teacher to judge answers of a corpus, or pairs of a file."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from pydantic import Field, model_validator

from harvester.config.run_section import FrozenModel


class JudgeSection(FrozenModel):
    """Which answers are judged, and how.

    Attributes:
        corpus: folder of the answers to judge; None with `pairs`.
        against: folder of other answers to the same prompts: pairs are compared, in both orders. None: each
            answer of a corpus gets a score.
        pairs: JSON lines with pairs of answers to compare, in both orders; None with `corpus`.
        rubric: jinja2 file that writes the judge's prompt; None: the one that is shipped.
        lowest: the lowest score.
        highest: the highest score.
    """

    corpus: str | None = Field(default=None, min_length=1)
    against: str | None = Field(default=None, min_length=1)
    pairs: str | None = Field(default=None, min_length=1)
    rubric: str | None = Field(default=None, min_length=1)
    lowest: int = Field(default=1, ge=0, le=1000)
    highest: int = Field(default=10, ge=1, le=1000)

    @model_validator(mode="after")
    def _is_complete(self) -> JudgeSection:
        if (self.corpus is None) == (self.pairs is None):
            raise ValueError('[judge] needs either corpus = "store" or pairs = "pairs.jsonl"')
        if self.pairs is not None and self.against is not None:
            raise ValueError("[judge] pairs holds both answers: leave out against")
        if self.lowest >= self.highest:
            raise ValueError("lowest must be less than highest")
        return self

    @property
    def compares(self) -> bool:
        """Whether pairs of answers are compared, instead of each getting a score."""
        return self.against is not None or self.pairs is not None

    def rubric_path(self, root: Path) -> Path:
        """Return the rubric's file; `root` is the folder of the configuration."""
        if self.rubric is not None:
            return root / self.rubric
        name = "pairwise.j2" if self.compares else "score.j2"
        return Path(str(files("harvester_data").joinpath("rubrics", name)))


def prompts_name(store: str) -> str:
    """Return the name of the prompt file of a judge with this store; it lies beside the store."""
    return f"{store.rstrip('/')}.prompts.jsonl"


def with_prompts(data: Any) -> Any:
    """Add the prompt file that `harvester judge` writes to a configuration with `[judge]`.

    Raises:
        ValueError: it names prompts of its own.
    """
    if not isinstance(data, Mapping) or data.get("judge") is None:
        return data
    prompts, store = data.get("prompts", {}), data.get("store", {})
    if not isinstance(prompts, Mapping) or not isinstance(store, Mapping):
        return data  # refused by the models of these tables
    name = store.get("path", "store")
    own = [prompts_name(name)] if isinstance(name, str) else []
    if list(prompts.get("files", own)) != own:
        raise ValueError("[judge] writes the prompts itself: leave out [prompts] files")
    return {**data, "prompts": {**prompts, "files": own}}
