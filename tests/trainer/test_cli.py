"""Test the command line: light help, JSON, one clear line for bad input, the documented exit codes."""

from __future__ import annotations

import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from tests.trainer import tiny
from trainer.cli import main as cli


def run(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    """Run the command line in this process."""
    monkeypatch.setattr("sys.argv", ["trainer", *words])
    code = 0
    try:
        cli.main()
    except SystemExit as ended:
        code = int(ended.code or 0)
    output = capsys.readouterr()
    return code, output.out, output.err


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("cli")
    tiny.train_toml(made, tiny.skill(12, held_out=4), train={"log_every": 1})
    return made


def test_every_command_has_help_with_an_example():
    for command in ("plan", "doctor", "train", "evaluate", "export"):
        shown = CliRunner().invoke(cli.app, [command, "--help"])
        assert shown.exit_code == 0
        assert "Example:" in shown.output
        assert "--json" in shown.output


@pytest.mark.slow
def test_the_walk_from_plan_to_export(folder, monkeypatch, capsys):
    toml = str(folder / "train.toml")
    for words in (
        ("plan", toml),
        ("doctor", toml),
        ("train", toml),
        ("evaluate", toml),
        ("export", toml, str(folder / "merged")),
    ):
        code, out, err = run(monkeypatch, capsys, *words, "--json")
        assert code == 0, err
        assert json.loads(out.strip().splitlines()[-1])
    assert (folder / "out" / "scorecard.json").exists()
    assert (folder / "merged" / "model.safetensors").exists()
    code, out, err = run(monkeypatch, capsys, "doctor", toml)
    assert re.search(r"⟦[a-h](·[a-h]+)*·<\|im_end\|>⟧", out)  # what is supervised
    assert code == 0


def broken(tmp_path, what: str) -> str:
    path = tiny.train_toml(tmp_path, tiny.skill(3))
    if what == "config":
        path.write_text("[student\n")
    elif what == "missing":
        path.unlink()
    elif what == "base":
        shutil.rmtree(tmp_path / "base")
    elif what == "corpus":
        shutil.rmtree(tmp_path / "store")
    elif what == "empty":
        tiny.corpus(tmp_path / "store", [])
    elif what == "remote code":
        config = tmp_path / "base" / "config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "auto_map": {"AutoConfig": "x.Y"}}))
    elif what == "pickle only":
        (tmp_path / "base" / "model.safetensors").rename(tmp_path / "base" / "pytorch_model.bin")
    elif what == "torn weights":
        weights = tmp_path / "base" / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100])
    elif what == "template":
        (tmp_path / "base" / "chat_template.jinja").unlink()
    return str(path)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("config", "not readable as TOML"),
        ("missing", "no such file"),
        ("base", "config.json is missing"),
        ("corpus", "no corpus: no such folder"),
        ("empty", "corpus is empty"),
        ("remote code", "auto_map"),
        ("pickle only", "no *.safetensors"),
        ("torn weights", "can't be loaded"),
        ("template", "no chat template"),
    ],
)
def test_bad_input_is_one_clear_line_and_exit_code_2(tmp_path, monkeypatch, capsys, what, message):
    code, out, err = run(monkeypatch, capsys, "train", broken(tmp_path, what), "--json")
    assert code == 2
    assert out == ""
    assert message in err
    assert "Traceback" not in err
