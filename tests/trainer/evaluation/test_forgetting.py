"""Test what the scorecard says of forgetting, and the guard that refuses an export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from trainer import config as settings
from trainer.data.chat_template import Renderer
from trainer.errors import DataError
from trainer.evaluation import forgetting
from trainer.model import model


@pytest.fixture
def trained(learned, tmp_path) -> Path:
    """train.toml of a copy of the finished training, which a test may change."""
    config, _ = learned
    shutil.copytree(config.root, tmp_path / "copy")
    return tmp_path / "copy" / "train.toml"


def general_file(toml: Path, *lines: str) -> settings.TrainConfig:
    (toml.parent / "general.jsonl").write_text("\n".join(lines))
    toml.write_text(f'{toml.read_text()}[evaluate]\ngeneral_prompts = "general.jsonl"\n')
    return settings.load(toml)


def test_a_student_that_forgot_is_not_exported_and_one_that_did_not_is(run_trainer, trained):  # noqa: F811
    # The base answers everything with newlines; the student has learned to answer with letters.
    general = [json.dumps({"prompt": f"backwards: abc{c}", "answer": "\n" * 30 + "x"}) for c in "abcdefgh"]
    config = general_file(trained, *general)
    measured = forgetting.measure(config)
    increase = measured["increase"]
    assert 0.02 < increase["low"] <= increase["value"] <= increase["high"]
    bits = [measured[name]["bits_per_byte"]["value"] for name in ("base", "student")]
    assert bits[1] / bits[0] - 1 == pytest.approx(increase["value"])
    plain = trained.read_text()
    trained.write_text(f"{plain}[export]\nmax_forgetting = 0.01\n")
    code, _, err = run_trainer("export", trained, trained.parent / "merged")
    assert code == 1
    assert f"{increase['value']:.1%}" in err
    assert "max_forgetting" in err
    assert not (trained.parent / "merged").exists()
    trained.write_text(f"{plain}[export]\nmax_forgetting = {increase['value'] + 0.01}\n")
    code, out, _ = run_trainer("export", trained, trained.parent / "merged", "--json")
    assert code == 0
    assert json.loads(out)["forgetting"]["increase"] == increase
    code, out, _ = run_trainer("evaluate", trained, "--json")
    assert code == 0
    in_card = json.loads(out)["forgetting"]
    assert in_card["answers"] == 8
    assert in_card["increase"]["value"] == pytest.approx(increase["value"], rel=1e-3)


@pytest.mark.parametrize(
    "line",
    ["{", '{"prompt": "x"}', '{"prompt": "x", "answer": " "}', '{"messages": [3], "answer": "x"}', "[]"],
)
def test_a_line_that_is_no_general_prompt_is_named(trained, line):
    config = general_file(trained, '{"prompt": "a", "answer": "b"}', line)
    with pytest.raises(DataError) as caught:
        forgetting.load(config, Renderer(model.load_tokenizer(config.base)))
    assert caught.value.place.endswith("general.jsonl:2")


def test_a_file_without_prompts_is_refused_with_a_remedy(trained):
    config = general_file(trained, "", " ")
    renderer = Renderer(model.load_tokenizer(config.base))
    with pytest.raises(DataError, match=r"holds no prompt .*general_prompts"):
        forgetting.load(config, renderer)
    (trained.parent / "general.jsonl").unlink()
    with pytest.raises(DataError, match=r"No such file .*general_prompts"):
        forgetting.load(config, renderer)


def test_the_built_in_prompts_can_be_read(learned):
    config, _ = learned
    general = forgetting.load(config, Renderer(model.load_tokenizer(config.base)))
    assert len(general.examples) > 30
    assert min(general.sizes) > 0
