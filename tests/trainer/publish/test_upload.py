"""Publish and push a student, and train on a published corpus: equal to the local one, terms first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from harvester.publish.fetch import fetch
from harvester.publish.store import publish_store
from harvester.system.objects.publisher import PublishOptions
from tests import fake_hub
from tests.fake_hub import TOKEN
from tests.trainer import tiny
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from trainer import config as settings
from trainer.data import dataset
from trainer.provenance import fingerprint


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def student(learned, tmp_path) -> Path:
    """A copy of a finished training, which a test may change; returns its train.toml."""
    config, _ = learned
    shutil.copytree(config.root, tmp_path / "learned")
    return tmp_path / "learned" / "train.toml"


@pytest.mark.slow
def test_a_published_corpus_is_learned_from_like_a_local_one(tmp_path):
    toml = tiny.train_toml(tmp_path, tiny.skill(12, held_out=4))
    local = dataset.read(settings.load(toml))
    url = f"file://{tmp_path}/remote"
    publish_store(tmp_path / "store", url)
    toml.write_text(toml.read_text().replace('corpus = "store"', f'corpus = "{url}"'))
    config = settings.load(toml)
    remote = dataset.read(config)
    assert remote.train == local.train
    assert remote.held_out == local.held_out
    assert remote.lineages == local.lineages
    grown = tiny.corpus(tmp_path / "store", tiny.skill(13, held_out=4))
    publish_store(grown, url, PublishOptions(replace=True))
    assert dataset.read(config).train == local.train  # a command stays with what it began with
    assert len(dataset.read(settings.load(toml)).train) == len(local.train) + 1


def test_a_published_corpus_that_is_not_there_is_an_error_without_a_traceback(tmp_path, run_trainer):  # noqa: F811
    toml = tiny.train_toml(tmp_path, tiny.skill(4), data={"corpus": f"file://{tmp_path}/nowhere"})
    code, _, err = run_trainer("plan", toml, "--probe", 0)
    assert code == 5
    assert "nothing was published" in err


def test_a_student_is_published_and_fetched(student, tmp_path, run_trainer):  # noqa: F811
    (student.parent / "out" / "scorecard.json").write_text("{}")
    url = f"file://{tmp_path}/remote"
    code, out, err = run_trainer("publish", student, url, "--json")
    assert code == 0, err
    assert json.loads(out)["uploaded"] > 3
    fetch(url, tmp_path / "copy")
    assert not fingerprint.verify(tmp_path / "copy" / "adapter")
    assert (tmp_path / "copy" / "scorecard.json").read_text() == "{}"
    code, out, _ = run_trainer("publish", student, url, "--json")
    assert (code, json.loads(out)["uploaded"], json.loads(out)["is_new"]) == (0, 0, False)
    (student.parent / "out" / "adapter" / "adapter_config.json").write_text("{}")
    code, _, err = run_trainer("publish", student, url)
    assert code == 1
    assert "adapter_config.json" in err


# huggingface_hub passes raw bytes in a way that its HTTP client warns of.
@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")
def test_a_student_is_pushed_after_the_terms_were_asked(student, run_trainer, monkeypatch):  # noqa: F811
    with fake_hub.running() as hub:
        for name, value in (("HF_ENDPOINT", hub.url), ("HF_TOKEN", TOKEN)):
            monkeypatch.setenv(name, value)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        code, out, err = run_trainer("push", student, "me/student", "--json")
        assert (code, hub.requests) == (0, []), err
        assert "adapter_model.safetensors" in json.loads(out)["files"]
        code, out, err = run_trainer("push", student, "me/student", "--upload", "--json")
        assert code == 0, err
        repository = hub.repositories["models/me/student"]
        assert repository.visibility == "private"
        adapter = student.parent / "out" / "adapter"
        weights = repository.files["adapter_model.safetensors"]
        assert weights == (adapter / "adapter_model.safetensors").read_bytes()
        sent = len(hub.requests)
        text = student.read_text()
        student.write_text(text + "\n[export]\n" if "[export]" not in text else text)
        terms = student.parent / "terms"
        terms.mkdir()
        (terms / "mine.toml").write_text("[[record]]\nid = 1\n")  # nobody knows what it permits
        code, _, _ = run_trainer("push", student, "me/student", "--upload")
        assert code != 0
        assert len(hub.requests) == sent


def test_a_student_of_which_all_weights_were_trained_is_pushed_and_published(tmp_path, run_trainer):  # noqa: F811
    toml = tiny.train_toml(
        tmp_path, tiny.skill(8), train={"method": "full", "max_steps": 1}, lora={"rank": 32, "alpha": 64}
    )
    code, _, err = run_trainer("push", toml, "me/student")
    assert code != 0
    assert "out/model" in err
    assert run_trainer("train", toml)[0] == 0
    code, out, err = run_trainer("push", toml, "me/student", "--json")
    assert code == 0, err
    files = json.loads(out)["files"]
    assert {"model.safetensors", "config.json", "README.md", fingerprint.TREE_FILE} <= set(files)
    url = f"file://{tmp_path}/remote"
    assert run_trainer("publish", toml, url)[0] == 0
    fetch(url, tmp_path / "copy")
    assert not fingerprint.verify(tmp_path / "copy" / "model")
    weights = (tmp_path / "out" / "model" / "model.safetensors").read_bytes()
    assert (tmp_path / "copy" / "model" / "model.safetensors").read_bytes() == weights
