"""Check the table of servers: what stands against one is found, and nothing else is."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from safetensors.torch import load_file, save_file

from trainer.data.chat_template import Renderer
from trainer.model import model
from trainer.publish import server_checks
from trainer.publish.export import export_merged
from trainer.publish.server_checks import adapter_obstacles, check_servers, table


@pytest.fixture(scope="module")
def merged(learned, tmp_path_factory):
    config, _ = learned
    folder = tmp_path_factory.mktemp("checks") / "merged"
    export_merged(config, folder)
    return folder


def checked(learned, folder):
    """Return by name of the check what stands against each server."""
    config, _ = learned
    renderer = Renderer(model.load_tokenizer(config.base))
    checks = check_servers(config, renderer, config.out_path / "adapter", folder)
    faults = {
        check.name: {server: word for server, word in check.servers.items() if word != "ok"}
        for check in checks
    }
    return {name: found for name, found in faults.items() if found}, checks


USUAL = {name: {"MLX": "has adapters of another format"} for name in ("rank", "target modules", "method")}


def test_a_plain_student_fits_all_servers(learned, merged):
    faults, checks = checked(learned, merged)
    assert faults == USUAL
    assert [asdict(check) for check in checks] == json.loads((merged / "export.json").read_text())["checks"]
    lines = table([asdict(check) for check in checks])
    assert max(map(len, lines)) <= 80
    names = [line.split(":")[0] for line in lines[1 : len(checks) + 1]]
    assert names == [check.name for check in checks]
    assert "MLX: has adapters of another format (rank, target modules, method)" in lines


def rewritten(name, **changes):
    def change(folder):
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def renamed(folder):
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    names = load_file(folder / "weights.safetensors")
    index = {"weight_map": dict.fromkeys(names, "weights.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shortened(folder):
    stored = load_file(folder / "model.safetensors")
    stored["model.embed_tokens.weight"] = stored["model.embed_tokens.weight"][:-3].contiguous()
    save_file(stored, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "name", "word"),
    [
        (rewritten("config.json", dtype="bfloat16"), "dtype", "reads bfloat16"),
        (rewritten("config.json", vocab_size=100), "vocabulary size", "embedding has"),
        (shortened, "vocabulary size", "embedding has"),
        (rewritten("generation_config.json", eos_token_id=1), "generation_config", "lacks the end of turn"),
        (renamed, "weight files", "does not read weights.safetensors"),
    ],
)
def test_a_folder_that_a_server_would_serve_otherwise_is_found(learned, merged, tmp_path, damage, name, word):
    folder = tmp_path / "merged"
    folder.mkdir()
    for file in merged.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    damage(folder)
    faults, _ = checked(learned, folder)
    assert {server for server, fault in faults[name].items() if word in fault} >= {"MLX"}
    assert {key: value for key, value in faults.items() if key != name} == {
        key: value for key, value in USUAL.items() if key != name
    }


@pytest.mark.parametrize(
    ("settings", "servers"),
    [
        ({"r": 8, "target_modules": ["q_proj"]}, {}),
        ({"r": 513}, {"vLLM": "supports ranks up to 512"}),
        ({"r": 8, "target_modules": ["q_proj", "model.lm_head"]}, {"vLLM": "adapters on model.lm_head"}),
        ({"r": 8, "use_dora": True}, dict.fromkeys(("vLLM", "SGLang"), "DoRA")),
        (
            {"r": 8, "use_rslora": True, "trainable_token_indices": [1]},
            dict.fromkeys(("vLLM", "SGLang"), "rows of tokens"),
        ),
        ({"r": 8, "use_rslora": True}, {"SGLang": "scales rsLoRA as LoRA"}),
    ],
)
def test_what_stands_against_an_adapter(settings, servers):
    found = {server: word for server, word in adapter_obstacles(settings).items() if server != "MLX"}
    assert found.keys() == servers.keys()
    assert all(servers[server] in word for server, word in found.items())


def test_every_server_of_the_table_is_one_of_those_that_are_checked(learned, merged):
    _, checks = checked(learned, merged)
    assert {server for check in checks for server in check.servers} == set(server_checks.ALL)
