"""Publish to a folder and read back: contents, order, refusals, findings, and what is never touched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import harvester
from harvester.errors import (
    ConfigError,
    FindingsError,
    RemoteStoreError,
    StoreCorrupt,
    StoreFormatError,
    TermsRefused,
    UsageError,
)
from harvester.export.curate import curate, load
from harvester.publish.fetch import fetch
from harvester.publish.store import publish_store
from harvester.store.maintain.purge import purge_store
from harvester.store.mixing import Mixing
from harvester.store.published import local_store
from harvester.store.reader import Corpus
from harvester.store.shards.seal import seal
from harvester.store.view import CorpusView
from harvester.system.objects.publisher import PublishOptions
from tests.commands import run
from tests.harvester.publish.published_store import add_rows, grow, key, make_store, open_run, rows, share


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A store of 20 rows in two shards, one of which answers a second prompt too."""
    folder = make_store(tmp_path / "run" / "store", range(20), shards=2, config_json='{"run": {"epoch": 3}}')
    share(folder, 4, "second")
    return folder


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """The folder that is published to."""
    return tmp_path / "remote" / "x"


def names_in(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def manifest_of(there: Path) -> dict[str, object]:
    return dict(json.loads((there / "publication.json").read_text()))


def shard_of(there: Path) -> Path:
    return min((there / "shards").iterdir())


def test_what_was_published_is_read_as_the_store_itself(store: Path, there: Path) -> None:
    url = f"file://{there}"
    published, snapshot = publish_store(store, url)
    assert (published.is_new, snapshot.rows, published.uploaded) == (True, 20, len(names_in(there)) - 1)
    copy = local_store(url)
    assert rows(copy) == rows(store)
    assert len(rows(copy)) == 21  # the second prompt that shares an answer came along
    assert Corpus.open(copy).lineages() == Corpus.open(store).lineages()
    assert Mixing(copy).counts == Mixing(store).counts
    views = [view_facts(folder) for folder in (store, copy)]
    assert views[0] == views[1]  # the token store of a trainer knows it by these
    chosen = harvester.open(url, columns=["prompt_id"], where={"epoch": 3})
    assert len(list(chosen)) == 21
    papers = ("papers/README.md", "papers/NOTICE", "papers/terms.json", "report.html")
    assert all((copy / name).stat().st_size for name in papers)
    assert "mock-teacher" in (copy / "papers" / "terms.json").read_text()


def view_facts(store: Path) -> tuple[object, ...]:
    with Corpus.open(store).view(["key"]) as view:
        assert isinstance(view, CorpusView)
        return view.manifest, view.tail_sha256, view.unsealed_rows


def test_a_second_publication_uploads_nothing_and_a_third_only_what_is_new(store: Path, there: Path) -> None:
    url = f"file://{there}"
    publish_store(store, url)
    before = {name: (there / name).stat().st_mtime_ns for name in names_in(there)}
    again, _ = publish_store(store, url)
    assert (again.uploaded, again.is_new) == (0, False)
    assert {name: (there / name).stat().st_mtime_ns for name in names_in(there)} == before
    first = local_store(url)
    grow(store, range(20, 25))
    third, snapshot = publish_store(store, url)
    assert third.is_new
    assert snapshot.rows == 25
    shards = [name for name in names_in(there) - set(before) if name.startswith("shards/")]
    assert len(shards) == 1
    assert all((there / name).stat().st_mtime_ns == time for name, time in before.items() if "/" in name)
    second = local_store(url)
    assert first != second  # who reads the first goes on with it
    assert len(rows(first)) == 21
    assert len(rows(second)) == 26


def test_unsealed_answers_stay_and_are_counted(store: Path, there: Path) -> None:
    with open_run(store, run_id="run-3") as journal:
        add_rows(journal, range(30, 31), "run-3")
    _, snapshot = publish_store(store, f"file://{there}")
    assert (snapshot.rows, snapshot.unsealed) == (20, 1)
    assert key(30).hex() not in {row.key for row in rows(local_store(f"file://{there}"))}


def test_a_changed_and_a_missing_object_are_named_and_repaired_only_on_request(
    store: Path, there: Path
) -> None:
    url = f"file://{there}"
    publish_store(store, url)
    shards = sorted((there / "shards").iterdir())
    good = shards[0].read_bytes()
    shards[0].write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    shards[1].unlink()
    stranger = there / "shards" / "part-of-somebody-else.parquet"
    stranger.write_bytes(b"mine")
    manifest = (there / "publication.json").read_bytes()
    with pytest.raises(FindingsError) as raised:
        publish_store(store, url)
    assert f"{shards[0].name} has changed" in raised.value.message
    assert f"{shards[1].name} is missing" in raised.value.message
    assert (there / "publication.json").read_bytes() == manifest
    assert shards[0].read_bytes() != good
    repaired, _ = publish_store(store, url, PublishOptions(repair=True))
    assert repaired.uploaded >= 2
    assert shards[0].read_bytes() == good
    assert rows(local_store(url)) == rows(store)
    assert stranger.read_bytes() == b"mine"


def test_a_change_that_keeps_size_and_time_is_found_by_verify(store: Path, there: Path) -> None:
    import os

    url = f"file://{there}"
    publish_store(store, url)
    shard = shard_of(there)
    facts, good = shard.stat(), shard.read_bytes()
    shard.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    os.utime(shard, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    publish_store(store, url)
    with pytest.raises(FindingsError, match="has changed"):
        publish_store(store, url, PublishOptions(verify=True))


def test_readers_refuse_damage_and_say_what_is_wrong(store: Path, there: Path, tmp_path: Path) -> None:
    url = f"file://{there}"
    with pytest.raises(RemoteStoreError, match="nothing was published"):
        local_store(url)
    publish_store(store, url)
    shard = shard_of(there)
    good = shard.read_bytes()
    shard.write_bytes(good[: len(good) // 2])
    with pytest.raises(StoreCorrupt, match="not what was published"):
        local_store(url)
    shard.unlink()
    with pytest.raises(RemoteStoreError, match=f"torn.*{shard.name}"):
        local_store(url)
    shard.write_bytes(good)
    manifest = there / "publication.json"
    text = manifest.read_text()
    for broken, error in (
        ("{", StoreCorrupt),
        ("[]", StoreCorrupt),
        (text.replace('"rows": 10', '"rows": 11', 1), StoreCorrupt),
        (twice(text, "shards"), StoreCorrupt),
        (twice(text, "files"), StoreCorrupt),
        (twice(text, "runs"), StoreCorrupt),
        (text.replace('"format": 1', '"format": 2'), StoreFormatError),
        (text.replace('"path": "shards/', '"path": "../'), StoreCorrupt),
        (text.replace('"size_bytes": ', '"size_bytes": -'), StoreCorrupt),
    ):
        manifest.write_text(broken)
        with pytest.raises(error):
            local_store(url)
    manifest.write_text(text)
    assert rows(local_store(url)) == rows(store)
    with pytest.raises(ConfigError, match="already"):
        fetch(url, tmp_path)
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]


def twice(manifest: str, member: str) -> str:
    """Return a manifest with each entry of a member twice."""
    data = json.loads(manifest)
    data[member] *= 2
    return json.dumps(data)


def test_fetch_and_export_name_a_damaged_manifest(store: Path, there: Path, tmp_path: Path) -> None:
    url = f"file://{there}"
    publish_store(store, url)
    manifest = there / "publication.json"
    manifest.write_text(twice(manifest.read_text(), "shards"))
    for command in (["fetch", url, tmp_path / "copy"], ["export", url, tmp_path / "out"]):
        done = run("harvester", command)
        assert (done.returncode, "error[store_corrupt]" in done.stderr) == (5, True), done.stderr
        assert "twice" in done.stderr


@pytest.mark.parametrize("damaged", ["{", "{}", "[]", "null", '{"format": null}'])
def test_a_damaged_manifest_is_written_anew_on_request_only(store: Path, there: Path, damaged: str) -> None:
    url = f"file://{there}"
    publish_store(store, url)
    (there / "publication.json").write_text(damaged)
    with pytest.raises(StoreCorrupt):
        publish_store(store, url)
    publish_store(store, url, PublishOptions(repair=True))
    assert rows(local_store(url)) == rows(store)


def test_terms_of_a_run_without_a_row_in_a_shard_forbid_nothing(store: Path, there: Path) -> None:
    with open_run(store, run_id="run-7", terms_id="no-such-record") as journal:
        add_rows(journal, range(60, 61), "run-7")
    _, snapshot = publish_store(store, f"file://{there}")
    assert (snapshot.rows, snapshot.unsealed) == (20, 1)
    with open_run(store, run_id="run-8", terms_id="no-such-record") as journal:
        seal(journal, store, target_bytes=1 << 30, everything=True)
    with pytest.raises(TermsRefused):
        publish_store(store, f"file://{there}")


def test_a_damaged_cache_is_mended(store: Path, there: Path) -> None:
    url = f"file://{there}"
    publish_store(store, url)
    copy = local_store(url)
    shard = min((copy / "shards").iterdir())
    good = shard.read_bytes()
    shard.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    assert rows(local_store(url)) == rows(store)
    min((copy / "shards").iterdir()).unlink()
    assert rows(local_store(url)) == rows(store)


@pytest.mark.parametrize("damage", ["one bit", "cut", "gone", "empty"])
def test_a_damaged_journal_of_the_cache_is_made_again(store: Path, there: Path, damage: str) -> None:
    """It holds the manifest and the key index; readers reported a damaged store that nobody can repair."""
    url = f"file://{there}"
    publish_store(store, url)
    journal = local_store(url) / "journal.db"
    good = journal.read_bytes()
    middle = len(good) // 2
    damaged = {"one bit": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :], "cut": good[:5000]}
    journal.unlink()
    if damage != "gone":
        journal.write_bytes(damaged.get(damage, b""))
    assert rows(local_store(url)) == rows(store)
    assert local_store(url) / "journal.db" == journal
    assert run("harvester", ["export", url, there.parent / "out"]).returncode == 0
    assert len(list(journal.parent.parent.iterdir())) == 2  # nothing of the damaged one is left


def test_a_damaged_object_of_the_cache_is_downloaded_again(store: Path, there: Path, tmp_path: Path) -> None:
    url = f"file://{there}"
    publish_store(store, url)
    copy = local_store(url)
    for path in (tmp_path / "cache" / "harvester" / "objects").rglob("*"):
        if path.is_file() and path.stat().st_nlink == 1:  # asks; shards are linked into the copy
            path.write_bytes(bytes(path.stat().st_size))
    shutil.rmtree(copy)
    assert rows(local_store(url)) == rows(store)


def test_a_store_without_a_shard_is_not_published_as_an_empty_one(tmp_path: Path, there: Path) -> None:
    folder = tmp_path / "s"
    with open_run(folder, run_id="run-3") as journal:
        add_rows(journal, range(3), "run-3")
    done = run("harvester", ["publish", folder, f"file://{there}"])
    assert done.returncode == 2
    assert "3 answers only in the journal" in done.stderr
    assert f"harvester seal {folder}" in done.stderr
    assert not there.exists()


def test_another_store_is_not_replaced(store: Path, there: Path, tmp_path: Path) -> None:
    url = f"file://{there}"
    publish_store(store, url)
    other = make_store(tmp_path / "other" / "store", range(50, 52), run_id="run-9")
    with pytest.raises(ConfigError, match="another store"):
        publish_store(other, url)
    assert len(rows(local_store(url))) == 21
    publish_store(other, url, PublishOptions(replace=True))
    assert len(rows(local_store(url))) == 2


@pytest.mark.parametrize(
    ("module", "point"),
    [("publisher", "before_manifest"), ("transfer", "amid_upload"), ("transfer", "after_upload")],
)
def test_a_store_published_there_at_the_same_time_is_not_replaced(
    store: Path, there: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str, point: str
) -> None:
    """Let another store appear before the last look, before the manifest's rename, and after it."""
    url, elsewhere = f"file://{there}", tmp_path / "elsewhere"
    other = make_store(tmp_path / "other" / "store", range(50, 52), run_id="run-9")
    publish_store(other, f"file://{elsewhere}")
    appeared = []

    def appear(reached: str) -> None:
        is_manifest = module == "publisher" or any(there.glob("*publication.json*"))
        if not appeared and is_manifest and reached == f"publish.{point}":
            appeared.append(reached)
            shutil.copytree(elsewhere, there, dirs_exist_ok=True)

    monkeypatch.setattr(f"harvester.system.objects.{module}.reach", appear)
    with pytest.raises(ConfigError, match="another store"):
        publish_store(store, url)
    assert appeared == [f"publish.{point}"]
    assert len(rows(local_store(url))) == 2
    assert not [name for name in names_in(there) if name.endswith(".tmp")]
    publish_store(store, url, PublishOptions(replace=True))
    assert rows(local_store(url)) == rows(store)


def test_a_place_where_no_folder_can_be_made_is_named(store: Path) -> None:
    with pytest.raises(RemoteStoreError, match="can't be written"):
        publish_store(store, "file:///proc/x")


def test_superseded_objects_are_deleted_only_on_request_and_only_own_ones(store: Path, there: Path) -> None:
    url = f"file://{there}"
    publish_store(store, url)
    stranger = there / "shards" / "stranger"
    stranger.write_bytes(b"mine")
    purge_store(store, key(3).hex(), None)
    published, _ = publish_store(store, url)
    old = [name for name in published.superseded if name.startswith("shards/")]
    assert len(old) == 1
    assert (there / old[0]).exists()
    pruned, _ = publish_store(store, url, PublishOptions(prune=True))
    assert pruned.deleted == len(published.superseded)
    assert names_in(there) == {
        "publication.json",
        "shards/stranger",
        *(each["name"] for each in [*manifest_of(there)["shards"], *manifest_of(there)["files"]]),  # type: ignore[misc]
        manifest_of(there)["asks"]["name"],  # type: ignore[index]
    }
    assert key(3).hex() not in {row.key for row in rows(local_store(url))}


def test_a_curated_corpus_is_published_too(store: Path, there: Path, tmp_path: Path) -> None:
    toml = tmp_path / "curate.toml"
    publish_store(store, f"file://{there}/store")
    toml.write_text(f'corpus = "file://{there}/store"\nout = "curated"\nfilters = [{{longest = 1}}]\n')
    counts = curate(load(toml))
    assert 0 < counts.kept < 21
    url = f"file://{there}/curated"
    _, snapshot = publish_store(tmp_path / "curated", url)
    assert snapshot.kind == "corpus"
    copy = local_store(url)
    assert rows(copy) == rows(tmp_path / "curated")
    assert (copy / "curation.json").read_bytes() == (tmp_path / "curated" / "curation.json").read_bytes()
    again, _ = publish_store(tmp_path / "curated", url)
    assert (again.uploaded, again.is_new) == (0, False)
    with pytest.raises(ConfigError, match="holds the corpus"):
        publish_store(store, url)


def test_the_terms_decide(tmp_path: Path, there: Path) -> None:
    url = f"file://{there}"
    unknown = make_store(tmp_path / "a" / "store", range(2), terms_id="no-such-record")
    with pytest.raises(TermsRefused):
        publish_store(unknown, url)
    assert not there.exists()
    evaluation = make_store(tmp_path / "b" / "store", range(2), purpose="eval")
    publish_store(evaluation, url)  # in storage of one's own
    assert {row.purpose for row in rows(local_store(url))} == {"eval"}


def test_a_store_is_not_published_into_itself(store: Path) -> None:
    for folder in (store, store / "shards", store.parent):
        with pytest.raises(ConfigError, match="lies in the store"):
            publish_store(store, f"file://{folder}")
    with pytest.raises(UsageError):
        publish_store(store, "https://example.org/x")


def test_no_machine_secret_is_published(tmp_path: Path, there: Path) -> None:
    prompts, teacher = {"files": ["/home/me/x.jsonl"]}, {"api_key_env": "MY_KEY"}
    config = {"run": {"epoch": 1}, "prompts": prompts, "teacher": teacher}
    store = make_store(tmp_path / "run" / "store", range(2), config_json=json.dumps(config))
    publish_store(store, f"file://{there}")
    text = (there / "publication.json").read_text()
    assert "MY_KEY" not in text
    assert "/home/me" not in text
    assert str(tmp_path) not in text


def test_a_report_of_a_published_store_is_written_here(store: Path, there: Path, tmp_path: Path) -> None:
    url = f"file://{there}"
    publish_store(store, url)
    done = run("harvester", ["report", url, "--json"], cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").stat().st_size
    report = local_store(url) / "report.html"
    assert report.read_bytes() == next((there / "papers").glob("*-report.html")).read_bytes()
    done = run("harvester", ["seal", url])
    assert done.returncode == 2
    assert "harvester fetch" in done.stderr


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["export", "file://tmp/x", "out"], "file:///tmp/x"),
        (["report", "ftp://x/y"], "is no URL of object storage"),
        (["merge", "file:///tmp/x", "s3://bucket/y", "out"], "this needs a store on this machine"),
    ],
)
def test_a_command_says_what_is_wrong_with_a_url(command: list[str], shown: str, tmp_path: Path) -> None:
    done = run("harvester", command, cwd=tmp_path)
    assert done.returncode == 2
    assert shown in done.stderr
    assert not list(tmp_path.iterdir())


def test_fetch_gives_a_store_of_ones_own(store: Path, there: Path, tmp_path: Path) -> None:
    url = f"file://{there}"
    publish_store(store, url)
    fetch(url, tmp_path / "copy")
    assert rows(tmp_path / "copy") == rows(store)
    shard = min((tmp_path / "copy" / "shards").iterdir())
    assert shard.stat().st_nlink == 1  # not the cache's own file
