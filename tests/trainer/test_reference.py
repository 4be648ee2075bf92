"""`trainer init`, `trainer config schema` and CONFIG.md name every key of their files."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import jsonschema
import pytest
from pydantic import BaseModel

import harvester
from harvester.export.filters import FILTER_NAMES
from harvester.system.command_line.remedies import remedy_of
from tests.trainer import tiny
from tests.trainer.command_line import run_trainer  # noqa: F401 - a fixture
from trainer import config as settings
from trainer import reference
from trainer.distil.config import DistilConfig
from trainer.experiments.curve_config import CurveConfig
from trainer.experiments.loop_config import LoopConfig
from trainer.onpolicy.config import OnPolicyConfig

CONFIG_MD = (Path(reference.__file__).parent / "CONFIG.md").read_text(encoding="utf-8")
CURATE_MD = (Path(harvester.__file__).parent / "CONFIG.md").read_text(encoding="utf-8")


def rows(section: type[BaseModel]) -> list[str]:
    """The rows of a section's table in CONFIG.md, from the class that reads it."""
    texts = reference.descriptions(section)
    lines = []
    for key, field in section.model_fields.items():
        if field.is_required():
            default = "required"
        else:
            default = "–" if field.default is None else f"`{json.dumps(field.default)}`"
        lines.append(f"| `{key}` | {default} | {texts[key].replace('|', '/')} |")
    return lines


@pytest.mark.parametrize("name", sorted(reference.sections()))
def test_every_key_of_train_toml_is_in_the_documents(name):
    section = CONFIG_MD.partition(f"### `[{name}]`")[2].partition("\n##")[0]
    assert [line for line in section.splitlines() if line.startswith("| `")] == rows(
        reference.sections()[name]
    )


def test_every_key_of_curve_toml_is_in_the_documents():
    section = CONFIG_MD.partition("## curve.toml")[2].partition("\n**Subsets.**")[0]
    assert [line for line in section.splitlines() if line.startswith("| `")] == rows(CurveConfig)


def test_every_key_of_distil_toml_is_in_the_documents():
    section = CONFIG_MD.partition("## distil.toml")[2].partition("\n**Done once.**")[0]
    assert [line for line in section.splitlines() if line.startswith("| `")] == rows(DistilConfig)


def test_every_key_of_loop_toml_is_in_the_documents():
    section = CONFIG_MD.partition("## loop.toml")[2].partition("\n**Pool.**")[0]
    assert [line for line in section.splitlines() if line.startswith("| `")] == rows(LoopConfig)


def test_every_key_of_onpolicy_toml_is_in_the_documents():
    section = CONFIG_MD.partition("## onpolicy.toml")[2].partition("\n**Loss.**")[0]
    assert [line for line in section.splitlines() if line.startswith("| `")] == rows(OnPolicyConfig)


def test_every_key_of_curate_toml_is_in_the_documents():
    part = CURATE_MD.partition("## curate.toml")[2]
    first_cells = " ".join(line.split("|")[1] for line in part.splitlines() if line.startswith("| `"))
    for key in ("corpus", "out", "filters", *FILTER_NAMES):
        assert f"`{key}`" in first_cells


def test_the_schema_accepts_what_the_trainer_accepts_and_describes_every_key(run_trainer):  # noqa: F811
    code, out, _ = run_trainer("config", "schema")
    assert code == 0
    schema = json.loads(out)
    validator = jsonschema.Draft202012Validator(schema)
    validator.check_schema(schema)
    good = {"student": {"base": "b"}, "data": {"corpus": "c"}, "evaluate": {"every": "10%"}}
    settings.parse(good, root=Path(), place="train.toml")
    assert validator.is_valid(good)
    for bad in ({"student": {"base": "b"}}, {**good, "trian": {}}, {**good, "evaluate": {"every": "0%"}}):
        assert not validator.is_valid(bad)
        with pytest.raises(settings.ConfigError):
            settings.parse(bad, root=Path(), place="train.toml")
    for section in reference.sections().values():
        for key, value in schema["$defs"][section.__name__]["properties"].items():
            assert value["description"], key


@pytest.mark.slow
def test_the_starter_is_a_train_toml_that_plans(run_trainer, tmp_path):  # noqa: F811
    tiny.base(tmp_path / "models" / "base")
    tiny.corpus(tmp_path / "store", tiny.skill(20, held_out=2))
    folder = tmp_path / "a student"
    code, out, _ = run_trainer(
        *("init", folder, "--base", tmp_path / "models" / "base", "--corpus", tmp_path / "store")
    )
    assert code == 0
    assert "trainer plan" in out
    values = tomllib.loads((folder / "train.toml").read_text())
    assert values["student"]["base"] == "../models/base"  # the folder can be moved as a whole
    code, out, _ = run_trainer("plan", folder / "train.toml", "--probe", 0)
    assert code == 0
    assert "hint: only 3 optimiser steps" in out
    assert "batch_tokens = " in out
    code, _, err = run_trainer("init", folder)
    assert code == 2
    assert "exists already" in err
    code, _, err = run_trainer("init", tmp_path / "early", "--base", tmp_path / "not-loaded-yet")
    assert (code, "not-loaded-yet does not exist yet" in err) == (0, True)


def test_an_error_without_a_remedy_of_its_own_says_what_helps_in_general(run_trainer, tmp_path):  # noqa: F811
    path = tmp_path / "train.toml"
    path.write_text('[student]\nbase = "b"\n[data]\ncorpus = "c"\neval_share = "x"\n')
    code, _, err = run_trainer("plan", path)
    cause, place, remedy = err.splitlines()
    assert (code, cause) == (2, "error[config]: data.eval_share: must be a number")
    assert place.endswith("train.toml:5")
    assert remedy == f"  remedy  {remedy_of('config')}"
