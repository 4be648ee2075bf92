"""Test the counts of answers by task, tag, split and prompt file: on the page and in `harvester status`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from harvester.mock_teacher.running import RunningMock
from harvester.observe.report.answer_statistics import statistics_of_store
from harvester.observe.report.groups import KINDS, MOST_GROUPS, NONE, OTHERS, Group, Groups, table_lines
from harvester.observe.report.report import write_report
from harvester.store.shards.schema import Sample, to_table
from tests import commands
from tests.faults.bench import run_harvest

Mock = Callable[..., RunningMock]
LABELS = st.sampled_from(["sum", "sort", 7, "", None, ["a"], "x" * 200, "a\x1b[31mb"])


def sample(number: int, task: object, split: object, tags: list[str], outcome: str) -> Sample:
    metadata = {name: value for name, value in (("task", task), ("split", split)) if value is not None}
    return Sample(
        key=f"{number:064x}",
        prompt_id=str(number),
        messages=[{"role": "user", "content": "?"}],
        completion="4",
        outcome=outcome,
        finish_reason="stop",
        tags=tags,
        metadata_json=json.dumps(metadata),
        output_tokens=number % 5,
        cost_microusd=number,
        source_file="p.jsonl",
    )


def groups_of(*tables: pa.Table) -> Groups:
    groups = Groups()
    for table in tables:
        part = Groups()
        part.add_table(table)
        groups.add(part)
    return groups


@given(
    st.lists(
        st.tuples(
            LABELS, LABELS, st.lists(st.sampled_from("abc"), max_size=4), st.sampled_from(["ok", "empty"])
        ),
        max_size=40,
    ),
    st.integers(0, 40),
)
def test_groups_agree_with_a_plain_count_however_the_answers_are_divided(
    rows: list[tuple[object, object, list[str], str]], cut: int
) -> None:
    samples = [sample(number, *row) for number, row in enumerate(rows)]
    groups = groups_of(to_table(samples[:cut]), to_table(samples[cut:]))
    for place, kind in ((0, "task"), (1, "split")):
        expected: dict[str, int] = {}
        for row in rows:
            label = row[place]
            name = str(label)[:80] if isinstance(label, str | int) and label != "" else NONE
            expected[name] = expected.get(name, 0) + 1
        assert {name: group.answers for name, group in groups.by_kind[kind].items()} == expected
    for tag in "abc":
        group = groups.by_kind["tag"].get(tag)
        tagged = [s for s in samples if tag in s.tags]
        assert (group.answers if group else 0) == len(tagged)
        assert (group.cost_microusd if group else 0) == sum(s.cost_microusd for s in tagged)
        assert (group.not_usable if group else 0) == sum(s.outcome == "empty" for s in tagged)


def test_more_groups_than_are_kept_are_counted_together() -> None:
    samples = [sample(number, f"t{number}", None, [], "ok") for number in range(MOST_GROUPS + 50)]
    groups = groups_of(to_table(samples))
    assert len(groups.by_kind["task"]) == MOST_GROUPS + 1
    assert groups.by_kind["task"][OTHERS].answers == 50


def test_status_and_the_page_count_answers_by_task_tag_and_split(mock_teacher: Mock, tmp_path: Path) -> None:
    prompts = [
        {
            "prompt": f"What is {n} + 1?",
            "tags": ["even"] if n % 2 == 0 else [],
            "task": "sum" if n < 9 else "<b>odd</b>",
            "split": "held_out" if n == 3 else "train",
        }
        for n in range(12)
    ]
    empty = {"action": "empty_content", "prompt": "What is 4 + 1"}
    store = run_harvest(mock_teacher(), tmp_path, [empty], prompts=prompts).store
    by_kind = statistics_of_store(store)[0].by_group.by_kind
    assert {kind: {name: group.answers for name, group in by_kind[kind].items()} for kind in KINDS} == {
        "task": {"sum": 9, "<b>odd</b>": 3},
        "tag": {"even": 6, NONE: 6},
        "split": {"train": 11, "held_out": 1},
        "file": {"p.jsonl": 12},
    }
    shown = json.loads(commands.run("harvester", ["status", store, "--by", "task", "--json"]).stdout)["by"]
    assert (shown["sum"]["answers"], shown["sum"]["not_usable"]) == (9, 1)
    assert "1 (11.1%)" in "\n".join(table_lines("task", [(name, Group(**shown[name])) for name in shown]))
    page = write_report(store, tmp_path / "report.html").read_text()
    assert "Answers by task" in page
    assert "Answers by split" in page
    assert "<b>odd</b>" not in page
    refused = commands.run("harvester", ["status", store, "--by", "colour"])
    assert (refused.returncode, "task, tag, split, file" in refused.stderr) == (2, True)
