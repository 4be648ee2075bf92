"""Test labels: prompt as served, the teacher's text verbatim, the end of turn learned; on six templates."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer import chat_templates, tiny
from tests.trainer.chat_templates import SHAPES
from trainer.data.chat_template import Renderer
from trainer.data.conversation import as_conversation
from trainer.errors import StudentError

USER = [{"role": "user", "content": "say hi"}]
TURNS = [*USER, {"role": "assistant", "content": "hi"}, {"role": "user", "content": "and now?"}]
SAID = "  two\nlines, ünï 🙂 "
THOUGHT = "\n first this;\n\nthen </that> \n"
RENDERERS = {name: Renderer(shape.tokenizer()) for name, shape in SHAPES.items()}
RENDERER = RENDERERS["chatml"]


def halves(renderer: Renderer, example) -> tuple[str, str]:
    """The prompt's text and the supervised text of an example."""
    decode, border = renderer.tokenizer.decode, example.prompt_length
    return decode(example.ids[:border].tolist()), decode(example.ids[border:].tolist())


@pytest.mark.parametrize("messages", [USER, TURNS], ids=["one turn", "three turns"])
@pytest.mark.parametrize("name", SHAPES)
def test_supervised_is_the_answer_verbatim_and_the_end_of_turn(name, messages):
    renderer, shape = RENDERERS[name], SHAPES[name]
    [example] = renderer.examples([messages], [SAID], [True])
    prompt, learned = halves(renderer, example)
    assert learned == renderer.chat_shape.lead + SAID + shape.stop
    assert example.ids[-1] == renderer.chat_shape.stop_id
    assert renderer.tokenizer.convert_ids_to_tokens(renderer.chat_shape.stop_id) == shape.stop
    assert renderer.prompts([messages])[0] == example.ids[: example.prompt_length].tolist()
    served = renderer.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024", enable_thinking=False
    )
    assert prompt == served  # what a server sends to the model, the empty think block of Qwen 3 included
    assert prompt.count("<s>") == served.count("<s>") <= 1


@pytest.mark.parametrize("name", ["chatml", "llama-3", "qwen-2.5", "qwen-3", "mistral"])
def test_a_system_prompt_is_in_the_prompt(name):
    renderer = RENDERERS[name]
    [example] = renderer.examples([[{"role": "system", "content": "Be brief."}, *USER]], ["hi"], [True])
    prompt, learned = halves(renderer, example)
    assert "Be brief." in prompt
    assert "Be brief." not in learned


def test_a_role_that_the_template_refuses_is_reported():
    with pytest.raises(StudentError, match="System role not supported"):
        RENDERERS["gemma"].prompts([[{"role": "system", "content": "Be brief."}, *USER]])


def test_reasoning_is_kept_where_the_template_has_its_place():
    renderer = RENDERERS["qwen-3"]
    [kept, none] = renderer.examples([USER, USER], [SAID, SAID], [True, True], [THOUGHT, None])
    prompt, learned = halves(renderer, kept)
    assert prompt.endswith("<|im_start|>assistant\n")
    assert (
        learned == f"<think>\n{THOUGHT}\n</think>\n\n{SAID}<|im_end|>"
    )  # teacher's words, to the last blank
    assert renderer.chat_shape.answer_in(learned.removesuffix("<|im_end|>")) == SAID
    think = renderer.tokenizer.convert_tokens_to_ids("<think>")
    assert kept.ids[kept.prompt_length] == think
    # without reasoning the empty block belongs to the prompt: nobody learns to say it
    prompt, learned = halves(renderer, none)
    assert prompt.endswith("<think>\n\n</think>\n\n")
    assert "think" not in learned


@pytest.mark.parametrize("name", sorted(set(SHAPES) - {"qwen-3"}))
def test_reasoning_is_not_kept_where_the_template_would_lose_it(name):
    with pytest.raises(StudentError, match="render reasoning"):
        RENDERERS[name].examples([USER], [SAID], [True], [THOUGHT])


@given(st.text(max_size=30), st.sampled_from(sorted(SHAPES)), st.data())
@settings(max_examples=120, deadline=None)
def test_control_tokens_in_text_stay_text(text, name, data):
    renderer, shape = RENDERERS[name], SHAPES[name]
    token = data.draw(st.sampled_from((*tiny.SPECIALS, *shape.specials, *shape.marks)))
    answer = text + token + text
    [example] = renderer.examples([[{"role": "user", "content": "a " + token}]], [answer], [True])
    tail = len(renderer.chat_shape.end_of_turn)
    body = example.ids[example.prompt_length : len(example.ids) - tail].tolist()
    assert not set(body) & set(renderer.tokenizer.added_tokens_decoder)
    assert renderer.tokenizer.decode(body) == renderer.chat_shape.lead + answer
    # and a user's cannot open a turn: the prompt holds as many as it does with a harmless question
    [plain] = renderer.examples([[{"role": "user", "content": "a b"}]], ["b"], [True])
    number = renderer.tokenizer.convert_tokens_to_ids(token)
    if token not in shape.marks:
        both = [e.ids[: e.prompt_length].tolist().count(number) for e in (example, plain)]
        assert both[0] == both[1]


def test_a_merge_over_the_border_shifts_nothing():
    tokenizer = chat_templates.merging()
    renderer = Renderer(tokenizer)
    [example] = renderer.examples([USER], ["word"], [True])
    prompt, learned = halves(renderer, example)
    assert (prompt[-10:], learned) == ("assistant:", " word</s>")
    rendered = tokenizer.encode(prompt + " word", add_special_tokens=False)
    assert ": w" in tokenizer.convert_ids_to_tokens(rendered)  # what one pass over both would have made
    assert rendered[: example.prompt_length] != example.ids[: example.prompt_length].tolist()
    assert renderer.prompts([USER])[0] == example.ids[: example.prompt_length].tolist()


def test_a_tokenizer_that_puts_a_space_before_a_text_adds_none_to_an_answer():
    tokenizer = chat_templates.spaced()
    renderer = Renderer(tokenizer)
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hi", add_special_tokens=False))[0] == "▁h"
    for message in ("hi", " hi", "who", "\nhi"):
        [example] = renderer.examples([USER], [message], [True])
        text = tokenizer.decode(example.ids.tolist())
        assert text.endswith(f"assistant:{message}</s>")


def test_an_added_token_that_is_plain_text_stays_one_token():
    shape = SHAPES["llama-3"]
    assert "\n\n" in shape.template
    tokenizer = dataclasses.replace(shape, marks=("\n\n",)).tokenizer()
    [example] = Renderer(tokenizer).examples([USER], ["one\n\ntwo"], [True])
    blank = tokenizer.convert_tokens_to_ids("\n\n")
    assert example.ids[example.prompt_length :].tolist().count(blank) == 1


@pytest.mark.parametrize("blank", ["\n\n", "\n", "  "])
@pytest.mark.parametrize("rest", ["<|im_end|>\n", ""], ids=["then its end", "no end of its own"])
def test_an_added_token_of_white_space_ends_no_turn(blank, rest):
    turns = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}" + blank + rest
    template = turns + "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    tokenizer = dataclasses.replace(SHAPES["chatml"], template=template, marks=(blank,)).tokenizer()
    renderer = Renderer(tokenizer)
    stop = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert renderer.chat_shape.stop_id == stop
    [example] = renderer.examples([USER], [f"one{blank}two"], [True])
    learned = example.ids[example.prompt_length :].tolist()
    assert learned.count(stop) == 1  # the answer goes on after its own white space
    assert tokenizer.decode(learned) == f"one{blank}two" + (blank if rest else "") + "<|im_end|>"


@pytest.mark.parametrize(
    "text", ["\ue0f2", "a \ue0f2 b", "\ue0f20\ue0f3", "\ue0f2 <|im_end|> \ue0f3", "\ue0f299\ue0f3<s>\ue0f27"]
)
@pytest.mark.parametrize("name", ["chatml", "llama-3", "qwen-3"])
def test_characters_of_an_icon_font_in_a_prompt_stay_what_they_are(text, name):
    renderer = RENDERERS[name]
    messages = [{"role": "user", "content": text}]
    [ids] = renderer.prompts([messages])
    served = renderer.tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, date_string="26 Jul 2024", enable_thinking=False
    )
    assert renderer.tokenizer.decode(ids) == served
    assert renderer.text_lost(messages) == ""
    assert renderer.has_special_text(as_conversation(messages)) == ("<" in text)


@pytest.mark.parametrize("name", SHAPES)
def test_a_cut_answer_has_no_end_of_turn(name):
    renderer = RENDERERS[name]
    [example] = renderer.examples([USER], ["cut of"], [False])
    assert renderer.chat_shape.stop_id not in example.ids[example.prompt_length :]
    assert not example.terminated


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no') }}", "refuses"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "continue"),
    ],
)
def test_a_template_that_can_not_serve_is_refused(template, message):
    with pytest.raises(StudentError, match=message):
        Renderer(tiny.tokenizer(template))


def test_a_turn_that_never_ends_is_refused():
    tokenizer = tiny.tokenizer("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    tokenizer.eos_token = None
    with pytest.raises(StudentError, match="turn ends"):
        Renderer(tokenizer)


@pytest.mark.parametrize("answer", ["Paris.", " Paris.", "\nParis", "4 o", "ü"])
def test_pieces_of_a_sentencepiece_conversation_are_encoded_as_in_place(answer):
    tokenizer = chat_templates.llama2()
    renderer = Renderer(tokenizer)
    [example] = renderer.examples([USER], [answer], [True])
    rendered = renderer.template([*USER, {"role": "assistant", "content": answer}], False)
    assert example.ids.tolist() == tokenizer.encode(rendered, add_special_tokens=False)
    body = example.ids[example.prompt_length : len(example.ids) - len(renderer.chat_shape.end_of_turn)]
    assert renderer.decode(body.tolist()) == renderer.chat_shape.lead + answer
    assert tokenizer.convert_ids_to_tokens(renderer.chat_shape.end_of_turn) == ["▁", "</s>"]
