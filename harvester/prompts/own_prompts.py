"""Choose the prompts that one shard of a harvest asks.

A prompt belongs to the rank that owns the key of its sample 0 (`request_key.owner`). So all its samples are
asked by one process, which may join them in one request and judge them together; and equal prompts, whose
requests share an answer, are with one process too.
"""

from __future__ import annotations

from harvester.api.request_builder import RequestBuilder, ScoreRequestBuilder
from harvester.api.request_key import owner
from harvester.api.types import Prompt
from harvester.config.config import HarvestConfig
from harvester.config.shard import Shard


class OwnPrompts:
    """The prompts of the shard that a configuration names; all prompts without one."""

    def __init__(self, config: HarvestConfig) -> None:
        self._shard = None if config.run.shard is None else Shard.parse(config.run.shard)
        self._builder: RequestBuilder | ScoreRequestBuilder | None = None
        if self._shard is not None:
            self._builder = RequestBuilder(config) if config.score is None else ScoreRequestBuilder(config)

    def __contains__(self, prompt: Prompt) -> bool:
        """Whether this shard asks the prompt.

        Raises:
            ValueError: the prompt has no canonical JSON.
        """
        if self._shard is None or self._builder is None:
            return True
        (request,) = self._builder.build(prompt, range(1))
        return owner(request.key, self._shard.of) == self._shard.rank
