"""The mock teacher that queues instead of refusing, and limits counted in windows."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import orjson
import pytest

from harvester.errors import ConfigError
from harvester.mock_teacher.limits import LimitValues, MockLimits, WindowCount
from harvester.mock_teacher.running import RunningMock
from harvester.mock_teacher.settings import MockSettings
from harvester.mock_teacher.wire import Refusal

Mock = Callable[..., RunningMock]


def _ask(mock: RunningMock, number: int) -> int:
    url = urlsplit(mock.base_url)
    connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=30)
    body = {"model": "mock-teacher", "messages": [{"role": "user", "content": f"What is {number} + 1?"}]}
    connection.request("POST", f"{url.path}/chat/completions", orjson.dumps(body))
    status = connection.getresponse().status
    connection.close()
    return status


def test_more_requests_than_slots_queue_and_none_is_refused(mock_teacher: Mock) -> None:
    mock = mock_teacher(slots=2, slot_s=0.1)
    statuses: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: statuses.append(_ask(mock, n)))  # type: ignore[misc]
        for n in range(6)
    ]
    begun_at = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert statuses == [200] * 6
    assert time.monotonic() - begun_at >= 0.3  # three rounds of two


def test_a_window_admits_its_share_and_begins_anew() -> None:
    count = WindowCount(600, 2.0, 10.0)
    for _ in range(20):
        assert count.wait_s(1, 10.5) == 0
        count.take(1, 10.5)
    assert count.wait_s(1, 10.5) == pytest.approx(1.5)
    assert count.remaining(11.9) == 0
    assert count.wait_s(1, 12.0) == 0
    assert count.remaining(12.0) == 20


def test_a_limit_in_windows_sends_headers_that_do_not_say_the_window() -> None:
    limits = MockLimits(LimitValues(rpm=600, window_s=1.0), "m", 0.0)
    for _ in range(10):
        limits.admit(1, 0.25)
    with pytest.raises(Refusal) as refusal:
        limits.admit(1, 0.25)
    assert dict(refusal.value.headers) == {
        b"x-ratelimit-limit": b"10",
        b"x-ratelimit-remaining": b"0",
        b"x-ratelimit-reset": b"1",
    }


@pytest.mark.parametrize("settings", [{"slots": 0}, {"window_s": 0.0}, {"slot_s": -1.0}])
def test_impossible_settings_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        MockSettings(**settings)  # type: ignore[arg-type]
