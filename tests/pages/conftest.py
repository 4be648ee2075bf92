"""Make a store with hostile texts in every field, and a headless Chromium to look at its pages."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from harvester.store.shards import seal
from tests.harvester import store_rows
from tests.pages import hostile


@pytest.fixture(scope="session")
def hostile_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every hostile text as a prompt, an answer, a finish reason, a model's name; half of it sealed."""
    store = tmp_path_factory.mktemp("hostile") / "store"
    with store_rows.open_store(store, model=hostile.TEXTS[0]) as journal:
        for number, text in enumerate(hostile.TEXTS):
            journal.apply([store_rows.intent(number)])
            journal.apply([hostile.answer(number, text)])
            if number == len(hostile.TEXTS) // 2:
                seal.seal(journal, store, target_bytes=1 << 20, everything=True)
    return store


@pytest.fixture(scope="session")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Chromium over its own driver; the tests that need it are skipped where it is not installed."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium and chromedriver here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-quic",
        "no-first-run",
        "disable-dev-shm-usage",
        "disable-background-networking",
        "disable-component-update",
        "disable-sync",
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    try:
        yield chrome
    finally:
        chrome.quit()


@pytest.fixture
def browser(chromium: Any) -> Any:
    """The browser without the page of the test before, which may still load from a server that is gone."""
    chromium.get("about:blank")
    chromium.get_log("browser")
    return chromium
