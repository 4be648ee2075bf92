"""Test which values of train.toml are refused, and with which message."""

from __future__ import annotations

from pathlib import Path

import pytest

from harvester.errors import UsageError
from trainer.config import load
from trainer.errors import ConfigError
from trainer.starter import write_starter

LEAST = '[student]\nbase = "b"\n[data]\ncorpus = "c"\n'


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "train.toml"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_least_file_is_enough_and_paths_start_beside_it(tmp_path):
    config = load(written(tmp_path, LEAST))
    assert config.base == (tmp_path / "b").resolve()
    assert config.corpus == (tmp_path / "c").resolve()
    assert config.out_path == (tmp_path / "out").resolve()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (LEAST + "[lora]\nrnak = 8\n", "did you mean 'rank'"),
        (LEAST + "[trian]\nlr = 1\n", "did you mean 'train'"),
        (LEAST + "[train]\nlr = 0\n", "train.lr"),
        (LEAST + "[train]\nmax_length = 100\nbatch_tokens = 50\n", "doesn't fit a pack"),
        (LEAST + "[train]\nlr = true\n", "train.lr: must be a number"),
        (LEAST + f"[train]\nepochs = {10**23}\n", "train.epochs: must be at most 10000"),
        (LEAST.replace('"b"', '"a\\u0000b"'), "student.base: must not hold a null character"),
        (LEAST + '[train]\nepochs = "3"\n', "train.epochs: must be a number, without quotes"),
        (LEAST + "root = 1\n", "unknown key"),
        (LEAST + '[evaluate]\nevery = "0%"\n', 'a whole number, or a share of all steps from "1%" to "100%"'),
        (LEAST.replace('"b"', '"b"\nsha256 = "x"'), "student.sha256: must be 64 hexadecimal digits"),
        ("[student]\n", "student.base"),
        ("[student\n", "not readable as TOML"),
        (LEAST + "[data]\n", "Cannot declare"),
        (LEAST.replace('"c"', '"ftp://x/y"'), "data.corpus: is no URL of object storage"),
        (LEAST.replace('"c"', '"s3://"'), "data.corpus: is no URL of object storage"),
        (LEAST.replace('"c"', '"file://tmp/x"'), "file:///tmp/x"),
    ],
)
def test_a_wrong_file_is_refused_with_the_remedy(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message.replace("[", r"\[")) as caught:
        load(written(tmp_path, text))
    assert "train.toml" in caught.value.place


def test_a_table_that_stands_twice_is_named(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, LEAST + "[train.x]\n[train.x]\n"))
    assert caught.value.remedy.startswith("[train.x] stands in the file before this line")
    assert caught.value.place.endswith("train.toml:6")


def test_a_url_of_a_corpus_stays_one_in_a_new_train_toml(tmp_path):
    for number, corpus in enumerate(("file:///tmp/x", "s3://bucket/x?region=y", Path("s3://bucket/x"))):
        write_starter(tmp_path / str(number), corpus=corpus)
        kept = load(tmp_path / str(number) / "train.toml").data.corpus
        assert kept == str(corpus).replace(":/b", "://b")
    with pytest.raises(UsageError):
        write_starter(tmp_path / "other", corpus="ftp://x/y")


def test_a_fault_of_several_keys_is_shown_at_the_first_of_them(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load(written(tmp_path, LEAST + "[train]\nbatch_tokens = 50\nmax_length = 100\n"))
    assert caught.value.message.startswith("[train] max_length 100 doesn't fit a pack")
    assert caught.value.place.endswith("train.toml:7")


@pytest.mark.parametrize("out", ["b", "c", "c/student", "./c/../b/x"])
def test_an_output_folder_in_the_base_or_the_corpus_is_refused(tmp_path, out):
    with pytest.raises(
        ConfigError, match=r"out.path: .* would write into the (untouched base|corpus)"
    ) as caught:
        load(written(tmp_path, LEAST + f'[out]\npath = "{out}"\n'))
    assert caught.value.place.endswith("train.toml:6")
    assert caught.value.remedy == "set [out] path to a folder of its own"


def test_a_file_is_no_output_folder(tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ConfigError, match="is not a folder"):
        load(written(tmp_path, LEAST))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such file"):
        load(tmp_path / "absent.toml")


def test_values_are_fixed_once_read(tmp_path):
    config = load(written(tmp_path, LEAST))
    with pytest.raises(ValueError, match="frozen"):
        config.train.lr = 1.0


def test_a_key_that_no_file_may_set_is_not_named_as_known(tmp_path: Path) -> None:
    path = tmp_path / "train.toml"
    path.write_text('root = "x"\n')
    with pytest.raises(ConfigError, match="unknown key 'root'") as caught:
        load(path)
    assert "root" not in caught.value.remedy
