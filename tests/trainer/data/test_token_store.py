"""Test the token store: the same rows as in memory, found again, made again where it is damaged."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from harvester.store.shards import schema
from harvester.store.shards.parquet_file import open_writer
from harvester.system import failpoints
from harvester.terms.lineage import Lineage
from tests.trainer import teacher_logprobs, tiny
from tests.trainer.command_line import run_trainer, toml  # noqa: F401
from trainer import config as settings
from trainer.data import array_file, dataset
from trainer.data.chat_template import Example, Renderer
from trainer.data.order import Order
from trainer.data.tokens import builder, part, row_order, row_record
from trainer.errors import DataError, Interrupted, StoreError, StoreFull, StudentError
from trainer.evaluation.doctor import diagnose
from trainer.model import model
from trainer.provenance import fingerprint
from trainer.training.inputs import TrainingInputs, read_inputs
from trainer.training.reporter import Callbacks
from trainer.training.train import train

TRAIN = {"metadata_json": '{"split": "train"}'}


@pytest.fixture
def stored(monkeypatch) -> None:
    """Let every corpus have a token store."""
    monkeypatch.setattr(dataset, "STORED_ROWS", 0)


def mixed_rows() -> list[schema.Sample]:
    """Rows of every kind: learned, held out, leaked, shared, respelled, cut, empty, too long, not text."""
    rows = tiny.skill(30, held_out=6)
    asked = rows[32].messages[0]["content"]
    image = json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]})
    return [
        *rows,
        replace(rows[3], prompt_id="p3b"),  # one answer for two prompts
        tiny.sample(100, asked, "leaked", **TRAIN),
        tiny.sample(101, f"  {asked.upper()} ", "respelled", **TRAIN),
        tiny.sample(102, "a", None, outcome="empty"),
        tiny.sample(103, "b", "cut of", outcome="truncated", finish_reason="length"),
        tiny.sample(104, "c", "cut", finish_reason="length", **TRAIN),
        tiny.sample(105, "d", "x" * 400, **TRAIN),
        tiny.sample(106, "e", "<think>hm</think>so", reasoning="hm", **TRAIN),
        tiny.sample(107, '[{"type":"image_url","image_url":{}}]', "a cat", request_json=image, **TRAIN),
        tiny.sample(108, "f", "bye<|im_end|>", request_json='{"temperature": 0.5}', **TRAIN),
        *(tiny.sample(110 + n, "g", text, sample_index=n, **TRAIN) for n, text in enumerate("4556")),
        tiny.sample(115, "g", "5" * 400, sample_index=9, **TRAIN),
        tiny.sample(120, "h", "held", metadata_json='{"split": "held_out", "task": "t"}', outcome="refused"),
    ]


def write_shards(folder: Path, *shards: list[schema.Sample]) -> None:
    """Write the rows of each shard; rows in groups of 16."""
    (folder / "shards").mkdir(parents=True, exist_ok=True)
    for number, rows in enumerate(shards):
        path = folder / "shards" / f"{number:05d}.parquet"
        with path.open("wb") as sink, open_writer(sink, [Lineage(tiny.lineage())]) as writer:
            writer.write_table(schema.to_table(rows).cast(writer.schema), row_group_size=16)


def inputs_of(config: settings.TrainConfig, progress: list[tuple[int, int, str]] | None = None):
    seen = [] if progress is None else progress
    return read_inputs(config, None, lambda *step: seen.append(step), rehearses=False)


def described(inputs: TrainingInputs, config: settings.TrainConfig) -> dict[str, object]:
    """All that a training takes from its inputs."""
    rows, renderer = inputs.rows, inputs.renderer
    return {
        "sha256": inputs.dataset.sha256,
        "excluded": dict(inputs.dataset.excluded),
        "lengths": inputs.dataset.lengths.tolist(),
        "supervised": inputs.dataset.supervised,
        "weights": [example.weight for example in inputs.dataset.examples],
        "faults": inputs.faults,
        "leaves": list(rows.leaves()),
        "teachers": dict(rows.teachers()),
        "lineages": [dict(lineage.stored) for lineage in rows.lineages],
        "mixed": rows.mixed,
        "held out": [
            (h.prompt_id, h.conversation, h.reference, h.task, h.split, h.teacher) for h in rows.held_out
        ],
        "answered": [h.prompt_id for h in rows.answered],
        "targets": [e.ids.tolist() for e in rows.held_out_examples(renderer, config)],
        "first": list(rows.first(3).leaves()),
        "packs": [inputs.order.packs(step) for step in range(inputs.order.steps)],
        "largest": inputs.order.largest(),
        "soft": None if inputs.soft is None else inputs.soft.as_dict(),
        "targets by row": [soft_lines(example) for example in inputs.dataset.examples],
    }


def soft_lines(example: Example) -> object:
    """Soft targets as values that can be compared; None without."""
    if (soft := example.soft) is None:
        return None
    return [(array.dtype.str, array.tolist()) for array in (soft.positions, soft.ids, soft.log_probs)]


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"truncated": "unterminated", "reasoning": "inline"},
        {"where": "outcome = ['ok', 'truncated']", "eval_share": 0.4, "weights": "prompt"},
        {"answers": "majority", "weights": "agreement"},
        {"per_prompt": 2},
    ],
)
def test_a_store_gives_what_reading_in_memory_gives(tmp_path, monkeypatch, data):
    path = tiny.train_toml(tmp_path, [], data=data, evaluate={"every": 1})
    rows = mixed_rows()
    write_shards(tmp_path / "store", rows[20:], rows[:20])
    config = settings.load(path)
    expected = described(inputs_of(config), config)
    monkeypatch.setattr(dataset, "STORED_ROWS", 0)
    monkeypatch.setattr("trainer.data.tokens.row_ranges.PART_ROWS", 16)
    progress: list[tuple[int, int, str]] = []
    assert described(inputs_of(config, progress), config) == expected
    assert progress[0] == (0, len(rows), "tokenising")
    assert described(inputs_of(config, progress := []), config) == expected
    assert not progress, "the second time nothing is tokenised"


def rows_with_log_probs(*, others: bool) -> list[schema.Sample]:
    """Rows of every kind, most with log-probabilities; with `others` by a teacher with other tokens."""
    rows = mixed_rows()
    tokenizer = tiny.tokenizer()
    result = []
    for row in rows:
        number = int(row.key, 16)  # prompts that share an answer have its log-probabilities
        if row.completion is None or number % 7 == 3:
            result.append(row)
            continue
        entries = teacher_logprobs.of_text(tokenizer, row.completion, seed=number, end="<|im_end|>")
        if others and number % 2:
            entries = teacher_logprobs.by_pairs(row.completion, seed=number)
        if number % 5 == 1:
            entries[0] = {**entries[0], "logprob": None}
        request = '{"temperature": 0.7, "top_p": 0.9}' if number % 3 else "{}"
        result.append(replace(row, logprobs=entries, request_json=row.request_json or request))
    broken = teacher_logprobs.of_text(tokenizer, "quite another text")
    return [*result, tiny.sample(130, "i", "this", logprobs=broken, **TRAIN)]


@pytest.mark.parametrize(
    ("others", "processes"),
    [(False, 1), (True, 1), pytest.param(True, 2, marks=pytest.mark.long)],
    ids=["ids", "bytes", "two processes"],
)
def test_soft_targets_of_a_store_are_those_made_in_memory(tmp_path, monkeypatch, others, processes):
    rows = rows_with_log_probs(others=others)
    path = tiny.train_toml(tmp_path, [], train={"soft_targets": "auto"}, data={"truncated": "unterminated"})
    write_shards(tmp_path / "store", rows[20:], rows[:20])
    config = settings.load(path)
    expected = described(inputs_of(config), config)
    assert expected["soft"]["path"] == ("bytes" if others else "ids")
    assert expected["soft"]["rows"] > 20
    monkeypatch.setattr(dataset, "STORED_ROWS", 0)
    monkeypatch.setattr("trainer.data.tokens.row_ranges.SIGNAL_PART_ROWS", 16)
    monkeypatch.setattr("trainer.data.tokens.builder._useful_processes", lambda _: processes)
    stored = described(inputs_of(config), config)
    assert len(list(config.cache.glob("*/selections/*/soft-*.bin"))) == processes
    assert stored == expected
    diagnosis = diagnose(config)
    assert diagnosis.compared, "the doctor shows both distributions"
    monkeypatch.setattr(dataset, "STORED_ROWS", 1 << 40)
    assert diagnose(config) == diagnosis


@pytest.mark.usefixtures("stored")
def test_damaged_soft_targets_are_found_and_made_again(tmp_path):
    path = tiny.train_toml(tmp_path, teacher_logprobs.skill(6), train={"soft_targets": "auto"})
    config = settings.load(path)
    expected = inputs_of(config).dataset.sha256
    assert inputs_of(config, progress := []).dataset.sha256 == expected
    assert not progress, "the second time nothing is computed"
    [index] = config.cache.glob("*/selections/*/soft.npz")
    of_part = [next(config.cache.glob(f"*/parts/*/{name}")) for name in part.SIGNAL_FILES]
    for damaged in (index, *index.parent.glob("soft-*.bin"), *of_part):
        data = bytearray(damaged.read_bytes())
        data[len(data) // 2] ^= 1
        damaged.write_bytes(data)
        assert inputs_of(config, progress := []).dataset.sha256 == expected
        assert progress, f"{damaged.name} was made again"
    inputs = inputs_of(config)
    [targets] = index.parent.glob("soft-*.bin")
    os.truncate(targets, 10)
    with pytest.raises(StoreError, match="shorter than it was"):
        list(inputs.dataset.examples)


def test_verdicts_choose_the_same_answers_as_in_memory(tmp_path, monkeypatch):
    section = {"answers": "best", "weights": "agreement"}
    path = tiny.train_toml(tmp_path, mixed_rows(), data=section)
    path.write_text(path.read_text() + '[verify."*"]\nkind = "exact"\n')
    config = settings.load(path)
    expected = described(inputs_of(config), config)
    monkeypatch.setattr(dataset, "STORED_ROWS", 0)
    assert described(inputs_of(config), config) == expected


def test_the_doctor_finds_the_same_in_a_store(tmp_path, monkeypatch):
    config = settings.load(tiny.train_toml(tmp_path, mixed_rows()))
    expected = diagnose(config)
    monkeypatch.setattr(dataset, "STORED_ROWS", 0)
    assert diagnose(config) == expected
    assert expected.findings, "there are faults to find"


def test_a_training_in_memory_resumes_with_a_store_to_the_same_bits(tmp_path, monkeypatch):
    def trained(folder: str, *, stops: bool) -> bytes:
        path = tiny.train_toml(tmp_path / folder, tiny.skill(40, held_out=4), train={"log_every": 1})
        config = settings.load(path)
        if stops:
            with pytest.raises(Interrupted):
                train(config, Callbacks(on_step=lambda log: os.kill(os.getpid(), signal.SIGTERM)))
            monkeypatch.setattr(dataset, "STORED_ROWS", 0)
        done = train(config)
        assert any("resumed at step 1" in note for note in done.notes) is stops
        return (config.out_path / "adapter" / "adapter_model.safetensors").read_bytes()

    assert trained("whole", stops=False) == trained("resumed", stops=True)


def files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in {"LOCK", "IN_USE"})


@pytest.mark.usefixtures("stored")
def test_every_damaged_file_is_found_and_made_again(tmp_path):
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(40, held_out=4)))
    expected = described(inputs_of(config), config)
    names = {path.name for path in files_of(config.cache)}
    assert names >= {*part.FILES, part.FACTS, "selection.json", "learned.npz", "chosen.npz", "held_out.npz"}
    for number, path in enumerate(files_of(config.cache)):
        whole = path.read_bytes()
        flipped = bytearray(whole)
        flipped[len(whole) // 2] ^= 1
        kinds = (bytes(flipped), whole[: len(whole) // 2], b"", None)
        for damaged in kinds[:2] if path.name == part.IDS else (kinds[number % 4],):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            progress: list[tuple[int, int, str]] = []
            assert described(inputs_of(config, progress), config) == expected, path
            is_part = path.parent.parent.name == "parts"
            assert path.name.startswith("packs-") or progress, f"{path} was taken as it was"
            assert not is_part or progress[0][0] == 0, f"{path} was not rendered again"
            assert path.read_bytes() == whole or path.suffix == ".npz"


def test_no_flipped_byte_of_an_array_file_changes_an_array(tmp_path):
    path, array = tmp_path / "arrays.npz", np.arange(40, dtype=np.int32)
    array_file.write(path, {"a": array, "b": array[:1]})
    whole = path.read_bytes()
    damaged = 0
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x41]) + whole[place + 1 :])
        read = array_file.read(path, ("a", "b"))
        damaged += read is None
        assert read is None or (read["a"].tolist(), read["b"].tolist()) == (array.tolist(), [0])
    assert damaged > len(whole) / 2


@pytest.mark.usefixtures("stored")
def test_another_tokenizer_template_or_setting_takes_no_store(tmp_path):
    path = tiny.train_toml(tmp_path, tiny.skill(20))
    config = settings.load(path)
    inputs_of(config)
    stores = {p.parent.name for p in config.cache.glob("*/LOCK")}
    tiny.base(tmp_path / "base", speech=tiny.tokenizer(more=("<|more|>",)))
    inputs_of(config)
    (tmp_path / "mine.jinja").write_text(tiny.CHATML + "{# mine #}")
    inputs_of(
        config.model_copy(update={"student": config.student.model_copy(update={"template": "mine.jinja"})})
    )
    kept = config.data.model_copy(update={"reasoning": "inline"})
    inputs_of(config.model_copy(update={"data": kept}))
    now = {p.parent.name for p in config.cache.glob("*/LOCK")}
    assert (len(stores), len(now)) == (1, 4)


@pytest.mark.usefixtures("stored")
def test_only_new_shards_are_tokenised(tmp_path):
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(20)))
    first = inputs_of(config).dataset
    rows = tiny.skill(36)
    write_shards(tmp_path / "store", rows[:20])
    inputs_of(config)
    write_shards(tmp_path / "store", rows[:20], rows[20:])
    progress: list[tuple[int, int, str]] = []
    both = inputs_of(config, progress).dataset
    assert progress[0] == (20, 36, "tokenising")
    assert (len(first.examples), len(both.examples)) == (20, 36)


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize(
    ("place", "whole_parts"),
    [
        ("tokens.locked", 0),
        ("tokens.files_written", 0),
        ("tokens.before_rename", 0),
        ("tokens.part_written", 1),
        ("tokens.before_selection", 3),
        ("tokens.selection_written", 3),
        ("tokens.soft_written", 3),
    ],
)
def test_a_killed_builder_is_gone_on_with(tmp_path, monkeypatch, place, whole_parts):
    monkeypatch.setattr("trainer.data.tokens.row_ranges.PART_ROWS", 16)
    soft = "auto" if place == "tokens.soft_written" else "off"
    config = settings.load(tiny.train_toml(tmp_path, [], train={"soft_targets": soft}))
    write_shards(tmp_path / "store", teacher_logprobs.skill(40) if soft == "auto" else tiny.skill(40))
    child = os.fork()
    if child == 0:
        failpoints._armed, failpoints._left = place, 1
        inputs_of(config)
        os._exit(1)  # the kill did not fire
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    [home] = [lock.parent for lock in config.cache.glob("*/LOCK")]
    assert len(list((home / "parts").glob("[!.]*"))) == whole_parts
    progress: list[tuple[int, int, str]] = []
    again = described(inputs_of(config, progress), config)
    assert not progress or progress[0][0] == min(40, 16 * whole_parts), "whole parts are kept"
    assert bool(progress) is (place != "tokens.selection_written")
    assert not list(home.rglob("*/.*")), "half-written files are gone"
    monkeypatch.setattr(dataset, "STORED_ROWS", 1 << 40)
    assert described(inputs_of(config), config) == again


@pytest.mark.usefixtures("stored")
def test_a_second_builder_waits_for_the_first(tmp_path):
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(20)))
    inputs_of(config)
    [lock] = config.cache.glob("*/LOCK")
    [facts] = config.cache.glob("*/selections/*/selection.json")
    whole = facts.read_bytes()
    facts.unlink()
    waiting = threading.Event()
    result = []

    def build() -> None:
        on_progress = lambda _done, _rows, doing: waiting.set() if "waiting" in doing else None  # noqa: E731
        renderer = Renderer(model.load_tokenizer(config.base))
        result.append(builder.prepare(config, renderer, on_progress))

    with lock.open() as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        second = threading.Thread(target=build)
        second.start()
        assert waiting.wait(60)
        facts.write_bytes(whole)  # the first one completes
    second.join(60)
    assert len(result[0].data.examples) == 20


@pytest.mark.usefixtures("stored")
def test_a_full_disk_and_a_folder_that_is_no_folder_are_named(tmp_path, monkeypatch):
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(20)))
    original = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.name == part.IDS:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return original(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(StoreFull, match=r"the disk is full .*\[data\] cache") as caught:
            inputs_of(config)
    assert caught.value.exit_code == 5
    assert not list(config.cache.rglob(part.FACTS))
    (tmp_path / "file").write_text("")
    elsewhere = config.model_copy(update={"data": config.data.model_copy(update={"cache": "file/tokens"})})
    with pytest.raises(StoreError, match=r"a file lies where a folder should .*\[data\] cache"):
        inputs_of(elsewhere)
    assert len(inputs_of(config).dataset.examples) == 20


@pytest.mark.usefixtures("stored")
def test_a_file_that_vanishes_while_it_is_read_is_an_error_in_words(tmp_path):
    inputs = inputs_of(settings.load(tiny.train_toml(tmp_path, tiny.skill(20))))
    [ids] = (tmp_path / "out" / "tokens").rglob(part.IDS)
    os.truncate(ids, 8)
    with pytest.raises(StoreError, match="shorter than it was"):
        list(inputs.dataset.examples)


@pytest.mark.usefixtures("stored")
def test_errors_are_those_of_reading_in_memory(tmp_path):
    config = settings.load(
        tiny.train_toml(tmp_path / "a", [tiny.sample(1, "a", None, outcome="empty", **TRAIN)])
    )
    with pytest.raises(DataError, match="1 empty"):
        inputs_of(config)
    config = settings.load(tiny.train_toml(tmp_path / "b", tiny.skill(3), data={"where": "model = 'x'"}))
    with pytest.raises(DataError, match="chooses none of 3 rows"):
        inputs_of(config)
    config = settings.load(tiny.train_toml(tmp_path / "c", tiny.skill(3), train={"max_length": 4}))
    with pytest.raises(DataError, match="more than 4 tokens"):
        inputs_of(config)
    refusing = (
        "{% if 'bbbb' in messages[0]['content'] %}{{ raise_exception('no b') }}{% endif %}" + tiny.CHATML
    )
    config = settings.load(
        tiny.train_toml(tmp_path / "d", [*tiny.skill(8), tiny.sample(9, "bbbb", "b", **TRAIN)])
    )
    (config.base / "chat_template.jinja").write_text(refusing)
    with pytest.raises(StudentError, match=r"no b: 1 of 9 rows, the first is 'p9'"):
        inputs_of(config)
    config = settings.load(tiny.train_toml(tmp_path / "e", tiny.skill(3)))
    file = config.base / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 50}))
    with pytest.raises(StudentError, match="embeds ids below 50"):
        inputs_of(config)


@pytest.mark.usefixtures("stored")
def test_stores_and_selections_used_longest_ago_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(builder, "KEPT_STORES", 2)
    monkeypatch.setattr(builder, "KEPT_SELECTIONS", 2)
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(20)))
    for number, share in enumerate((0.0, 0.1, 0.2)):
        data = config.data.model_copy(update={"eval_share": share})
        changed = config.model_copy(update={"data": data})
        for length in (64, 65, 66):
            train_section = config.train.model_copy(update={"max_length": length})
            inputs_of(changed.model_copy(update={"train": train_section}))
            for path in config.cache.rglob("*"):
                if path.name in {"LOCK", "selection.json"}:
                    past = path.stat().st_mtime - 10
                    os.utime(path, (past, past))
        stores = list(config.cache.glob("*/LOCK"))
        assert len(stores) == min(number + 1, 2)
    for store in stores:
        assert len(list(store.parent.glob("selections/*"))) == 2
        assert len(list(store.parent.glob("parts/*"))) == 1


def test_packs_are_kept_and_found_only_whole(tmp_path):
    section = settings.TrainSection(epochs=2, batch_tokens=64, max_length=32)
    lengths = [8 + i % 9 for i in range(100)]
    expected = [Order(lengths, section).packs(step) for step in range(Order(lengths, section).steps)]
    for damage in (None, b"", b"PK"):
        order = Order(lengths, section, kept_in=tmp_path)
        assert [order.packs(step) for step in range(order.steps)] == expected
        files = list(tmp_path.glob("packs-*.npz"))
        assert len(files) == 2
        for file in files:
            if damage is None:
                assert array_file.read(file, ("items", "bounds", "order")) is not None
            file.write_bytes(file.read_bytes()[:100] if damage is None else damage)
    assert array_file.read(files[0], ("items",)) is None


@pytest.mark.usefixtures("stored")
def test_commands_say_what_they_tokenise_and_go_the_same_way(run_trainer, toml):  # noqa: F811
    code, out, err = run_trainer("plan", toml, "--probe", 0, "--json")
    assert code == 0
    assert "44/44 rows, tokenising" in err
    assert json.loads(out)["examples"] == 40
    code, _, err = run_trainer("doctor", toml)
    assert (code, "tokenising" in err) == (0, False)
    code, out, err = run_trainer("train", toml, "--json")
    assert (code, "tokenising" in err) == (0, False)
    assert json.loads(out)["examples"] == 40
    assert not fingerprint.verify(toml.parent / "out" / "adapter", toml.parent / "store")


BUILD = """
import os, sys
from pathlib import Path
from trainer import config as settings
from trainer.data.chat_template import Example, Renderer
from trainer.data.tokens import builder, row_ranges
from trainer.errors import HarvesterError
from trainer.model import model

if __name__ == "__main__":
    os.environ["HARVESTER_FAILPOINT"] = sys.argv[2]  # of the processes that are started
    row_ranges.PART_ROWS = 16
    config = settings.load(Path(sys.argv[1]))
    show = lambda done, rows, doing: print(done, rows, doing, flush=True)
    try:
        store = builder.prepare(config, Renderer(model.load_tokenizer(config.base)), show, processes=2)
        print(store.data.sha256)
    except HarvesterError as error:
        print(type(error).__name__, error.exit_code, error)
"""


@pytest.mark.long
def test_several_processes_make_the_same_store_and_one_that_is_killed_is_named(tmp_path):
    path = tiny.train_toml(tmp_path, [])
    write_shards(tmp_path / "store", tiny.skill(128)[:32], tiny.skill(128)[32:])
    config = settings.load(path)
    script = tmp_path / "build.py"
    script.write_text(BUILD)

    def build(failpoint: str) -> list[str]:
        command = [sys.executable, str(script), str(path), failpoint]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[3])}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    lost = build("tokens.worker:2")
    assert lost[-1].startswith("ProcessLost 75 "), lost
    assert "exit code -9" in lost[-1]
    again = build("")
    assert int(again[0].split()[0]) >= 16, "what was done is kept"
    assert any("tokenising in 2 processes" in line for line in again)
    assert again[-1] == inputs_of(config).dataset.sha256


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("range_rows", [4, 1 << 17], ids=["several ranges", "one range"])
def test_rows_are_sorted_by_prompt_id_sample_and_key(tmp_path, monkeypatch, range_rows):
    ids = ["p9", "p10", "p1", "p", "é", "😀", "p10", "zz", "a" * 300, "p10"]
    rows = [
        tiny.sample(
            n * 7919 % 61, f"say {n}", f"{n}", prompt_id=ids[n % 10], sample_index=n // 7 % 3, **TRAIN
        )
        for n in range(61)
    ]
    config = settings.load(tiny.train_toml(tmp_path, []))
    write_shards(tmp_path / "store", rows[40:], rows[:40])
    monkeypatch.setattr("trainer.data.tokens.row_ranges.PART_ROWS", 16)
    monkeypatch.setattr(row_order, "RANGE_ROWS", range_rows)
    reader = builder.prepare(config, Renderer(model.load_tokenizer(config.base))).rows.reader
    assert (len(row_order._bounds(reader)) > 4) is (range_rows < 61)
    found = []
    for row in row_order.sorted_rows(reader).tolist():
        record = reader.record(row)[1]
        found.append(
            (reader.prompt_id(row).encode(), int(record["sample_index"]), reader.digest(record, "key"))
        )
    assert found == sorted((row.prompt_id.encode(), row.sample_index, row.key) for row in rows)


def test_a_part_without_rows_is_sorted_too(monkeypatch):
    """`[data] where` may leave out all rows of a part."""
    records = np.zeros(3, dtype=row_record.RECORD)
    records["id_bytes"] = 1
    parts = [(records[:0], b""), (records, b"cab"), (records[:0], b"")]

    class Reader:
        def __len__(self) -> int:
            return 3

        def prompt_ids(self):
            return iter(parts)

    monkeypatch.setattr(row_order, "RANGE_ROWS", 1)
    assert row_order.sorted_rows(Reader()).tolist() == [1, 2, 0]
