"""Labels: the prompt as served, the teacher's text verbatim, the end of turn learned."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer import tiny
from trainer.errors import StudentError
from trainer.render import Renderer

LLAMA3 = (
    "{{ '<s>' }}{% for m in messages %}[{{ m['role'] }}]\n\n{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]\n\n{% endif %}"
)
MISTRAL = (
    "{{ '<s>' }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ '<s>' }}{% for m in messages %}<start>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>model\n{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SHAPES = {
    "chatml": (tiny.CHATML, "<|im_end|>"),
    "llama-3": (LLAMA3, "<|eot_id|>"),
    "mistral": (MISTRAL, "</s>"),
    "gemma": (GEMMA, "<end_of_turn>"),
    "qwen-3": (QWEN3, "<|im_end|>"),
}
USER = [{"role": "user", "content": "say hi"}]


@pytest.mark.parametrize("name", SHAPES)
def test_supervised_is_the_answer_and_the_end_of_turn(name):
    template, stop = SHAPES[name]
    tokenizer = tiny.tokenizer(template, bos_token="<s>")
    renderer = Renderer(tokenizer)
    [example] = renderer.examples([USER], ["  two\nlines "], [True])
    learned = tokenizer.decode(example.ids[example.prompt_length :].tolist())
    prompt = tokenizer.decode(example.ids[: example.prompt_length].tolist())
    assert learned == renderer.shape.lead + "  two\nlines " + stop
    assert prompt.startswith(tokenizer.apply_chat_template(USER, tokenize=False, add_generation_prompt=True))
    assert example.ids[-1] == renderer.shape.stop_id == tokenizer.convert_tokens_to_ids(stop)
    assert prompt.count("<s>") <= 1
    assert renderer.prompts([USER])[0] == example.ids[: example.prompt_length].tolist()


def test_a_think_block_of_the_template_is_prompt_not_label():
    renderer = Renderer(tiny.tokenizer(QWEN3))
    [example] = renderer.examples([USER], ["hi"], [True])
    decode = renderer.tokenizer.decode
    assert decode(example.ids[: example.prompt_length].tolist()).endswith("<think>\n\n</think>\n\n")
    assert "think" not in decode(example.ids[example.prompt_length :].tolist())


@given(st.text(min_size=1, max_size=40), st.sampled_from(tiny.SPECIALS))
@settings(max_examples=60, deadline=None)
def test_control_tokens_in_text_stay_text(text, special):
    renderer = RENDERER
    answer = text + special + text
    [example] = renderer.examples([[{"role": "user", "content": answer}]], [answer], [True])
    stops = [i for i in example.ids[example.prompt_length :].tolist() if i == renderer.shape.stop_id]
    assert len(stops) == 1  # only the template's own
    learned = example.ids[example.prompt_length : -1].tolist()
    assert renderer.tokenizer.decode(learned) == answer
    prompt = example.ids[: example.prompt_length].tolist()
    assert prompt.count(renderer.tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert renderer.tokenizer.decode(prompt).count(special) >= 1


RENDERER = Renderer(tiny.tokenizer())


def test_the_border_is_where_the_prompt_ends_whatever_follows():
    for answer in ("word", " word", "\nword", "word the word"):
        [example] = RENDERER.examples([USER], [answer], [True])
        assert example.ids[: example.prompt_length].tolist() == RENDERER.prompts([USER])[0]


def test_a_cut_answer_has_no_end_of_turn():
    [example] = RENDERER.examples([USER], ["cut of"], [False])
    assert example.ids[-1] != RENDERER.shape.stop_id
    assert not example.terminated


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "no chat template"),
        ("{{ raise_exception('no') }}", "refuses"),
        ("{% for m in messages %}{{ m['role'] }}{% endfor %}", "continue"),
    ],
)
def test_a_template_that_can_not_serve_is_refused(template, said):
    with pytest.raises(StudentError, match=said):
        Renderer(tiny.tokenizer(template))
