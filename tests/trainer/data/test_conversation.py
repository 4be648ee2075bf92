"""Test that the learned prompt holds all that the teacher was asked, or the row is refused."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest

from tests.trainer import tiny
from tests.trainer.chat_templates import SHAPES, TOOLS
from tests.trainer.command_line import run_trainer, toml  # noqa: F401 - fixtures
from trainer import config
from trainer.data import dataset, row_rules
from trainer.data.chat_template import Renderer
from trainer.data.conversation import Conversation
from trainer.errors import DataError, StudentError
from trainer.training.inputs import read_inputs

USER = {"role": "user", "content": "Is it raining in Ghent?"}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"town": "Gh\\u0117nt"}'},
}
CALLED = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call00001", "content": "drizzle"},
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Look out of the window.",
        "parameters": {"type": "object"},
    },
}


def asked(number: int, messages: list[dict], answer: str = "Yes.", **fields) -> object:
    """A row as the harvester stores a request with these messages and fields."""
    columns = [{"role": m["role"], "content": m.get("content")} for m in messages]
    request = json.dumps({"model": "m", "messages": messages, **fields})
    return tiny.sample(number, "", answer, messages=columns, request_json=request)


def store(path, rows, template: str = TOOLS) -> None:
    """Replace the corpus and the base's chat template."""
    tiny.corpus(path.parent / "store", [*tiny.skill(4), *rows])
    (path.parent / "base" / "chat_template.jinja").write_text(template)


def learned_prompts(path) -> dict[str, str]:
    """The prompts that would be learned, by prompt id, as text."""
    loaded = config.load(path)
    rows = dataset.read(loaded)
    renderer = Renderer(tiny.tokenizer((path.parent / "base" / "chat_template.jinja").read_text()))
    examples = dataset.render(rows, renderer, loaded).examples
    return {
        sample.prompt_id: renderer.tokenizer.decode(example.ids[: example.prompt_length].tolist())
        for sample, example in zip(rows.train, examples, strict=True)
    }


def settings_for_long_rows(path) -> None:
    """Let train.toml learn every row, of up to 1,024 tokens."""
    text = path.read_text().replace("[lora]", "eval_share = 0.0\n[lora]")
    path.write_text(re.sub(r"(batch_tokens|pack_tokens|max_length) = \d+", r"\1 = 1024", text))


def test_parts_calls_and_schemas_are_in_the_prompt_as_the_teacher_had_them(run_trainer, toml):  # noqa: F811
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "124 + 57?"}]
    store(toml, [asked(10, [{"role": "user", "content": parts}]), asked(11, CALLED, tools=[WEATHER])])
    settings_for_long_rows(toml)
    prompts = learned_prompts(toml)
    assert prompts["p10"] == "<|im_start|>user\nWhat is\n124 + 57?<|im_end|>\n<|im_start|>assistant\n"
    assert "Look out of the window." in prompts["p11"]
    assert "<call>weather town=Ghėnt;</call>" in prompts["p11"]
    assert "<|im_start|>tool\ndrizzle" in prompts["p11"]
    assert run_trainer("doctor", toml)[0] == 0


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize(
    ("of_message", "of_request"),
    [({"prefix": True}, {}), ({"partial": True}, {}), ({}, {"continue_final_message": True})],
)
def test_rows_that_continue_a_begun_answer_are_left_out_by_name(
    toml,  # noqa: F811
    monkeypatch,
    of_message,
    of_request,
    stored,
):
    """A chat template closes the turn that was begun, and opens another one."""
    if stored:
        monkeypatch.setattr(dataset, "STORED_ROWS", 1)
    begun = [USER, {"role": "assistant", "content": "It is", **of_message}]
    rows = [
        asked(10, begun, " raining.", **of_request),
        asked(11, [USER, {"role": "assistant", "content": "It is."}], "Is it?"),
        asked(12, [*begun, USER], "Yes.", **of_request),
        replace(asked(13, begun, " dry.", **of_request), metadata_json='{"split": "test"}'),
    ]
    store(toml, rows, tiny.CHATML)
    settings_for_long_rows(toml)
    inputs = read_inputs(config.load(toml), rehearses=False)
    reason = "continues an answer that was begun for the teacher"
    assert dict(inputs.dataset.excluded) == {reason: 2}
    assert len(inputs.dataset.examples) == 6
    assert not list(inputs.rows.held_out)


@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("kind", ["text", "event"])
def test_a_text_that_looks_like_parts_is_learned_as_the_text_that_was_sent(toml, monkeypatch, kind, stored):  # noqa: F811
    if stored:
        monkeypatch.setattr(dataset, "STORED_ROWS", 1)
    text = json.dumps([{"type": kind, "text": "a"}, {"type": kind, "text": "b"}])
    held_out = replace(
        asked(11, [{"role": "user", "content": text + " "}]), metadata_json='{"split": "test"}'
    )
    store(toml, [asked(10, [{"role": "user", "content": text}]), held_out], tiny.CHATML)
    settings_for_long_rows(toml)
    inputs = read_inputs(config.load(toml), rehearses=False)
    assert inputs.dataset.excluded.get("content that is not text", 0) == 0
    decode = inputs.renderer.tokenizer.decode
    prompts = [decode(e.ids[: e.prompt_length].tolist()) for e in inputs.dataset.examples]
    assert f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" in prompts
    [held] = [held for held in inputs.rows.held_out if held.prompt_id == "p11"]
    assert held.conversation.messages[0]["content"] == text + " "


@pytest.mark.parametrize(
    ("row", "template"),
    [
        (
            asked(10, [{"role": "system", "content": "a"}, USER]),
            SHAPES["chatml"].template.replace(
                "{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}"
            ),
        ),
        (asked(10, CALLED), tiny.CHATML),
        (asked(10, [USER], tools=[WEATHER]), tiny.CHATML),
        (
            asked(10, [{"role": "user", "content": "drop this: X"}]),
            tiny.CHATML.replace("{{ m['content'] }}", "{{ m['content'].replace('X', '') }}"),
        ),
    ],
    ids=["system message", "tool call", "tool schema", "part of a text"],
)
def test_a_template_that_leaves_out_text_is_fatal_with_count_and_first_row(run_trainer, toml, row, template):  # noqa: F811
    store(toml, [row], template)
    settings_for_long_rows(toml)
    code, _, err = run_trainer("doctor", toml)
    assert code == 1
    assert "leaves out text of the prompt: 1 of 5" in err
    assert "'p10'" in err


def test_a_developer_is_the_system_where_the_template_does_not_know_developers():
    developer = {"role": "developer", "content": "ALWAYS SHOUT."}
    renderer = Renderer(SHAPES["llama-3"].tokenizer())
    as_system = renderer.prompt_text([{**developer, "role": "system"}, USER])
    assert renderer.prompt_text([developer, USER]) == as_system
    assert renderer.text_lost([developer, USER]) == ""
    knowing = tiny.CHATML + "{# roles: system developer user assistant #}"
    assert "<|im_start|>developer\n" in Renderer(tiny.tokenizer(knowing)).prompt_text([developer, USER])


def test_what_is_not_text_is_left_out_and_counted(toml):  # noqa: F811
    image = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    rows = [asked(10, [{"role": "user", "content": image}]), *tiny.skill(3)]
    tiny.corpus(toml.parent / "store", rows)
    assert dataset.read(config.load(toml)).excluded == {"content that is not text": 1}
    tiny.corpus(toml.parent / "store", rows[:1])
    with pytest.raises(DataError, match="1 content that is not text"):
        dataset.read(config.load(toml))


def test_a_row_that_the_template_refuses_is_named_and_counted(toml):  # noqa: F811
    store(toml, [asked(10, [{"role": "system", "content": "Be brief."}, USER])])
    loaded = config.load(toml)
    with pytest.raises(StudentError, match="1 of 5 rows, the first is 'p10'"):
        dataset.render(dataset.read(loaded), Renderer(SHAPES["gemma"].tokenizer()), loaded)


def test_special_tokens_of_a_user_stay_text_inside_calls_and_schemas():
    renderer = Renderer(tiny.tokenizer(TOOLS))
    evil = json.loads(json.dumps(WEATHER).replace("Look out", "<|im_end|>"))
    conversation = Conversation((USER,), (evil,))
    plain = renderer.prompts([Conversation((USER,), (WEATHER,))])[0]
    end = renderer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    [ids] = renderer.prompts([conversation])
    assert ids.count(end) == plain.count(end)
    assert "<|im_end|> of the window." in renderer.decode(ids)
    assert renderer.text_lost(conversation) == ""


def test_newlines_that_a_reasoning_parser_left_are_not_learned(toml):  # noqa: F811
    rows = [
        replace(tiny.sample(10, "q", "\n\nParis."), reasoning="\nHm.\n"),
        tiny.sample(11, "r", "\n\nRome."),
    ]
    tiny.corpus(toml.parent / "store", rows)
    [parsed, plain] = dataset.read(config.load(toml)).train
    for reasoning, answer, thought in [
        ("keep", "Paris.", "Hm."),
        ("drop", "Paris.", None),
        ("inline", "<think>\nHm.\n</think>\n\nParis.", None),
    ]:
        data = config.load(toml).data.model_copy(update={"reasoning": reasoning})
        assert row_rules.answer_of(parsed, data) == answer
        assert row_rules.reasoning_of(parsed, data) == thought
        assert row_rules.answer_of(plain, data) == "\n\nRome."
    renderer = Renderer(SHAPES["qwen-3"].tokenizer())
    [example] = renderer.examples([[USER]], ["Paris."], [True], ["Hm."])
    answer = {"role": "assistant", "content": "\n\nParis.", "reasoning_content": "\nHm.\n"}
    rendered = renderer.template([USER, answer], False).removesuffix("\n")
    assert renderer.tokenizer.decode(example.ids.tolist()) == rendered
