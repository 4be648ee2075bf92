"""Test what a new process may send at once."""

from __future__ import annotations

import pytest

from harvester.config.config import HarvestConfig
from harvester.observe.counters import PassLimits
from harvester.system.clock import SystemClock
from harvester.teacher.limiter.limits import Charge
from harvester.teacher.policies import START_S, build_policies

RATE = 200


@pytest.mark.parametrize(("idle_s", "at_once"), [(None, 1), (0.02, 5), (3600.0, 1 + round(START_S * RATE))])
def test_a_process_that_sent_nothing_may_begin_with_a_part_of_the_burst(idle_s, at_once):
    url = "http://127.0.0.1:8000/v1"
    config = HarvestConfig.model_validate(
        {
            "teacher": {"base_url": url, "model": "m", "limits": {"requests_per_minute": 60 * RATE}},
            "prompts": {"files": ["p.jsonl"]},
        }
    )
    clock = SystemClock()
    now = clock.now()
    clock.now = lambda: now
    policies = build_policies(
        config, PassLimits(), clock, idle_since=None if idle_s is None else now - idle_s
    )
    limiter, sent = policies.limiters[url], 0
    while limiter.departure_wait_s(now) <= 1e-9:
        limiter.departed(limiter.enter(Charge(1, 1), now), now)
        sent += 1
    assert sent == at_once
