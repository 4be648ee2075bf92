"""Test how log-probabilities become soft targets: alignment by bytes, mapping, faults, coverage."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as settings_of_hypothesis
from hypothesis import strategies as st

from harvester.store.shards import schema
from harvester.system.token_bytes import byte_of_character, token_bytes
from tests.trainer import chat_templates, teacher_logprobs, tiny
from tests.trainer.chat_templates import SHAPES
from trainer import config as settings
from trainer.data import data_checks, dataset, row_rules, soft_targets
from trainer.data.chat_template import Renderer
from trainer.data.teacher_tokens import read_signal
from trainer.data.token_mapping import CERTAIN
from trainer.model import model


def read(folder, rows, **sections):
    """Render a corpus with soft targets; return examples, report and renderer."""
    train = {"soft_targets": "auto", **sections.pop("train", {})}
    config = settings.load(tiny.train_toml(folder, rows, train=train, **sections))
    found = dataset.read(config)
    renderer = Renderer(model.load_tokenizer(config.base))
    rendered, data = data_checks.render_rows(found, renderer, config)
    return data, rendered, renderer


NO_END = "ends of the turn that the teacher's server doesn't list"


def row(completion, logprobs, number=0, **more):
    return tiny.sample(number, f"question {number}", completion, logprobs=logprobs, **more)


def targets(example):
    """Soft targets by supervised position: {student id: probability}."""
    soft = example.soft
    return {
        int(at): {int(i): math.exp(p) for i, p in zip(ids, log_probs, strict=True) if p > -math.inf}
        for at, ids, log_probs in zip(soft.positions, soft.ids, soft.log_probs.astype(float), strict=True)
    }


def attached(rows, renderer, *, path=None, **data):
    """Soft targets of rows, without a corpus on disk."""
    table = schema.to_table(rows).select(dataset.LOGPROB_COLUMNS)
    signal = read_signal(table.to_batches(), {sample.key for sample in rows})
    config = settings.DataSection(corpus="x", **data)
    examples = dataset.render_samples(rows, renderer, config)
    answers = [row_rules.teacher_text(sample, config) for sample in rows]
    return soft_targets.attach(examples, [s.key for s in rows], answers, signal, renderer, path=path)


@pytest.fixture(scope="module")
def renderer():
    return Renderer(tiny.tokenizer())


def test_equal_tokenizers_give_every_token_its_listed_probabilities(renderer):
    rows = teacher_logprobs.skill(6)
    examples, report = attached(rows, renderer)
    assert (report.path, report.rows, report.rows_without) == ("ids", 6, 0)
    assert report.mapped_mass == pytest.approx(1)
    assert report.coverage == 1
    assert report.counts == {NO_END: 6}
    assert not report.faults
    for sample, example in zip(rows, examples, strict=True):
        by_position = targets(example)
        assert sorted(by_position) == list(range(len(sample.logprobs)))  # the end of turn was not listed
        for at, item in enumerate(sample.logprobs):
            assert len(by_position[at]) == len(item["top"])
            for other in item["top"]:
                token = renderer.tokenizer.convert_tokens_to_ids(_name(other["bytes"]))
                assert by_position[at][token] == pytest.approx(math.exp(other["logprob"]), rel=5e-3)


def _name(data):
    """The name of a byte-level token in the vocabulary."""
    letters = {byte: letter for letter, byte in byte_of_character().items()}
    return "".join(letters[byte] for byte in data)


def test_the_byte_path_equals_the_id_path_for_equal_tokenizers(renderer):
    rows = teacher_logprobs.skill(12, end="<|im_end|>")
    by_id, report = attached(rows, renderer)
    by_bytes, other = attached(rows, renderer, path="bytes")
    assert (report.path, other.path) == ("ids", "bytes")
    assert report.coverage == other.coverage == 1
    for one, two in zip(by_id, by_bytes, strict=True):
        assert np.array_equal(one.soft.positions, two.soft.positions)
        assert np.array_equal(one.soft.ids, two.soft.ids)
        assert np.array_equal(one.soft.log_probs, two.soft.log_probs)


def test_the_end_of_the_turn_is_mapped_by_its_role(renderer):
    entries = teacher_logprobs.of_text(renderer.tokenizer, "please")
    for end in (teacher_logprobs.entry(b"<|teachers_end|>", -0.1), teacher_logprobs.entry(b"", -0.1)):
        at_end = {**end, "top": [{**end, "top": None}, {"token": "!", "bytes": b"!", "logprob": -3.0}]}
        elsewhere = [{**e, "top": [*e["top"], {**end, "logprob": -9.0}]} for e in entries]
        [example], report = attached([row("please", [*elsewhere, at_end])], renderer)
        by_position, stop = targets(example), renderer.chat_shape.stop_id
        last = len(entries)
        assert report.coverage == 1
        assert by_position[last][stop] == pytest.approx(math.exp(-0.1), rel=1e-3)
        assert all(by_position[at][stop] == pytest.approx(math.exp(-9), rel=1e-2) for at in range(last))


def test_a_control_token_of_another_role_goes_to_the_tail(renderer):
    entries = teacher_logprobs.of_text(renderer.tokenizer, "please")
    extra = {"token": "<|tool_call|>", "bytes": b"<|tool_call|>", "logprob": -4.0}
    plain, _ = attached([row("please", entries)], renderer)
    more, report = attached([row("please", [{**e, "top": [*e["top"], extra]} for e in entries])], renderer)
    assert targets(more[0]) == targets(plain[0])
    assert report.counts["alternatives without a student token"] == len(entries)
    assert report.mapped_mass < 1


def test_the_order_of_the_alternatives_changes_no_bit(renderer):
    rows = teacher_logprobs.skill(5, k=6)
    draw = random.Random(3)
    shuffled = [
        replace(r, logprobs=[{**e, "top": draw.sample(e["top"], len(e["top"]))} for e in r.logprobs])
        for r in rows
    ]
    assert any(one.logprobs != two.logprobs for one, two in zip(rows, shuffled, strict=True))
    for path in ("ids", "bytes"):
        for one, two in zip(*(attached(r, renderer, path=path)[0] for r in (rows, shuffled)), strict=True):
            assert np.array_equal(one.soft.ids, two.soft.ids)
            assert np.array_equal(one.soft.log_probs, two.soft.log_probs)


def changed(entries, at, **values):
    """Entries with values of one alternative replaced."""
    top = [dict(item) for item in entries[at]["top"]]
    chosen = entries[at]["bytes"]
    place = next(i for i, item in enumerate(top) if item["bytes"] != chosen)
    top[place] = {**top[place], **values}
    return [{**e, "top": top} if i == at else e for i, e in enumerate(entries)], place


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (-9999.0, "alternatives without a probability (-inf, -9999)"),
        (-math.inf, "alternatives without a probability (-inf, -9999)"),
        (math.nan, "log-probabilities that can't be read"),
        (None, "log-probabilities that can't be read"),
    ],
)
def test_an_alternative_without_a_probability_goes_to_the_tail(renderer, value, reason):
    entries = teacher_logprobs.of_text(renderer.tokenizer, "please")
    spoilt, _ = changed(entries, 1, logprob=value)
    [good], _ = attached([row("please", entries)], renderer)
    [example], report = attached([row("please", spoilt)], renderer)
    assert report.counts[reason] == 1
    assert len(targets(example)[1]) == len(targets(good)[1]) - 1
    assert targets(example)[0] == targets(good)[0]
    assert np.isfinite(example.soft.log_probs[:, 0]).all()


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (0.5, "positions with a probability above 1"),
        (math.inf, "positions with a probability above 1"),
        (-0.01, "positions whose probabilities sum to more than 1"),
    ],
)
def test_a_position_whose_probabilities_are_impossible_has_cross_entropy_only(renderer, value, reason):
    entries = teacher_logprobs.of_text(renderer.tokenizer, "please")
    spoilt, _ = changed(entries, 1, logprob=value)
    [example], report = attached([row("please", spoilt)], renderer)
    assert report.counts[reason] == 1
    assert sorted(targets(example)) == [at for at in range(len(entries)) if at != 1]


def test_the_rounding_of_a_probability_of_1_is_no_fault(renderer):
    entries = [teacher_logprobs.entry(b"y", 1e-6), teacher_logprobs.entry(b"o", 0.0)]
    [example], report = attached([row("yo", entries)], renderer)
    assert [list(found.values()) for found in targets(example).values()] == [[1.0], [1.0]]
    assert report.counts == {NO_END: 1, CERTAIN: 2}


def test_fewer_alternatives_leave_the_rest_to_the_tail(renderer):
    entries = teacher_logprobs.of_text(renderer.tokenizer, "please", k=5)
    fewer = [{**e, "top": e["top"][: 1 + at % 3]} for at, e in enumerate(entries)]
    [example], report = attached([row("please", fewer)], renderer)
    by_position = targets(example)
    for at, item in enumerate(fewer):
        assert len(by_position[at]) == len({item["bytes"], *(other["bytes"] for other in item["top"])})
    assert report.counts["positions with fewer alternatives than others"] > 0
    assert not report.faults


def test_only_the_generated_token_is_a_distribution_of_two_events(renderer):
    entries = [{**e, "top": []} for e in teacher_logprobs.of_text(renderer.tokenizer, "please")]
    [example], report = attached([row("please", entries)], renderer)
    assert example.soft.ids.shape == (len(entries), 1)
    assert report.mapped_mass == pytest.approx(1)


@pytest.mark.parametrize("listed", [False, True])
def test_log_probabilities_of_0_alone_are_said_to_teach_nothing_more(tmp_path, listed):
    def notes(folder, certain):
        rows = []
        for number, word in enumerate(["please", "backwards", "word"]):
            entries = teacher_logprobs.of_text(tiny.tokenizer(), word, seed=number)
            zero = [
                {**e, "logprob": 0.0, "top": [{**e["top"][0], "bytes": e["bytes"], "logprob": 0.0}] * listed}
                for e in entries
            ]
            rows.append(row(word, zero if number < certain else entries, number))
        _, checked, _ = read(folder, rows, data={"eval_share": 0.0})
        report = checked.soft
        assert not any("probability of 1" in line for line in report.notes())  # they are used
        return [line for line in report.notes() if "a log-probability of 0 without alternatives" in line]

    [line] = notes(tmp_path / "all", 3)
    assert "teach what the answers teach" in line
    assert notes(tmp_path / "two", 2) == []


def test_tokens_without_bytes_are_read_from_their_text(renderer):
    entries = teacher_logprobs.of_text(renderer.tokenizer, "please")
    without = [{**e, "bytes": None, "top": [{**other, "bytes": None} for other in e["top"]]} for e in entries]
    [good], _ = attached([row("please", entries)], renderer)
    [example], _ = attached([row("please", without)], renderer)
    assert sorted(targets(example)) == sorted(targets(good))
    assert all(set(targets(example)[at]) <= set(targets(good)[at]) for at in targets(good))


@pytest.mark.parametrize("spoil", [b"\xef\xbf\xbd", None])
def test_a_token_without_exact_bytes_stops_the_alignment_only_around_it(renderer, spoil):
    text = "please 日 say"
    entries = teacher_logprobs.of_text(renderer.tokenizer, text)
    parts = [at for at, e in enumerate(entries) if e["bytes"][0] >= 0x80]
    assert len(parts) == 3
    broken = [{**e, "bytes": spoil, "token": "\ufffd"} if at in parts else e for at, e in enumerate(entries)]
    [example], report = attached([row(text, broken)], renderer)
    assert sorted(targets(example)) == [at for at in range(len(entries)) if at not in parts]
    assert report.counts["generated tokens without exact bytes"] == 3


def test_invalid_utf8_is_aligned_up_to_the_first_difference(renderer):
    entries = teacher_logprobs.of_text(renderer.tokenizer, "please say")
    broken = [*entries, teacher_logprobs.entry(b"\xe6", -0.1), teacher_logprobs.entry(b"!", -0.1)]
    [example], report = attached([row("please say\ufffd!", broken)], renderer)
    assert sorted(targets(example)) == list(range(len(entries)))
    assert report.path == "ids"


def test_random_bytes_never_break_the_mapping(renderer):
    draw = random.Random(5)
    values = [0.0, -1.5, 3.0, math.nan, -math.inf, math.inf, -9999.0, None, -1e30, 1e30, -800.0]
    rows = []
    for number in range(60):
        pieces = [draw.randbytes(draw.randrange(4)) for _ in range(draw.randrange(1, 12))]
        entries = [
            teacher_logprobs.entry(
                piece,
                draw.choice(values),
                [(draw.randbytes(draw.randrange(3)), draw.choice(values)) for _ in range(draw.randrange(5))],
            )
            for piece in pieces
        ]
        rows.append(row(b"".join(pieces).decode(errors="replace") or "x", entries, number))
    examples, report = attached(rows, renderer)
    assert 0 < report.anchors < report.supervised
    for example in examples:
        if example.soft is None:
            continue
        probabilities = np.exp(example.soft.log_probs.astype(np.float64))
        assert np.isfinite(example.soft.log_probs[:, 0]).all()
        assert (probabilities.sum(axis=1) <= 1.02).all()
        assert (np.diff(example.soft.positions) > 0).all()
        assert example.soft.positions[-1] < example.supervised
        for ids, listed in zip(example.soft.ids, probabilities > 0, strict=True):
            assert len(set(ids[listed].tolist())) == listed.sum()


def test_log_probabilities_of_another_text_are_refused(renderer):
    entries = teacher_logprobs.of_text(renderer.tokenizer, "another text")
    [example], report = attached([row("please", entries)], renderer)
    assert example.soft is None
    assert report.counts["rows whose log-probabilities are of another text"] == 1
    [fault] = report.faults
    assert "0.0%" in fault
    assert "soft_targets" in fault


def test_tokens_of_the_reasoning_are_left_out(renderer):
    text = "<think>\nplease\n</think>\n\nplease say"
    entries = teacher_logprobs.of_text(renderer.tokenizer, text)
    sample = row("please say", entries, reasoning="please\n")
    [example], report = attached([sample], renderer)
    answer = renderer.texts(["please say"])[0]
    lead = len(entries) - len(answer)
    assert sorted(targets(example)) == list(range(len(answer)))
    first = entries[lead]
    assert max(targets(example)[0].values()) == pytest.approx(math.exp(first["logprob"]), rel=5e-3)
    assert report.coverage > 0.6


@pytest.mark.parametrize("reasoning", ["keep", "inline"])
def test_learned_reasoning_has_soft_targets_too(reasoning):
    renderer = Renderer(SHAPES["qwen-3"].tokenizer())
    text = "<think>\nI say please\n</think>\n\nplease say"
    entries = teacher_logprobs.of_text(renderer.tokenizer, text)
    sample = row("please say", entries, reasoning="I say please\n")
    [example], report = attached([sample], renderer, reasoning=reasoning)
    spoken = len(renderer.texts(["I say please"])[0]) + len(renderer.texts(["please say"])[0])
    by_position = targets(example)
    assert len(by_position) >= spoken - 2  # a token may cross the border of a text
    assert report.counts.get("rows whose log-probabilities are of another text", 0) == 0
    supervised = example.ids[example.prompt_length :].tolist()
    teachers = {round(math.exp(entry["logprob"]), 2) for entry in entries}
    for at, probabilities in by_position.items():
        assert round(probabilities[supervised[at]], 2) in teachers


@pytest.mark.parametrize("path", ["ids", "bytes"])
@pytest.mark.parametrize(("name", "answer"), [("llama2", "Po how"), ("spaced", "how Po")])
def test_the_space_that_sentencepiece_writes_before_an_answer_is_aligned(name, answer, path):
    tokenizer = getattr(chat_templates, name)()
    renderer = Renderer(tokenizer)
    data = token_bytes(tokenizer)
    ids = tokenizer.encode(answer, add_special_tokens=False)
    assert len(data[ids[0]]) == 2
    assert data[ids[0]].startswith(b" ")  # which the server's text lacks
    entries = [teacher_logprobs.entry(data[i], -0.25, [(data[i], -0.25), (b"q", -3.0)]) for i in ids]
    [example], _ = attached([row(answer, entries)], renderer, path=path)
    supervised = example.ids[example.prompt_length :].tolist()
    by_position = targets(example)
    # A student whose template has no such space has no target for the teacher's first token.
    has_space = data[supervised[0]].startswith(b" ")
    assert (0 in by_position) == has_space
    assert len(by_position) >= len(ids) - (not has_space)
    for at, probabilities in by_position.items():
        assert probabilities[supervised[at]] == pytest.approx(math.exp(-0.25), rel=1e-3)


def test_a_character_that_begins_a_control_token_has_its_soft_target(renderer):
    assert renderer.tokenizer.convert_ids_to_tokens(renderer.chat_shape.end_of_turn[0]).startswith("<")
    entries = [teacher_logprobs.entry(piece, -0.5) for piece in (b"00", b"<", b"a")]
    [example], report = attached([row("00<a", entries)], renderer, path="bytes")
    (less,) = renderer.texts(["<"])[0]
    assert targets(example)[2] == {less: pytest.approx(math.exp(-0.5), rel=1e-3)}
    assert report.mapped_mass == 1.0


def test_rows_without_log_probabilities_mix_freely(renderer):
    rows = [row("please", None, 1), *teacher_logprobs.skill(3)]
    rows = [replace(r, key=f"{n:064x}") for n, r in enumerate(rows)]
    examples, report = attached(rows, renderer)
    assert [e.soft is None for e in examples] == [True, False, False, False]
    assert (report.rows, report.rows_without) == (3, 1)
    _, none = attached([rows[0]], renderer)
    assert not none.faults
    assert "no row has log-probabilities" in str(none)


@settings_of_hypothesis(max_examples=60, deadline=None)
@given(st.text(st.characters(exclude_characters="\ufffd"), min_size=1, max_size=12), st.data())
def test_anchors_are_the_bytes_at_which_both_have_a_token(renderer, text, data):
    raw = text.encode("utf-8", "replace")
    text = raw.decode()
    cuts = sorted({0, *data.draw(st.lists(st.integers(0, len(raw)), max_size=12))} - {len(raw)})
    pieces = [raw[a:b] for a, b in zip(cuts, [*cuts[1:], len(raw)], strict=True)]
    assert b"".join(pieces) == raw
    entries = [teacher_logprobs.entry(piece, -0.5) for piece in pieces]
    [example], report = attached([row(text, entries)], renderer, path="bytes")
    of_student = token_bytes(renderer.tokenizer)
    ids = example.ids[example.prompt_length : len(example.ids) - len(renderer.chat_shape.end_of_turn)]
    starts = np.cumsum([0, *(len(of_student[i]) for i in ids)])[:-1].tolist()
    anchors = [at for at, start in enumerate(starts) if start in cuts]
    found = targets(example) if example.soft is not None else {}
    assert set(found) <= set(anchors)
    for at in anchors:
        piece, token = pieces[cuts.index(starts[at])], of_student[ids[at]]
        if piece == token:
            assert found[at] == {int(ids[at]): pytest.approx(math.exp(-0.5), rel=1e-3)}
    assert report.anchors == len(found)
