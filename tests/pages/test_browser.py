"""Test report and view in headless Chromium: nothing a teacher wrote is executed; search and refresh work."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from markupsafe import Markup

from harvester.observe.report import report
from harvester.observe.report import server as view
from tests.harvester import store_rows
from tests.pages import hostile
from tests.waiting import until
from trainer.experiments.page import Page, Table


class Served:
    """Views under way, each in a thread."""

    def __init__(self) -> None:
        self._servers: list[tuple[uvicorn.Server, threading.Thread]] = []

    def start(self, store: Path) -> str:
        """Serve a store as `harvester view` does; returns the address."""
        server = uvicorn.Server(
            uvicorn.Config(view.build_app(store, "token"), port=0, log_level="error", lifespan="off")
        )
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        self._servers.append((server, thread))
        until(lambda: server.started)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/token/"

    def stop(self) -> None:
        """End them all."""
        for server, thread in self._servers:
            server.should_exit = server.force_exit = True
            thread.join(240)


@pytest.fixture
def served() -> Iterator[Served]:
    views = Served()
    yield views
    views.stop()


def complaints(browser: Any) -> list[str]:
    """What the browser complained about: refused scripts, styles, loads, errors."""
    return [entry["message"] for entry in browser.get_log("browser")]


def text_of(browser: Any, selector: str) -> str:
    """In one step: the view may replace what was found before it is read."""
    return str(browser.execute_script("return document.querySelector(arguments[0]).textContent", selector))


def shown(browser: Any) -> list[str]:
    script = (
        "return Array.from(document.querySelectorAll('#samples > li:not([hidden])')).map(e => e.textContent)"
    )
    return list(browser.execute_script(script))


def type_in(browser: Any, text: str) -> None:
    browser.execute_script(
        "const s = document.getElementById('search'); s.value = arguments[0];"
        "s.dispatchEvent(new Event('input'));",
        text,
    )


def tags(browser: Any) -> set[str]:
    return set(
        browser.execute_script(
            "return Array.from(document.querySelectorAll('body *')).map(e => e.tagName.toLowerCase())"
        )
    )


def test_hostile_text_is_inert_in_the_report(browser: Any, hostile_store: Path, tmp_path: Path):
    path = report.write_report(hostile_store, tmp_path / "report.html")
    browser.get(path.as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.title.startswith("Harvest of")
    assert complaints(browser) == []
    assert not tags(browser) & {"img", "iframe", "a", "form", "meta", "link", "base", "style", "template"}
    assert browser.execute_script("return document.scripts.length") == 1
    assert len(shown(browser)) == len(hostile.TEXTS)
    text = browser.execute_script("return document.body.innerText")
    assert "{{ 7 * 7 }}" in text
    assert "\\x1b[31mred" in text
    assert "\\u202e" in text
    assert "\u202e" not in text
    assert "👩‍👩‍👧‍👦" in text


def test_the_reports_search_and_filter(browser: Any, hostile_store: Path, tmp_path: Path):
    browser.get(report.write_report(hostile_store, tmp_path / "report.html").as_uri())
    assert len(shown(browser)) == len(hostile.TEXTS)
    type_in(browser, "ALREADY ESCAPED")
    assert len(shown(browser)) == 1
    assert "already escaped" in shown(browser)[0]
    assert f"1 of the {len(hostile.TEXTS)}" in text_of(browser, "#found")
    type_in(browser, "nowhere to be found")
    assert shown(browser) == []
    type_in(browser, "")
    assert len(shown(browser)) == len(hostile.TEXTS)


def test_the_page_of_an_experiment_fits_a_phone(browser: Any, tmp_path: Path):
    long = "trainings/61171c98d32c80d8/" + "merged/" * 12
    table = Table(
        "Stages", ["stage", "what it did", "seconds"], [["export", long, "2.7"], ["plan", "1", "9"]]
    )
    page = Page(
        "a" * 90, "lead", "good", False, [("1", "tile")] * 5, "Loss", Markup(""), (), ["n" * 99], [table]
    )
    (tmp_path / "page.html").write_text(page.render(), encoding="utf-8")
    for width in (390, 1100):
        sizes = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
        browser.get((tmp_path / "page.html").as_uri())
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        wider = "return [...document.querySelectorAll('section')].filter(e => e.scrollWidth > e.clientWidth)"
        assert browser.execute_script(f"{wider}.length") == 0
        label = "return getComputedStyle(document.querySelectorAll('td')[2], '::before').content"
        assert ("seconds" in browser.execute_script(label)) == (width == 390)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("width", [390, 1240])
def test_no_page_is_wider_than_its_screen(browser: Any, hostile_store: Path, tmp_path: Path, width: int):
    path = report.write_report(hostile_store, tmp_path / "report.html")
    sizes = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    browser.get(path.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    # no table has to be scrolled either
    wider = "return [...document.querySelectorAll('.scroll')].filter(e => e.scrollWidth > e.clientWidth + 1)"
    assert browser.execute_script(f"{wider}.length") == 0
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_hostile_text_is_inert_in_the_view_and_search_finds_it(
    browser: Any, hostile_store: Path, served: Served
):
    browser.get(served.start(hostile_store))
    type_in(browser, "onerror")
    until(lambda: 0 < len(shown(browser)) < len(hostile.TEXTS))
    assert all("onerror" in text for text in shown(browser))
    assert browser.title.startswith("Harvest of")
    assert not tags(browser) & {"img", "iframe", "a", "form", "meta", "link", "base", "style", "template"}
    assert complaints(browser) == []


@pytest.mark.slow  # 5 s of waiting
def test_the_view_refreshes_by_itself_and_says_when_it_no_longer_does(
    browser: Any, tmp_path: Path, served: Served, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(view, "READ_EVERY_S", 0.1)
    store = tmp_path / "store"
    with store_rows.open_store(store) as journal:
        store_rows.fill(journal, range(5))
        address = served.start(store)
        browser.get(address)
        assert "5 answers" in text_of(browser, ".lead")
        store_rows.fill(journal, range(5, 1205))
        until(lambda: "1,205 answers" in text_of(browser, ".lead"))
    served.stop()
    until(lambda: browser.execute_script("return document.body.classList.contains('stale')"))
    assert "not refreshed" in text_of(browser, "#as-of")
