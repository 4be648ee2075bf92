"""Ask many prompts at once through the client, and parse the answers, as a run does."""

from __future__ import annotations

import asyncio

from harvester.api import parse_in_child
from harvester.api.http.client import Client
from harvester.api.request_builder import requests
from harvester.api.types import Prompt, Request
from harvester.config.config import HarvestConfig


async def ask(base_url: str, count: int) -> int:
    """Ask `evil 0` and on, all at once; return how many were read to their end."""
    config = HarvestConfig.model_validate(
        {
            "teacher": {"base_url": base_url, "model": "mock-teacher", "terms": "mock-teacher"},
            "prompts": {"files": ["p.jsonl"]},
            "store": {"path": "store"},
            "run": {"deadline_s": 500},
        }
    )
    prompts = [Prompt(id=f"{n}", messages=[{"role": "user", "content": f"evil {n}"}]) for n in range(count)]

    async def read(client: Client, request: Request) -> int:
        raw = await client.send(request, base_url)
        try:
            await parse_in_child.parse(raw.body, 5, None)
        finally:
            raw.release()
        return 1

    async with Client(config.teacher, config.run, None) as client:
        return sum(await asyncio.gather(*[read(client, request) for request in requests(prompts, config)]))
