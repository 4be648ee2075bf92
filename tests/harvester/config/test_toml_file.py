"""Errors in TOML files name the line, the key and what is wrong, in plain words."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from harvester.config import config
from harvester.errors import ConfigError
from harvester.system.toml_file import line_of

FILE = '''\
# a comment with teacher.model = "no"
[teacher]
base_url = "http://127.0.0.1:8000/v1"
model = "m"
replicas = [
    "http://127.0.0.1:8001/v1",  # [sampling]
    "http://127.0.0.1:8002/v1",
]

[teacher.limits]
max_concurrency = 4

[prompts]
files = ["a.jsonl"]
[sampling]
system = """
temperature = 3
"""
"temperature" = 0.5
extra = {seed = 1, stop = ["a"]}
run.x = 1
[[filters]]
name = "a"
[[filters]]
name = "b"
'''


@pytest.mark.parametrize(
    ("location", "line"),
    [
        (("teacher",), 2),
        (("teacher", "model"), 4),
        (("teacher", "replicas"), 5),
        (("teacher", "replicas", 1), 7),
        (("teacher", "limits", "max_concurrency"), 11),
        (("teacher", "limits", "absent"), 10),
        (("sampling", "temperature"), 19),
        (("sampling", "extra", "stop", 0), 20),
        (("sampling", "run", "x"), 21),
        (("filters", 1, "name"), 25),
        (("filters", 7), 22),
        (("absent",), None),
        ((), None),
    ],
)
def test_the_line_of_a_key_is_found(location: tuple[str | int, ...], line: int | None):
    tomllib.loads(FILE)
    assert line_of(FILE, location) == line


VALUES = st.sampled_from(["1", '"text"', "[\n1,\n2\n]", '"""\nk0 = 1\n"""', "{a = 1}", "true", "1979-05-27"])


@given(st.lists(st.tuples(VALUES, st.sampled_from(["", "\n", "# k1 = 2\n"])), min_size=1, max_size=6))
def test_every_key_of_a_table_is_found_at_the_line_that_begins_with_it(entries: list[tuple[str, str]]):
    lines: dict[str, int] = {}
    text = "[table]\n"
    for number, (value, before) in enumerate(entries):
        text += before
        lines[f"k{number}"] = text.count("\n") + 1
        text += f"k{number} = {value}\n"
    assert {key: line_of(text, ("table", key)) for key in lines} == lines


@pytest.mark.parametrize(
    ("line", "problem", "number"),
    [
        ("temperature = -1", "sampling.temperature: must be at least 0", 7),
        ('temperature = "hot"', "sampling.temperature: must be a number", 7),
        ("samples = 1.5", "sampling.samples: must be a whole number", 7),
        ("top_p = nan", "sampling.top_p: must be", 7),
        ("temprature = 1", "unknown key 'sampling.temprature'", 7),
        ('[run]\npurpose = "fun"', "run.purpose: must be 'train' or 'eval'", 8),
        ('[schedule]\nhours = ["25:00-26:00"]', "schedule.hours", 8),
    ],
)
def test_a_bad_value_is_named_with_its_line(tmp_path: Path, line: str, problem: str, number: int):
    path = tmp_path / "harvest.toml"
    path.write_text(
        '[teacher]\nbase_url = "http://127.0.0.1:1/v1"\nmodel = "m"\n[prompts]\nfiles = ["a.jsonl"]\n'
        f"[sampling]\n{line}\n"
    )
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert problem in caught.value.message
    assert "Input should" not in caught.value.message
    assert "Value error" not in caught.value.message
    assert caught.value.place == f"{path}:{number}"
