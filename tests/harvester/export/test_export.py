"""Test export and curation: formats that other trainers read, documents, and reasons for dropped rows."""

from __future__ import annotations

import hashlib
import json
import resource
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from harvester.errors import ConfigError, StoreError, TermsRefused
from harvester.export import curate, export, split_files
from harvester.store.journal.journal import Journal
from harvester.store.reader import Corpus
from harvester.store.shards.schema import LINEAGE_KEY, SCHEMA, Sample, to_table
from harvester.store.shards.seal import seal
from tests.harvester.export.test_cards import CROISSANT
from tests.harvester.store_rows import answer, intent, open_store, raw_of, run_record

LINEAGE = {
    "run_id": "run-1",
    "teacher_id": "http://127.0.0.1:1/v1|mock-teacher",
    "host": "127.0.0.1:1",
    "model": "mock-teacher",
    "terms_id": "mock-teacher",
    "permission_sha256": "",
    "purpose": "train",
    "mock": True,
    "duties": [],
    "config_sha256": "c" * 64,
    "tool_version": "0.1.0",
}


def sample(number: int, **changes: object) -> Sample:
    facts = {
        "key": f"{number:064x}",
        "prompt_id": f"p{number}",
        "messages": [{"role": "user", "content": f"{number}?"}],
        "completion": f"answer {number}",
        "outcome": "ok",
        "finish_reason": "stop",
        "run_id": "run-1",
        "metadata_json": json.dumps({"split": "train" if number % 2 else "held_out"}),
        "mock": True,
        "terms_id": "mock-teacher",
        "teacher_id": LINEAGE["teacher_id"],
    }
    return Sample(**{**facts, **changes})  # type: ignore[arg-type]


def store_of(root: Path, rows: list[Sample]) -> Path:
    folder = root / "store" / "shards"
    folder.mkdir(parents=True)
    metadata = {**SCHEMA.metadata, LINEAGE_KEY: json.dumps([LINEAGE]).encode()}
    pq.write_table(to_table(rows).replace_schema_metadata(metadata), folder / "part-000001-aa.parquet")
    return folder.parent


@pytest.fixture
def store(tmp_path: Path) -> Path:
    rows = [
        *(sample(n) for n in range(8)),
        sample(8, reasoning="first this", completion="then that"),
        sample(9, outcome="truncated"),
        sample(10, completion=None, outcome="empty"),
        sample(11, completion="answer 3", messages=[{"role": "user", "content": "3?"}]),
    ]
    return store_of(tmp_path, rows)


def test_prompt_completion_is_the_default_and_says_what_was_left_out(store: Path, tmp_path: Path):
    done = export.export(store, tmp_path / "out")
    assert (done.rows, done.left_out) == (10, {"outcome_truncated": 1, "outcome_empty": 1})
    assert done.splits == {"train": 5, "test": 5}  # the odd ones, and those marked held_out
    rows = rows_of(tmp_path / "out", "test")
    assert rows[0]["prompt"] == [{"role": "user", "content": "0?"}]
    assert rows[0]["completion"][0]["content"] == "answer 0"
    assert rows[4]["completion"][0]["reasoning_content"] == "first this"
    assert [row["prompt_id"] for row in rows_of(tmp_path / "out", "train")] == ["p1", "p3", "p5", "p7", "p11"]


def rows_of(out: Path, split: str) -> list[dict[str, object]]:
    return pq.read_table(out / "data" / f"{split}-00000-of-00001.parquet").to_pylist()


def test_every_file_and_row_group_of_an_export_has_one_schema(store: Path, tmp_path: Path, monkeypatch):
    """The only reasoning comes in a late row; readers of many files take their columns from the first."""
    monkeypatch.setattr(split_files, "ROWS_PER_FILE", 2)
    monkeypatch.setattr(split_files, "ROWS_PER_GROUP", 1)
    export.export(store, tmp_path / "out", shape="messages")
    paths = sorted((tmp_path / "out" / "data").glob("*.parquet"))
    names = [f"{split}-{n:05d}-of-00003.parquet" for split in ("test", "train") for n in range(3)]
    assert [path.name for path in paths] == names
    assert len({str(pq.read_schema(path)) for path in paths}) == 1
    assert pq.read_metadata(paths[0]).num_row_groups == 2
    turns = [row["messages"][-1] for path in paths for row in pq.read_table(path).to_pylist()]
    assert [turn["reasoning_content"] for turn in turns if turn["reasoning_content"]] == ["first this"]
    export.export(store, tmp_path / "plain", reasoning="drop")
    path = min((tmp_path / "plain" / "data").glob("test-*.parquet"))
    assert pq.read_table(path).to_pylist()[0]["completion"] == [{"role": "assistant", "content": "answer 0"}]


PARTS = [{"type": "text", "text": "hé"}]
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}
TURNS = (
    ({"role": "user", "content": PARTS},),
    (
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c1", "content": "5"},
    ),
    ({"role": "user", "name": "Ada", "content": "2+3?"},),
)


@pytest.mark.parametrize("shape", ["prompt-completion", "messages", "openai", "sharegpt"])
def test_turns_with_more_than_text_leave_alike_before_and_after_sealing_or_not_at_all(tmp_path: Path, shape):
    store = tmp_path / "store"
    teacher = "http://127.0.0.1:8000/v1|mock-teacher"
    with open_store(store, mock=True, model="mock-teacher", teacher_id=teacher) as journal:
        for number, turns in enumerate(TURNS):
            body = {"model": "mock-teacher", "messages": list(turns)}
            raw = raw_of(number).replace(b"mock-2026", b"mock-teacher")
            journal.apply([intent(number), answer(number, body=body, raw=raw)])
        before = export.export(store, tmp_path / "a", shape=shape)
        seal(journal, store, target_bytes=1 << 20, everything=True)
    after = export.export(store, tmp_path / "b", shape=shape)
    assert (before.rows, before.left_out) == (after.rows, after.left_out)
    for file_before, file_after in zip(before.files[:-3], after.files[:-3], strict=True):
        assert file_before.read_bytes() == file_after.read_bytes()
    if shape == "openai":
        rows = [json.loads(line)["messages"][:-1] for line in after.files[0].read_text().splitlines()]
        assert rows == [list(turns) for turns in TURNS]
    else:
        assert after.rows == 1
        assert after.left_out == {"turn_has_tool_calls": 1, "turn_has_name": 1}
        read = after.files[0].read_text if shape == "sharegpt" else pq.read_table(after.files[0]).to_pylist
        assert "'content': 'hé'" in str(read()) or '"value": "hé"' in str(read())


@pytest.mark.parametrize("place", ["a-file", "a-file/inside", "/proc/nothing"])
def test_a_place_that_can_be_no_folder_is_refused_in_words(store: Path, tmp_path: Path, place: str):
    (tmp_path / "a-file").write_text("mine")
    with pytest.raises(ConfigError, match="can't be a folder"):
        export.export(store, tmp_path / place)
    assert (tmp_path / "a-file").read_text() == "mine"


def test_nothing_to_export_is_refused_and_writes_nothing(store: Path, tmp_path: Path):
    with pytest.raises(ConfigError, match="all rows are left out"):
        export.export(store, tmp_path / "out", choice=export.RowChoice(split="no-such-split"))
    Journal.open(tmp_path / "bare").close()
    with pytest.raises(ConfigError, match="the corpus holds no row"):
        export.export(tmp_path / "bare", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("reasoning", "text"), [("drop", "then that"), ("inline", "<think>\nfirst this\n</think>\n\nthen that")]
)
def test_reasoning_is_dropped_or_put_inside_by_choice(store: Path, tmp_path: Path, reasoning: str, text: str):
    export.export(store, tmp_path / "out", shape="openai", reasoning=reasoning)  # type: ignore[arg-type]
    rows = [json.loads(line) for line in (tmp_path / "out" / "test.jsonl").read_text().splitlines()]
    assert rows[4]["messages"][-1] == {"role": "assistant", "content": text}


def test_sharegpt_has_the_roles_human_and_gpt(store: Path, tmp_path: Path):
    export.export(store, tmp_path / "out", shape="sharegpt")
    first = json.loads((tmp_path / "out" / "train.jsonl").read_text().splitlines()[0])
    assert [turn["from"] for turn in first["conversations"]] == ["human", "gpt"]


def test_a_split_keeps_only_its_rows(store: Path, tmp_path: Path):
    done = export.export(store, tmp_path / "out", shape="messages", choice=export.RowChoice(split="train"))
    assert done.rows == 5
    assert done.left_out["other_split"] == 5


@pytest.mark.parametrize("shape", ["prompt-completion", "openai"])
@pytest.mark.parametrize(
    ("named", "split"),
    [("train", "train"), (None, "train"), ("held_out", "test"), ("dev", "validation"), ("x/../y", "test")],
)
def test_the_file_of_a_row_follows_its_split(tmp_path: Path, shape: str, named: str | None, split: str):
    rows = [sample(1), sample(2, metadata_json=json.dumps({"split": named} if named else {}))]
    done = export.export(store_of(tmp_path, rows), tmp_path / "out", shape=shape)  # type: ignore[arg-type]
    assert done.splits == ({"train": 2} if split == "train" else {"train": 1, split: 1})
    stems = {path.name.split("-")[0].split(".")[0] for path in done.files[:-3]}
    assert stems == {"train", split}
    assert not [path for path in (tmp_path / "out").rglob(".*") if path.is_file()]


def request(**fields: object) -> dict[str, str]:
    return {"request_json": json.dumps({"messages": [{"role": "user", "content": "2+3?"}], **fields})}


TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
IMAGE = [
    {"type": "text", "text": "What?"},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,QUJD"}},
]
RICH = {
    "tools in the request": (request(tools=[TOOL]), "request_has_tools"),
    "older functions": (request(functions=[{"name": "add"}]), "request_has_tools"),
    "a tool call": (
        {
            **request(tools=[TOOL], parallel_tool_calls=False),
            "outcome": "tool_call",
            "completion": None,
            "tool_calls_json": json.dumps([{"index": 0, **CALL}]),
        },
        "outcome_tool_call",
    ),
    "an older function call": (
        {
            **request(),
            "outcome": "tool_call",
            "completion": None,
            "tool_calls_json": json.dumps(CALL["function"]),
        },
        "outcome_tool_call",
    ),
    "a tool_use part": (
        {
            **request(),
            "outcome": "tool_call",
            "completion": "I add.",
            "tool_calls_json": json.dumps(
                [{"type": "tool_use", "id": "c1", "name": "add", "input": {"a": 1}}]
            ),
        },
        "outcome_tool_call",
    ),
    "an image": (request(messages=[{"role": "user", "content": IMAGE}]), "turn_has_image_url"),
    "audio": (
        request(messages=[{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}]),
        "turn_has_input_audio",
    ),
    "an unknown part": (request(messages=[{"role": "user", "content": [7]}]), "turn_has_unknown_part"),
}


@pytest.mark.parametrize("name", RICH)
@pytest.mark.parametrize("shape", ["prompt-completion", "messages", "sharegpt", "openai"])
def test_tools_and_images_are_whole_in_the_openai_format_and_left_out_by_name_elsewhere(
    tmp_path: Path, shape: str, name: str
):
    changes, reason = RICH[name]
    rows = [sample(1), sample(3, **changes)]
    done = export.export(store_of(tmp_path, rows), tmp_path / "out", shape=shape)  # type: ignore[arg-type]
    if shape != "openai":
        assert (done.rows, done.left_out) == (1, {reason: 1})
        return
    assert (done.rows, done.left_out) == (2, {})
    line = json.loads((tmp_path / "out" / "train.jsonl").read_text().splitlines()[1])
    sent = json.loads(changes["request_json"])  # type: ignore[call-overload]
    assert line["messages"][:-1] == sent["messages"]
    assert {key: line.get(key) for key in ("tools", "functions", "parallel_tool_calls")} == {
        key: sent.get(key) for key in ("tools", "functions", "parallel_tool_calls")
    }
    answer = line["messages"][-1]
    if "call" in name:
        called = answer["tool_calls"][0]["function"] if "older" not in name else answer["function_call"]
        assert called == CALL["function"]
        assert answer["content"] is None
    elif name == "a tool_use part":
        assert answer["tool_calls"] == [
            {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
        ]
        assert answer["content"] == "I add."
    else:
        assert answer == {"role": "assistant", "content": "answer 3"}


@pytest.mark.parametrize("calls", ["null", "[]", "[7]", '[{"id": "x"}]', '"add"'])
def test_a_tool_call_that_is_not_understood_is_left_out(tmp_path: Path, calls: str):
    rows = [sample(1), sample(3, outcome="tool_call", completion=None, tool_calls_json=calls)]
    done = export.export(store_of(tmp_path, rows), tmp_path / "out", shape="openai")
    assert done.left_out == {"tool_call_not_understood": 1}


def test_nothing_but_tools_names_the_format_that_keeps_them(tmp_path: Path):
    store = store_of(tmp_path, [sample(1, **request(tools=[TOOL]))])
    with pytest.raises(ConfigError, match="1 request_has_tools") as caught:
        export.export(store, tmp_path / "out")
    assert "--to openai" in caught.value.remedy


def test_the_papers_name_teacher_terms_and_hashes(store: Path, tmp_path: Path):
    out = tmp_path / "out"
    export.export(store, out)
    card = (out / "README.md").read_text()
    assert "mock-teacher" in card
    assert "of no use outside tests" in card
    described = json.loads((out / "croissant.json").read_text())
    hashes = [item.get("sha256") for item in described["distribution"] if "sha256" in item]
    assert hashes
    assert all(digest in card for digest in hashes)
    assert "record mock-teacher" in (out / "NOTICE").read_text()


@pytest.mark.parametrize("shape", ["prompt-completion", "messages", "openai", "sharegpt"])
def test_croissant_is_valid_and_lists_the_files_that_exist(store: Path, tmp_path: Path, shape):
    out = tmp_path / "out"
    export.export(store, out, shape=shape)
    facts = json.loads((out / "croissant.json").read_text(encoding="utf-8"))
    assert [error.message for error in CROISSANT.iter_errors(facts)] == []
    files = [each for each in facts["distribution"] if each["@type"] == "cr:FileObject"]
    for each in files:
        file = out / each["contentUrl"]
        assert each["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        columns = {field["source"]["extract"]["column"] for field in facts["recordSet"][0]["field"]}
        if file.suffix == ".parquet":
            assert columns <= set(pq.read_schema(file).names)
            assert each["encodingFormat"] == "application/x-parquet"
        else:
            assert columns <= set(json.loads(file.read_text(encoding="utf-8").splitlines()[0]))
            assert each["encodingFormat"] == "application/jsonlines"
    (together,) = [each for each in facts["distribution"] if each["@type"] == "cr:FileSet"]
    assert sorted(out.glob(together["includes"])) == sorted(out / each["contentUrl"] for each in files)


def test_a_folder_in_use_an_unknown_shape_and_a_row_for_evaluation_are_refused(store: Path, tmp_path: Path):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "x").write_text("")
    with pytest.raises(ConfigError, match="not empty"):
        export.export(store, tmp_path / "used")
    with pytest.raises(ConfigError, match="unknown format"):
        export.export(store, tmp_path / "out", shape="csv")  # type: ignore[arg-type]
    metadata = {**SCHEMA.metadata, LINEAGE_KEY: json.dumps([LINEAGE]).encode()}
    table = to_table([sample(99, purpose="eval")]).replace_schema_metadata(metadata)
    pq.write_table(table, store / "shards" / "part-000002-bb.parquet")
    with pytest.raises(TermsRefused, match="evaluation"):
        export.export(store, tmp_path / "out")


def test_a_curated_corpus_is_a_corpus_with_the_lineage_of_its_source(store: Path):
    path = store.parent / "curate.toml"
    chosen = 'filters = ["finished", "not_blank", "no_duplicates", {longest = 9}]'
    path.write_text(f'corpus = "store"\nout = "curated"\n{chosen}\n')
    tally = curate.curate(curate.load(path))
    assert tally.kept == 9
    assert dict(tally.dropped) == {"duplicate": 1, "outcome_empty": 1, "outcome_truncated": 1}
    curated = Corpus.open(store.parent / "curated")
    assert curated.count() == 9
    assert [lineage.run_id for lineage in curated.lineages()] == ["run-1"]
    assert curated.verify() == []
    with pytest.raises(ConfigError, match="already"):
        curate.curate(curate.load(path))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("corpus = 1\n[", "not readable as TOML"),
        ('corpus = "a"', "'corpus' and 'out' are needed"),
        ('corpus = "a"\nout = "b"\nfilter = []', "unknown keys"),
        ('corpus = "a"\nout = "b"\nfilters = ["nope"]', "unknown filter"),
        ('corpus = "a"\nout = "b"\nfilters = [3]', "a name, or one name = value"),
        ('corpus = "a"\nout = "b"\nfilters = 3', "'filters' is a list"),
        ('corpus = "a"\nout = "b"\nfilters = [{longest = true}]', "positive number"),
        ('corpus = 5\nout = "b"', "'corpus' is the path"),
        ('corpus = "a"\nout = ["x"]', "'out' is the path"),
    ],
)
def test_a_wrong_curate_file_is_named(tmp_path: Path, text: str, message: str):
    path = tmp_path / "curate.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message.replace("(", r"\(")):
        curate.load(path)


def curate_toml(folder: Path, out: str) -> curate.CurateConfig:
    path = folder / "curate.toml"
    path.write_text(f'corpus = "store"\nout = "{out}"\n')
    return curate.load(path)


def test_runs_that_are_alike_share_a_curated_file_whatever_their_number(tmp_path: Path):
    store = tmp_path / "store"
    with Journal.open(store) as journal:
        for number in range(60):
            purpose = "train" if number < 40 else "eval"
            journal.begin_run(run_record(f"run-{number:02d}", purpose=purpose))
            journal.apply([intent(number, f"run-{number:02d}"), answer(number)])
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (sum(1 for _ in Path("/proc/self/fd").iterdir()) + 24, limits[1])
    )
    try:
        tally = curate.curate(curate_toml(tmp_path, "curated"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert tally.kept == 60
    names = sorted(path.name for path in (tmp_path / "curated" / "shards").iterdir())
    assert names == ["curated-00000.parquet", "curated-00001.parquet"]
    curated = Corpus.open(tmp_path / "curated")
    assert curated.lineages() == Corpus.open(store).lineages()
    assert list(curated.samples()) == list(Corpus.open(store).samples())


def test_a_curation_that_was_cut_leaves_no_half_corpus_and_can_be_done_again(store: Path, monkeypatch):
    config = curate_toml(store.parent, "curated")

    def die(name: str) -> None:
        raise KeyboardInterrupt(name)

    with monkeypatch.context() as patch:
        patch.setattr(curate, "reach", die)
        patch.setattr(curate.shutil, "rmtree", lambda path: None)  # a kill tidies nothing up
        with pytest.raises(KeyboardInterrupt, match=r"curate\.before_rename"):
            curate.curate(config)
    assert [path.name for path in (store.parent / "curated").glob(".curating-*")] != []
    with pytest.raises(StoreError, match="no answers are stored here"):
        Corpus.open(store.parent / "curated")
    assert curate.curate(config).kept == Corpus.open(store.parent / "curated").count()
    assert sorted(path.name for path in (store.parent / "curated").iterdir()) == ["curation.json", "shards"]


@pytest.mark.parametrize(
    ("out", "message"),
    [("store", "the corpus itself"), ("a-file", "can't be a folder"), ("/proc/xx", "can't be a folder")],
)
def test_a_corpus_is_not_curated_into_itself_nor_into_a_file(store: Path, out: str, message: str):
    (store.parent / "a-file").write_text("mine")
    before = sorted(store.rglob("*"))
    with pytest.raises(ConfigError, match=message):
        curate.curate(curate_toml(store.parent, out))
    assert sorted(store.rglob("*")) == before
    open_store(store.parent / "unsealed").close()
    with pytest.raises(ConfigError, match="is a store"):
        curate.curate(curate_toml(store.parent, "unsealed"))
