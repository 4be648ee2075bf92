"""Prompt x configuration -> Request: the wire body after defaults, its key, its likely size and price.

Pure and streaming: one request at a time, never a list of all rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import orjson

from harvester.api.completion import estimate_tokens
from harvester.api.request_key import RequestKeys, canonical
from harvester.api.types import Message, Prompt, Request
from harvester.config.config import HarvestConfig, PriceSection, SamplingSection
from harvester.errors import ConfigError, PromptError

TOKENS_PER_MESSAGE = 4
DEFAULT_OUTPUT_TOKENS = 1024
"""Reserved for an answer when no `max_tokens` is configured."""
MOST_OUTPUT_TOKENS = 32_768
"""What the budget takes for the longest possible answer when no `max_tokens` bounds it."""
TOKENS_OF_IMAGE = 1024
MOST_TOKENS_OF_IMAGE = 50_000
"""More than any teacher is known to charge for one: 2,833 + 8 x 5,667 of gpt-4o-mini at high detail."""
MOST_SEEDS_KEPT = 1000
"""Shared fields of so many seeds are kept from prompt to prompt; those of further samples are made anew."""
FRAME_TOKENS, TOKENS_OF_TURN = 64, 16
"""What a chat template adds at most: around messages and tools, and around each message."""
_Shared = tuple[dict[str, Any], RequestKeys]


def check(config: HarvestConfig) -> None:
    """Refuse a configuration of which no cache key can be made.

    Raises:
        ConfigError: a field that all requests share has no canonical JSON.
    """
    fixed, sampling = _fixed_fields(config), config.sampling
    if sampling.seed is not None:
        fixed["seed"] = sampling.seed + sampling.samples - 1
    for name, value in fixed.items():
        try:
            canonical({name: value})
        except ValueError as error:
            remedy = "integers go to 2**53 - 1; NaN and infinities are no JSON"
            raise ConfigError(str(error), place=f"sampling.{name}", remedy=remedy) from None


def requests(prompts: Iterable[Prompt], config: HarvestConfig) -> Iterator[Request]:
    """Every request of a harvest, in prompt order, `samples` of each.

    Raises:
        ConfigError: see `check`.
        PromptError: a prompt made by hand has no canonical JSON; those of files are refused when read.
    """
    check(config)
    wardrobe, samples = _Wardrobe(config), range(config.sampling.samples)
    for prompt in prompts:
        try:
            yield from wardrobe.dress(prompt, samples)
        except ValueError as error:
            raise PromptError(str(error), place=f"{prompt.file}:{prompt.line}") from None


def request_for(prompt: Prompt, config: HarvestConfig, sample_index: int = 0) -> Request:
    """One prompt's request. See `requests` for a whole set."""
    return next(_Wardrobe(config).dress(prompt, (sample_index,)))


def input_tokens_of(prompt: Prompt, config: HarvestConfig) -> int:
    """Estimated input tokens of one request for this prompt, without making it."""
    return sum(_size(message) for message in _with_system(prompt.messages, config.prompts.system))


def cost_microusd(
    price: PriceSection | None, input_tokens: int, output_tokens: int, cached_tokens: int = 0
) -> int:
    """Price of so many tokens in millionths of a dollar, rounded up: a ceiling must never be passed.

    USD per million tokens is micro-dollars per token, so no factor is needed.
    """
    if price is None:
        return 0
    cached_rate = price.input if price.cached_input is None else price.cached_input
    cached = min(cached_tokens, input_tokens)
    exact = (input_tokens - cached) * price.input + cached * cached_rate + output_tokens * price.output
    # 1e-6: 3 * 0.15 is 0.44999999999999996 in binary; rounding noise must not add a micro-dollar.
    return max(0, math.ceil(exact - 1e-6))


class _Wardrobe:
    """Dresses prompts; what all requests of one sample number share is made once."""

    def __init__(self, config: HarvestConfig) -> None:
        sampling = config.sampling
        self._endpoint, self._epoch = config.teacher.base_url, config.run.epoch
        self._system = config.prompts.system
        self._price = config.teacher.price
        self._fixed = fixed = _fixed_fields(config)
        self._seed = sampling.seed if sampling.samples > 1 else None
        self._alike = fixed, RequestKeys(self._endpoint, fixed, self._epoch)
        self._seeded: dict[int, _Shared] = {}
        ceiling = ceiling_of(fixed)
        self._output_tokens = ceiling or DEFAULT_OUTPUT_TOKENS
        self._most_out = ceiling or MOST_OUTPUT_TOKENS
        extras = [fixed[name] for name in ("tools", "functions", "response_format") if name in fixed]
        self._most_extra = FRAME_TOKENS + sum(_bytes(extra) for extra in extras)

    def dress(self, prompt: Prompt, samples: Iterable[int]) -> Iterator[Request]:
        """The requests of one prompt, by sample number."""
        messages = _with_system(prompt.messages, self._system)
        input_tokens = sum(_size(message) for message in messages)
        most_in = self._most_extra + sum(_most_size(message) for message in messages)
        reserved = cost_microusd(self._price, input_tokens, self._output_tokens)
        most = cost_microusd(self._price, most_in, self._most_out)
        for sample_index in samples:
            shared, keys = self._alike if self._seed is None else self._with_seed(self._seed + sample_index)
            yield Request(
                key=keys.key(messages, sample_index),
                prompt=prompt,
                body={"messages": messages, **shared},
                sample_index=sample_index,
                input_tokens=input_tokens,
                output_tokens=self._output_tokens,
                estimated_microusd=reserved,
                budget_tokens=most_in + self._most_out,
                budget_microusd=most,
            )

    def _with_seed(self, seed: int) -> _Shared:
        found = self._seeded.get(seed)
        if found is None:
            shared = {**self._fixed, "seed": seed}
            found = shared, RequestKeys(self._endpoint, shared, self._epoch)
            if len(self._seeded) < MOST_SEEDS_KEPT:
                self._seeded[seed] = found
        return found


def _with_system(messages: tuple[Message, ...], system: str | None) -> list[Message]:
    """A prompt that brings its own system message keeps it."""
    if system is None or (messages and messages[0].get("role") in {"system", "developer"}):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def _fixed_fields(config: HarvestConfig) -> dict[str, Any]:
    """What every body of this harvest shares; `stream` is transport only and never changes the key."""
    sampling = config.sampling
    fields: dict[str, Any] = {"model": config.teacher.model, **_given(sampling), **sampling.extra}
    if sampling.stop is not None:
        fields["stop"] = list(sampling.stop)
    if sampling.tools is not None:
        fields["tools"] = [dict(tool) for tool in sampling.tools]
    if sampling.top_logprobs:
        fields |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
    if sampling.stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    return fields


def _given(sampling: SamplingSection) -> dict[str, Any]:
    names = (
        "temperature",
        "top_p",
        "max_tokens",
        "seed",
        "presence_penalty",
        "frequency_penalty",
        "reasoning_effort",
        "response_format",
    )
    values = {name: getattr(sampling, name) for name in names}
    return {name: value for name, value in values.items() if value is not None}


def _size(message: Message) -> int:
    content = message.get("content")
    if isinstance(content, str):
        text_bytes = len(content) if content.isascii() else len(content.encode("utf-8", "replace"))
        return TOKENS_PER_MESSAGE + estimate_tokens(text_bytes)
    text_bytes = len(str(_without_images(content))) if content else 0
    return TOKENS_PER_MESSAGE + estimate_tokens(text_bytes) + TOKENS_OF_IMAGE * _images(content)


def _images(content: Any) -> int:
    """How many parts are no text."""
    if not isinstance(content, list):
        return 0
    return sum(isinstance(part, dict) and part.get("type") not in {None, "text"} for part in content)


def _without_images(content: Any) -> Any:
    """The parts whose tokens go by their bytes; an image's go by its pixels, also in a data URI."""
    if not isinstance(content, list):
        return content
    return [part for part in content if not (isinstance(part, dict) and part.get("type") == "image_url")]


def _most_size(message: Message) -> int:
    """More tokens than any tokenizer makes of a message: none spends less than a byte on a token."""
    content = message.get("content")
    if isinstance(content, list):
        message = {**message, "content": _without_images(content)}
    return TOKENS_OF_TURN + MOST_TOKENS_OF_IMAGE * _images(content) + _bytes(message)


def _bytes(value: Any) -> int:
    try:
        return len(orjson.dumps(value))
    except orjson.JSONEncodeError:  # a lone surrogate, an integer beyond 64 bits
        return len(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))


def ceiling_of(body: Mapping[str, Any]) -> int:
    """Tokens the answer is limited to, 0 for no limit."""
    for name in ("max_completion_tokens", "max_tokens"):
        value = body.get(name)
        if isinstance(value, int) and value > 0:
            return value
    return 0
