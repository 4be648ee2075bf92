"""Model folders that hung, took gigabytes or ended in a traceback: each is refused in words."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from harvester.errors import HarvesterError
from tests.trainer import tiny
from trainer.errors import StudentError
from trainer.model import try_in_child, weights
from trainer.model.model import load_tokenizer
from trainer.training import checkpoint


@pytest.fixture(autouse=True)
def _little_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(try_in_child, "TIMEOUT_S", 3.0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(base, tmp_path / "copy"))


def change(path: Path, **values: Any) -> None:
    stored = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**stored, **values}))


BOMBS = {
    "centre": "{{ 'a'|center(5000000000) }}",
    "format": "{{ '%5000000000d'|format(1) }}",
    "sum": "{{ ([1]*400000000)|sum }}",
    "loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "join": "{{ ('x' * 99999999)|list|join }}",
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOMBS)
def test_a_template_bomb_is_refused(kind: str, folder: Path) -> None:
    for path in folder.glob("chat_template*"):
        path.unlink()
    change(folder / "tokenizer_config.json", chat_template=BOMBS[kind])
    with pytest.raises(StudentError, match="the template takes"):
        load_tokenizer(folder)


def test_a_bomb_in_one_of_several_templates_is_refused(folder: Path) -> None:
    named = [{"name": "default", "template": "{{ 1 }}"}, {"name": "b", "template": BOMBS["centre"]}]
    change(folder / "tokenizer_config.json", chat_template=named)
    with pytest.raises(StudentError, match="the template takes"):
        load_tokenizer(folder)


@pytest.mark.parametrize(
    "step",
    [
        {"type": "Replace", "pattern": {"Regex": "^|a|$"}, "content": "a" * 40_000},
        pytest.param({"type": "Prepend", "prepend": "a" * (100 << 20)}, marks=pytest.mark.slow),
    ],
    ids=["replace", "prepend"],
)
def test_a_tokenizer_that_grows_its_text_is_refused(
    step: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(try_in_child, "TIMEOUT_S", 1.5)
    steps = [step] * (1 if step["type"] == "Prepend" else 34)
    if step["type"] == "Replace":
        steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}] * 34
    change(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})
    with pytest.raises(StudentError):
        load_tokenizer(folder)


DEEP = "[" * 100_000
ODD: dict[str, Callable[[Path], object]] = {
    "nested config": lambda folder: (folder / "config.json").write_text(DEEP),
    "nested tokenizer": lambda folder: (folder / "tokenizer_config.json").write_text(DEEP),
    "nested tokenizer.json": lambda folder: (folder / "tokenizer.json").write_text(DEEP),
    "digits": lambda folder: (folder / "config.json").write_text('{"x":' + "9" * 10_000 + "}"),
    "weight map null": lambda folder: change(folder / "model.safetensors.index.json", weight_map=None),
    "weight map list": lambda folder: change(folder / "model.safetensors.index.json", weight_map=["a"]),
    "weight map nested": lambda folder: change(
        folder / "model.safetensors.index.json", weight_map={"a": [1]}
    ),
    "vocabulary text": lambda folder: change(folder / "config.json", vocab_size="many"),
    "tokenizer class": lambda folder: change(folder / "tokenizer_config.json", tokenizer_class=5),
    "model type": lambda folder: change(folder / "config.json", model_type=5),
    "activation": lambda folder: change(folder / "config.json", hidden_act=5),
    "heads": lambda folder: change(folder / "config.json", num_attention_heads=0),
    "layers": lambda folder: change(folder / "config.json", num_hidden_layers=10_000_000),
    "beams": lambda folder: change(folder / "generation_config.json", num_beams=10**9),
    "penalty": lambda folder: change(folder / "generation_config.json", repetition_penalty=0),
}


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_base_is_refused_in_words(kind: str, folder: Path) -> None:
    ODD[kind](folder)
    with pytest.raises(HarvesterError):
        load_tokenizer(folder)


def test_sizes_that_are_left_out_are_no_error(folder: Path) -> None:
    change(
        folder / "config.json", vocab_size=None, num_key_value_heads=None, text_config=5, x_config={"y": 1}
    )
    weights.check_base(folder)
    assert weights.vocabulary_size(folder) == 0


@pytest.mark.parametrize(
    ("pattern", "is_refused"),
    [("(.+)+(.+)+(.+)+(.+)+x", True), ("(", True), ("all-linear", False), (r".*\.(q|k)_proj", False)],
)
def test_a_pattern_of_modules_that_never_ends_is_refused(
    pattern: str, is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(try_in_child, "TIMEOUT_S", 1.5 if is_refused else 20.0)
    change(tmp_path / "adapter_config.json", target_modules=pattern)
    if is_refused:
        with pytest.raises(StudentError):
            try_in_child.require_harmless_targets(tmp_path)
    else:
        try_in_child.require_harmless_targets(tmp_path)


@pytest.mark.parametrize(
    "manifest", ["[]", "5", '{"files": []}', '{"files": 5, "format": 1}', DEEP, "{", "null"]
)
def test_an_odd_newest_checkpoint_falls_back(manifest: str, tmp_path: Path) -> None:
    newest = tmp_path / "step-00000009"
    newest.mkdir()
    (newest / checkpoint.MANIFEST).write_text(manifest)
    found, skipped = checkpoint.newest_valid(tmp_path)
    assert found is None
    assert len(skipped) == 1
    assert checkpoint.adapter_of_step(tmp_path, 9) is None
