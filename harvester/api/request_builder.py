"""Build requests from prompts and the configuration: body, key, estimated tokens and price. Pure.

Requests are built one at a time, so the prompts never need to fit into memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import orjson

from harvester.api.max_tokens import positive_max_tokens_of
from harvester.api.replies.completion import estimate_tokens
from harvester.api.request_key import RequestKeys, canonical, request_key
from harvester.api.scoring.request_forms import GENERATED_TOKENS, PATHS, body_of, text_of, way_named
from harvester.api.types import Message, Prompt, Request
from harvester.config.config import ROW_SETTINGS, HarvestConfig, SamplingSection
from harvester.config.teacher_section import PriceSection
from harvester.errors import ConfigError, PromptError

TOKENS_PER_MESSAGE = 4
# Output tokens to reserve at the limiter when no `max_tokens` is configured.
DEFAULT_OUTPUT_TOKENS = 1024
# Output tokens to reserve in the budget when no `max_tokens` is configured.
MAX_OUTPUT_TOKENS = 32_768
TOKENS_PER_IMAGE = 1024
# More than any teacher is known to charge: gpt-4o-mini takes 2,833 + 8 x 5,667 tokens at high detail.
MAX_TOKENS_PER_IMAGE = 50_000
# The most that a chat template adds: around messages and tools, and around each message.
MAX_FRAME_TOKENS, MAX_TURN_TOKENS = 64, 16
# Shared fields are cached for this many seeds; those of further samples are built for each prompt.
CACHED_SEEDS = 1000

# All fields of a body but `messages`, and the keys of the requests that share them.
_SharedFields = tuple[dict[str, Any], RequestKeys]


def check(config: HarvestConfig) -> None:
    """Check that a request key can be computed for this configuration.

    Raises:
        ConfigError: a field of all requests has no canonical JSON.
    """
    fixed, sampling = _fixed_fields(config), config.sampling
    if sampling.seed is not None:
        fixed["seed"] = sampling.seed + config.most_samples - 1
    for name, value in fixed.items():
        try:
            canonical({name: value})
        except ValueError as error:
            remedy = "integers must be at most 2**53 - 1; NaN and infinities are not JSON"
            raise ConfigError(str(error), place=f"sampling.{name}", remedy=remedy) from None


def requests(
    prompts: Iterable[Prompt], config: HarvestConfig, samples: range | None = None
) -> Iterator[Request]:
    """Yield the requests of a harvest in prompt order.

    Args:
        samples: sample numbers of each prompt; None: those that the configuration asks in any case.

    Raises:
        ConfigError: see `check`.
        PromptError: a prompt has no canonical JSON. Those from files are refused earlier, when read.
    """
    check(config)
    builder = RequestBuilder(config) if config.score is None else ScoreRequestBuilder(config)
    samples = range(config.first_samples) if samples is None else samples
    for prompt in prompts:
        try:
            yield from builder.build(prompt, samples)
        except ValueError as error:
            raise PromptError(str(error), place=f"{prompt.file}:{prompt.line}") from None


def input_tokens_of(prompt: Prompt, config: HarvestConfig) -> int:
    """Return estimated input tokens of one request for this prompt, without building it."""
    if config.score is not None:
        return score_input_tokens(prompt)
    own = _field_tokens(prompt.fields, canonical(prompt.fields)) if prompt.fields else 0
    messages = with_system(prompt.messages, config.prompts.system)
    return own + estimated_tokens_of(messages)


def estimated_tokens_of(messages: Iterable[Message]) -> int:
    """Return estimated input tokens of these messages: one for each four bytes, and some for each message."""
    return sum(_estimated_tokens(message) for message in messages)


def with_estimates(request: Request, price: PriceSection | None) -> Request:
    """Return a request with estimated tokens and costs at this price, by its body alone."""
    fields = {name: value for name, value in request.body.items() if name != "messages"}
    messages = request.body["messages"]
    max_tokens = positive_max_tokens_of(request.body)
    output, most_output = max_tokens or DEFAULT_OUTPUT_TOKENS, max_tokens or MAX_OUTPUT_TOKENS
    most_input = _max_extra_tokens(fields) + sum(_max_tokens(message) for message in messages)
    input_tokens = request.input_tokens or estimated_tokens_of(messages)
    return replace(
        request,
        input_tokens=input_tokens,
        output_tokens=output,
        estimated_microusd=cost_microusd(price, input_tokens, output),
        budget_tokens=most_input + most_output,
        budget_microusd=cost_microusd(price, most_input, most_output),
        budget_output_tokens=most_output,
    )


def cost_microusd(
    price: PriceSection | None, input_tokens: int, output_tokens: int, cached_tokens: int = 0
) -> int:
    """Price of these tokens in millionths of a dollar, rounded up, so that no ceiling is exceeded.

    USD per million tokens is micro-dollars per token, so no factor is needed.
    """
    exact = exact_microusd(price, input_tokens, output_tokens, cached_tokens)
    # 1e-6: 100 * 1.1 is 110.00000000000001 in binary; rounding noise must not add a micro-dollar.
    return max(0, math.ceil(exact - 1e-6))


def exact_microusd(
    price: PriceSection | None, input_tokens: int, output_tokens: int, cached_tokens: int = 0
) -> float:
    """Price of these tokens in millionths of a dollar, not rounded."""
    if price is None:
        return 0.0
    cached_rate = price.input if price.cached_input is None else price.cached_input
    cached = min(cached_tokens, input_tokens)
    return (input_tokens - cached) * price.input + cached * cached_rate + output_tokens * price.output


class RequestBuilder:
    """Build the requests of prompts. The fields that all of them share are computed once.

    The configuration has passed `check`.
    """

    def __init__(self, config: HarvestConfig) -> None:
        sampling = config.sampling
        self._endpoint, self._epoch = config.teacher.key_name, config.run.epoch
        self._system = config.prompts.system
        self._price = config.teacher.price
        self._fixed = fixed = _fixed_fields(config)
        self._has_further_samples = config.most_samples > 1
        self._seed = sampling.seed if self._has_further_samples else None
        self._unseeded = fixed, RequestKeys(self._endpoint, fixed, self._epoch)
        self._seeded: dict[int, _SharedFields] = {}
        self._own: dict[tuple[bytes, int | None], _SharedFields] = {}
        max_tokens = positive_max_tokens_of(fixed)
        self._output_tokens = max_tokens or DEFAULT_OUTPUT_TOKENS
        self._max_output = max_tokens or MAX_OUTPUT_TOKENS
        self._max_extra = _max_extra_tokens(fixed)

    def build(self, prompt: Prompt, samples: Iterable[int]) -> Iterator[Request]:
        """Yield the requests of one prompt, by sample number.

        Raises:
            ValueError: the prompt has no canonical JSON.
        """
        messages = with_system(prompt.messages, self._system)
        input_tokens = estimated_tokens_of(messages)
        max_extra, own, own_seed = self._max_extra, b"", None
        output_tokens, max_output = self._output_tokens, self._max_output
        if prompt.fields:
            own = canonical(prompt.fields)
            merged = {**self._fixed, **prompt.fields}
            max_extra = _max_extra_tokens(merged)
            input_tokens += _field_tokens(prompt.fields, own)
            own_seed = prompt.fields.get("seed")
            if "max_tokens" in prompt.fields:
                output_tokens = max_output = positive_max_tokens_of(merged)
        first_seed = self._seed if own_seed is None or not self._has_further_samples else own_seed
        max_input = max_extra + sum(_max_tokens(message) for message in messages)
        estimate = cost_microusd(self._price, input_tokens, output_tokens)
        budget = cost_microusd(self._price, max_input, max_output)
        for sample_index in samples:
            seed = None if first_seed is None else first_seed + sample_index
            if own:
                shared, keys = self._with_own(prompt.fields, own, seed)
            else:
                shared, keys = self._unseeded if seed is None else self._with_seed(seed)
            yield Request(
                key=keys.key(messages, sample_index),
                prompt=prompt,
                body={"messages": messages, **shared},
                sample_index=sample_index,
                input_tokens=input_tokens,
                output_tokens=output_tokens,
                estimated_microusd=estimate,
                budget_tokens=max_input + max_output,
                budget_microusd=budget,
                budget_output_tokens=max_output,
            )

    def _with_own(self, fields: Mapping[str, Any], digest: bytes, seed: int | None) -> _SharedFields:
        """The shared fields with a prompt's own ones, which replace those of the configuration."""
        name = digest, seed
        shared = self._own.get(name)
        if shared is None:
            merged = {**self._fixed, **fields, **({} if seed is None else {"seed": seed})}
            shared = merged, RequestKeys(self._endpoint, merged, self._epoch)
            if len(self._own) < CACHED_SEEDS:
                self._own[name] = shared
        return shared

    def _with_seed(self, seed: int) -> _SharedFields:
        shared = self._seeded.get(seed)
        if shared is None:
            fields = {**self._fixed, "seed": seed}
            shared = fields, RequestKeys(self._endpoint, fields, self._epoch)
            if len(self._seeded) < CACHED_SEEDS:
                self._seeded[seed] = shared
        return shared


class ScoreRequestBuilder:
    """Build the requests that ask for the log-probabilities of given texts; `score.via` names the way.

    While `via` is "auto", the first way that fits a prompt stands for all: tokens and price are alike. Their
    keys contain the route, so none is that of a request for an answer.
    """

    def __init__(self, config: HarvestConfig) -> None:
        assert config.score is not None
        self._config = config
        self._via = config.score.via
        self._listed = config.score.top_logprobs

    def build(self, prompt: Prompt, samples: Iterable[int]) -> Iterator[Request]:
        """Yield the requests of one prompt, by sample number.

        Raises:
            ValueError: the prompt can't be scored in this way, or has no canonical JSON.
        """
        config = self._config
        way = way_named(self._via, prompt)
        body = body_of(way, config.teacher.model, prompt, config.sampling.extra, self._listed)
        input_tokens = score_input_tokens(prompt)
        max_input = MAX_FRAME_TOKENS + _json_bytes(body)
        price, path = config.teacher.price, PATHS[way]
        for sample_index in samples:
            yield Request(
                key=request_key(f"{config.teacher.key_name}{path}", body, sample_index, config.run.epoch),
                prompt=prompt,
                body=body,
                sample_index=sample_index,
                input_tokens=input_tokens,
                output_tokens=GENERATED_TOKENS,
                estimated_microusd=cost_microusd(price, input_tokens, GENERATED_TOKENS),
                budget_tokens=max_input + GENERATED_TOKENS,
                budget_microusd=cost_microusd(price, max_input, GENERATED_TOKENS),
                path=path,
            )


def score_input_tokens(prompt: Prompt) -> int:
    """Return estimated input tokens of a request that scores this prompt."""
    text = text_of(prompt)
    return estimated_tokens_of(prompt.messages) if text is None else estimate_tokens(len(text.encode()))


def _field_tokens(fields: Mapping[str, Any], encoded: bytes) -> int:
    """Estimated input tokens of a prompt's own fields. Settings are no part of what the model reads.

    Args:
        encoded: all of the fields as canonical JSON.
    """
    if ROW_SETTINGS.isdisjoint(fields):
        return estimate_tokens(len(encoded))
    read = {name: value for name, value in fields.items() if name not in ROW_SETTINGS}
    return estimate_tokens(len(canonical(read))) if read else 0


def _max_extra_tokens(fields: Mapping[str, Any]) -> int:
    """An upper bound of the tokens that a chat template adds around the messages, tools included."""
    extras = [fields[name] for name in ("tools", "functions", "response_format") if name in fields]
    return MAX_FRAME_TOKENS + sum(_json_bytes(extra) for extra in extras)


def with_system(messages: tuple[Message, ...], system: str | None) -> list[Message]:
    """Return the messages to send. A prompt that has its own system message keeps it."""
    if system is None or (messages and messages[0].get("role") in {"system", "developer"}):
        return list(messages)
    return [{"role": "system", "content": system}, *messages]


def _fixed_fields(config: HarvestConfig) -> dict[str, Any]:
    """The fields that every body of this harvest has. `stream` is among them and never changes the key."""
    sampling = config.sampling
    fields: dict[str, Any] = {"model": config.teacher.model, **_set_fields(sampling), **sampling.extra}
    if sampling.stop is not None:
        fields["stop"] = list(sampling.stop)
    if sampling.tools is not None:
        fields["tools"] = [dict(tool) for tool in sampling.tools]
    if sampling.top_logprobs:
        fields |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
    if sampling.stream:
        fields |= {"stream": True, "stream_options": {"include_usage": True}}
    return fields


def _set_fields(sampling: SamplingSection) -> dict[str, Any]:
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


def _estimated_tokens(message: Message) -> int:
    content = message.get("content")
    if isinstance(content, str):
        text_bytes = len(content) if content.isascii() else len(content.encode("utf-8", "replace"))
        return TOKENS_PER_MESSAGE + estimate_tokens(text_bytes)
    text_bytes = len(str(_without_images(content))) if content else 0
    return TOKENS_PER_MESSAGE + estimate_tokens(text_bytes) + TOKENS_PER_IMAGE * _images(content)


def _images(content: Any) -> int:
    """The number of parts that are not text."""
    if not isinstance(content, list):
        return 0
    return sum(isinstance(part, dict) and part.get("type") not in (None, "text") for part in content)


def _without_images(content: Any) -> Any:
    """The parts whose tokens depend on their bytes. An image's depend on its pixels, also in a data URI."""
    if not isinstance(content, list):
        return content
    return [part for part in content if not (isinstance(part, dict) and part.get("type") == "image_url")]


def _max_tokens(message: Message) -> int:
    """An upper bound of the tokens of a message: every token is at least one byte."""
    content = message.get("content")
    if isinstance(content, list):
        message = {**message, "content": _without_images(content)}
    return MAX_TURN_TOKENS + MAX_TOKENS_PER_IMAGE * _images(content) + _json_bytes(message)


def _json_bytes(value: Any) -> int:
    try:
        return len(orjson.dumps(value))
    except orjson.JSONEncodeError:  # a lone surrogate, an integer beyond 64 bits
        return len(json.dumps(value, ensure_ascii=False).encode("utf-8", "replace"))
