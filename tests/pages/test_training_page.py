"""Test train.html in Chromium: it refreshes itself, says when nobody writes it any more, fits a phone."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.pages import hostile
from tests.pages.test_browser import complaints, tags, text_of, until
from tests.trainer.live.test_figures import line
from tests.trainer.live.test_terminal import answer
from trainer import config as settings
from trainer.live import page
from trainer.live.figures import Figures
from trainer.training.logbook import Evaluation, Sampled, TrainingStarted

# A training of another process, whose step is what its stdin says; the page is written every 0.2 s.
TRAINING = """
import sys
from pathlib import Path
from tests.trainer.live.test_figures import line
from trainer import config as settings
from trainer.live import page
from trainer.training.logbook import TrainingStarted
page.WRITE_S = 0.2
data = {"student": {"base": "base"}, "data": {"corpus": "store"}}
with page.live_page(settings.parse(data, root=Path(sys.argv[1]), place="x")) as show:
    show(TrainingStarted(0, 100, ("cpu",)))
    for step in sys.stdin:
        show(line(int(step)))
"""


def config_of(folder: Path) -> settings.TrainConfig:
    data = {"student": {"base": "base"}, "data": {"corpus": "store"}}
    return settings.parse(data, root=folder, place="x")


@pytest.mark.slow  # 4 s of waiting
def test_it_follows_a_training_and_notices_its_death_and_its_end(browser: Any, tmp_path: Path):
    path = tmp_path / "out" / page.PAGE
    path.parent.mkdir()
    words = [sys.executable, "-c", TRAINING, str(tmp_path)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, text=True) as training:
        until(path.exists)
        browser.get(path.as_uri())
        assert text_of(browser, "#state") == "running"
        for step in (7, 8):
            training.stdin.write(f"{step}\n")
            training.stdin.flush()
            until(lambda step=step: f"{step}of 100" in text_of(browser, ".tiles"))
        training.kill()
    until(lambda: text_of(browser, "#state") == "no longer refreshed")
    assert "the training has ended without a word" in text_of(browser, "#age")
    with subprocess.Popen(words, stdin=subprocess.PIPE, text=True) as training:
        until(lambda: text_of(browser, "#state") == "running")  # by itself
        training.stdin.close()
        assert training.wait(60) == 0
    until(lambda: text_of(browser, "#state") == "complete")
    assert "no longer runs" in text_of(browser, "#age")
    assert complaints(browser) == []


def test_hostile_text_is_inert_and_it_fits_every_screen(browser: Any, tmp_path: Path):
    seen = Figures()
    seen.add(TrainingStarted(0, 100, hostile.TEXTS))
    for step in range(1, 60):
        seen.add(line(step))
        if step % 10 == 0:
            seen.add(Evaluation(step, 100, 3.0 / step, step, 3.0 / step, (), 1.0))
    seen.add(Sampled(59, 100, tuple(map(answer, (*hostile.TEXTS, "long" * 500))), 1.0))
    path = tmp_path / "train.html"
    for width in (390, 1200):
        sizes = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
        for state in ("running", "failed"):
            path.write_text(page.document(config_of(tmp_path), seen, state, hostile.TEXTS[0]))
            browser.get(path.as_uri())
            assert browser.execute_script("return document.documentElement.scrollWidth") <= width
            wider = (
                "return [...document.querySelectorAll('section')].filter(e => e.scrollWidth > e.clientWidth)"
            )
            assert browser.execute_script(f"{wider}.length") == 0
            assert browser.title == "Training of out"
            assert not tags(browser) & {
                "img",
                "iframe",
                "a",
                "form",
                "meta",
                "link",
                "base",
                "style",
                "template",
            }
            assert complaints(browser) == []
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
