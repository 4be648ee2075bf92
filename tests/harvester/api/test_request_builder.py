"""Requests have exactly the configured fields and nothing that must not be sent."""

from __future__ import annotations

import itertools
import tracemalloc
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.api.request_builder import DEFAULT_OUTPUT_TOKENS, cost_microusd, requests
from harvester.api.types import Prompt, Request
from harvester.config.config import HarvestConfig
from harvester.config.teacher_section import PriceSection
from harvester.errors import PromptError

URL = "http://127.0.0.1:1/v1"


def config(sampling: dict[str, Any] | None = None, **more: Any) -> HarvestConfig:
    prompts = {"files": ["p"], **more.pop("prompts", {})}
    teacher = {"base_url": URL, "model": "m", **more.pop("teacher", {})}
    return HarvestConfig.model_validate(
        {"teacher": teacher, "prompts": prompts, "sampling": sampling or {}, **more}
    )


def prompt(text: str = "hello", **more: Any) -> Prompt:
    return Prompt("p1", ({"role": "user", "content": text},), **more)


def request_of(prompt: Prompt, config: HarvestConfig) -> Request:
    """The first request for one prompt."""
    return next(requests([prompt], config))


def test_the_body_holds_what_is_configured_and_nothing_else() -> None:
    body = request_of(prompt(reference="secret", tags=("t",), metadata={"split": "x"}), config()).body
    assert body == {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
    body = request_of(
        prompt(),
        config(
            {"temperature": 0.0, "max_tokens": 5, "stop": ["a"], "top_logprobs": 3, "extra": {"min_p": 0.1}},
            prompts={"system": "Be brief."},
        ),
    ).body
    assert body == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}],
        "temperature": 0.0,
        "max_tokens": 5,
        "stop": ["a"],
        "logprobs": True,
        "top_logprobs": 3,
        "min_p": 0.1,
    }


def test_a_prompt_keeps_its_own_system_message() -> None:
    own = Prompt("p", ({"role": "system", "content": "mine"}, {"role": "user", "content": "x"}))
    assert request_of(own, config(prompts={"system": "yours"})).body["messages"][0]["content"] == "mine"


def test_samples_have_their_own_keys_and_seeds() -> None:
    built = list(requests([prompt()], config({"samples": 3, "seed": 10})))
    assert [request.body["seed"] for request in built] == [10, 11, 12]
    assert [request.sample_index for request in built] == [0, 1, 2]
    assert len({request.key for request in built}) == 3
    assert request_of(prompt(), config({"seed": 10})).body["seed"] == 10


def test_unsent_fields_and_transport_never_change_the_key() -> None:
    plain = request_of(prompt(), config()).key
    assert request_of(prompt(reference="r", metadata={"a": 1}), config()).key == plain
    assert request_of(prompt(), config({"stream": True})).key == plain
    assert request_of(prompt("other"), config()).key != plain
    assert request_of(prompt(), config({"temperature": 0.5})).key != plain
    assert request_of(prompt(), config(run={"epoch": 1})).key != plain
    assert request_of(prompt(), config(teacher={"base_url": "http://127.0.0.1:2/v1"})).key != plain


def test_prompts_are_read_one_at_a_time() -> None:
    pulled = []

    def endless() -> Any:
        number = 0
        while True:
            pulled.append(number)
            yield prompt(str(number))
            number += 1

    feed = requests(endless(), config())
    next(feed)
    next(feed)
    assert pulled == [0, 1]


def test_reservation_uses_max_tokens_or_a_guess() -> None:
    price = {"price": {"input": 1.0, "output": 2.0}}
    bounded = request_of(prompt(), config({"max_tokens": 50}, teacher=price))
    assert (bounded.output_tokens, bounded.estimated_microusd) == (50, bounded.input_tokens + 100)
    assert request_of(prompt(), config()).output_tokens == DEFAULT_OUTPUT_TOKENS


@given(st.integers(0, 10**7), st.integers(0, 10**7), st.integers(0, 10**7))
def test_price_is_exact_in_micro_dollars_and_rounds_up(tokens_in: int, tokens_out: int, cached: int) -> None:
    price = PriceSection(input=0.15, output=0.6, cached_input=0.075)
    hit = min(cached, tokens_in)
    thousandths = (tokens_in - hit) * 150 + hit * 75 + tokens_out * 600
    assert cost_microusd(price, tokens_in, tokens_out, cached) == -(-thousandths // 1000)


def test_no_price_costs_nothing_known() -> None:
    assert cost_microusd(None, 10, 10) == 0


@pytest.mark.parametrize("seed", [None, 7])
def test_a_million_samples_of_a_prompt_are_built_one_at_a_time(seed: int | None) -> None:
    chosen = config({"samples": 1_000_000, "seed": seed})
    tracemalloc.start()
    try:
        built = sum(1 for _ in itertools.islice(requests([prompt()], chosen), 2000))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (built, peak < 4 << 20) == (2000, True)


def test_a_prompt_made_by_hand_without_canonical_json_is_named() -> None:
    odd = Prompt("p", ({"role": "user", "content": "x", "n": 2**60},), file="here", line=3)
    with pytest.raises(PromptError, match=r"here:3: no canonical JSON"):
        list(requests([prompt(), odd], config()))
