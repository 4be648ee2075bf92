"""The hash of a base between processes: remembered while nothing changed, never for documents."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.trainer import tiny
from trainer.model import hash_memory, weights


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base whose hash is remembered although it is small and new."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hash_memory, "MIN_BYTES", 0)
    monkeypatch.setattr(hash_memory, "MIN_AGE_S", -1.0)
    return tiny.base(tmp_path / "base")


@pytest.fixture
def reads(monkeypatch):
    """Names of the files that were opened."""
    names = []
    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: names.append(self.name) or plain(self, *a, **k))
    return names


def in_another_process():
    weights._sha256_of_files.cache_clear()


def test_a_second_process_does_not_read_the_weights_again(base, reads):
    first = weights.base_sha256(base)
    assert reads.count("model.safetensors") == 1
    in_another_process()
    assert weights.base_sha256(base) == first
    assert reads.count("model.safetensors") == 1
    assert weights.content_sha256(base) == first  # documents always read
    assert reads.count("model.safetensors") == 2


def test_other_weights_of_the_same_size_and_modification_time_are_seen(base):
    first = weights.base_sha256(base)
    file = base / "model.safetensors"
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert file.stat().st_mtime_ns == status.st_mtime_ns
    in_another_process()
    assert weights.base_sha256(base) != first


@pytest.mark.parametrize("mode", [0o666, 0o620])
def test_a_memory_that_others_can_write_is_ignored(base, tmp_path, mode):
    first = weights.base_sha256(base)
    memory = tmp_path / "cache" / "trainer" / "base_hashes.json"
    [key] = json.loads(memory.read_text())
    memory.write_text(json.dumps({key: "0" * 64}))
    in_another_process()
    assert weights.base_sha256(base) == "0" * 64  # only the user could have written it
    assert weights.content_sha256(base) == first
    memory.write_text(json.dumps({key: "0" * 64}))
    memory.chmod(mode)
    assert weights.base_sha256(base) == first


@pytest.mark.parametrize(
    ("name", "value"), [("MIN_AGE_S", 3600.0), ("MIN_BYTES", 1 << 28)], ids=["just changed", "small"]
)
def test_what_just_changed_or_is_small_is_not_remembered(base, tmp_path, monkeypatch, name, value):
    monkeypatch.setattr(hash_memory, name, value)
    weights.base_sha256(base)
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("content", ["", "[]", '{"a": 1}'])
def test_a_damaged_memory_is_no_memory(base, tmp_path, content):
    first = weights.base_sha256(base)
    (tmp_path / "cache" / "trainer" / "base_hashes.json").write_text(content)
    in_another_process()
    assert weights.base_sha256(base) == first
