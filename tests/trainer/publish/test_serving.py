"""Test that serving commands match what was learned: template, stop tokens, rank."""

from __future__ import annotations

import json
import re
import shlex

import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from tests.trainer import chat_templates, go_template, tiny
from tests.trainer.chat_templates import SHAPES
from trainer import config as settings
from trainer.data import published_template
from trainer.data.chat_template import Renderer
from trainer.data.conversation import Conversation
from trainer.errors import StudentError
from trainer.publish import modelfile, serving
from trainer.publish.adapter import write_serving_files

RENDERERS = {name: Renderer(shape.tokenizer()) for name, shape in SHAPES.items()}
SYSTEM = {"role": "system", "content": "Be brief, {{ .System }} says."}
TALKS = [
    [{"role": "user", "content": "what is\n2+2?"}],
    [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "ho, and\n\nmore"},
        {"role": "user", "content": "again"},
    ],
]


def adding_bos(tokenizer, bos):
    """The tokenizer with a post-processor that puts BOS before every text, as Llama's does."""
    tokenizer.bos_token = bos
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", SHAPES)
def test_the_modelfile_renders_what_was_learned(name, adds_bos):
    shape = SHAPES[name]
    renderer = Renderer(adding_bos(shape.tokenizer(), "<s>")) if adds_bos else RENDERERS[name]
    text = modelfile.infer_turn_template(renderer).modelfile(shape.stop)
    [template] = re.findall(r'TEMPLATE """(.*?)"""', text, flags=re.DOTALL)
    assert text.startswith("FROM .\n")
    assert f'PARAMETER stop "{shape.stop}"' in text
    talks = TALKS if name == "gemma" else [*TALKS, *([SYSTEM, *talk] for talk in TALKS)]
    for talk in talks:
        learned = renderer.tokenizer.decode(renderer.prompts([talk])[0])
        bos = "<s>" if learned.startswith("<s>") and adds_bos else ""  # llama.cpp adds it by itself
        assert bos + go_template.render(template, talk) == learned
        assert ("<s>" in template) == (learned.startswith("<s>") and not adds_bos)


def test_a_bos_token_that_begins_each_turn_stays_in_the_modelfile():
    tokenizer = tiny.tokenizer(bos_token="<|im_start|>")
    text = modelfile.infer_turn_template(Renderer(tokenizer)).modelfile("<|im_end|>")
    assert go_template.render(text.split('"""')[1], TALKS[0]).startswith("<|im_start|>user\n")


@pytest.mark.parametrize(
    ("adds_bos", "template", "recorded"),
    [
        (False, "{{ bos_token }}" + tiny.CHATML, False),
        (True, "{{ bos_token }}" + tiny.CHATML, True),
        (True, tiny.CHATML, False),
    ],
)
def test_the_published_tokenizer_states_whether_bos_is_added(tmp_path, adds_bos, template, recorded):
    tokenizer = tiny.tokenizer(template, bos_token="<s>")
    renderer = Renderer(adding_bos(tokenizer, "<s>") if adds_bos else tokenizer)
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(4)))
    write_serving_files(tmp_path, renderer, config)
    written = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert written["add_bos_token"] is recorded
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again("hi")["input_ids"] == tokenizer("hi")["input_ids"]


@pytest.mark.parametrize("name", SHAPES)
def test_the_pinned_template_needs_no_argument_to_say_what_was_learned(name):
    renderer = RENDERERS[name]
    original = renderer.tokenizer.chat_template
    pinned = published_template.pinned_template(renderer, thinking=False)
    assert renderer.tokenizer.chat_template == original
    assert pinned.endswith(original)
    server = SHAPES[name].tokenizer()
    server.chat_template = pinned
    for talk in TALKS:
        for passed in ({}, {"date_string": "29 Nov 2026"}):  # llama.cpp's server passes the date of the day
            served = server.apply_chat_template(talk, add_generation_prompt=True, return_dict=False, **passed)
            assert served == renderer.prompts([talk])[0]
    assert (pinned == original) is (name not in {"llama-3", "qwen-3"})


def test_a_student_that_thinks_is_served_without_the_empty_block():
    renderer = RENDERERS["qwen-3"]
    assert "enable_thinking = false" not in published_template.pinned_template(renderer, thinking=True)
    text = modelfile.infer_turn_template(renderer, thinks=True).modelfile("<|im_end|>")
    assert go_template.render(text.split('"""')[1], TALKS[0]).endswith("<|im_start|>assistant\n")


def test_a_template_that_can_not_be_served_as_learned_is_refused_and_gets_no_modelfile(tmp_path):
    odd = tiny.CHATML.replace("{{ m['content'] }}", "{{ loop.index }}. {{ m['content'] }}")
    assert modelfile.infer_turn_template(Renderer(tiny.tokenizer(odd))) is None
    scaffold = tiny.CHATML.replace(
        "{{ m['content'] }}", "{% if m['role'] == 'assistant' %}SURE: {% endif %}{{ m['content'] }}"
    )
    renderer = Renderer(tiny.tokenizer(scaffold))
    with pytest.raises(StudentError, match="other prompts than were learned"):
        published_template.pinned_template(renderer, thinking=False)
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(4)))
    template, text = published_template.serving_template(config, renderer)
    assert (template, "other prompts" in text) == (scaffold, True)
    assert text in serving.commands(config, renderer).notes
    marks = chat_templates.Shape(tiny.CHATML.replace("<|im_end|>\n", '<|im_end|>"\n'), "", ())
    assert (
        modelfile.infer_turn_template(Renderer(tiny.tokenizer(marks.template))).modelfile("<|im_end|>")
        is None
    )


@pytest.mark.parametrize(
    ("lora", "rank", "why"),
    [
        ({"rank": 4}, "8", ""),
        ({"rank": 16}, "16", ""),
        ({"rank": 33, "rslora": True}, "64", ""),
        ({"rank": 600}, "", "ranks up to 512"),
        ({"dora": True}, "", "DoRA"),
    ],
)
def test_the_vllm_command_has_the_rank_it_needs_or_the_reason_why_not(tmp_path, lora, rank, why):
    config = settings.load(
        tiny.train_toml(tmp_path, tiny.skill(4), lora=lora, out={"path": "o u t", "name": "my student"})
    )
    how = serving.commands(config, RENDERERS["chatml"])
    assert (how.merged, how.ollama, how.stops) == ("", "", ("<|im_end|>",))
    if why:
        assert (how.adapter, why in how.why_merge) == ("", True)
        return
    words = shlex.split(how.adapter)
    assert words[:4] == ["vllm", "serve", str(config.base), "--enable-lora"]
    assert words[words.index("--max-lora-rank") + 1] == rank
    adapter = config.out_path / "adapter"
    assert words[words.index("--lora-modules") + 1] == f"my student={adapter}"
    assert words[words.index("--chat-template") + 1] == str(adapter / "chat_template.jinja")
    assert words[words.index("--generation-config") + 1] == str(adapter)


@pytest.mark.parametrize(
    ("base", "wanted"),
    [
        *(
            ({}, 7),
            ({"eos_token_id": 7}, 7),
            ({"eos_token_id": 2}, [7, 2]),
            ({"eos_token_id": [2, 7]}, [7, 2]),
        ),
        *(({"eos_token_id": none}, 7) for none in (None, [None], -1, [-1], [True], ["2"], {})),
        ({"eos_token_id": [None, 2, -1]}, [7, 2]),
    ],
)
def test_an_answer_ends_at_the_templates_end_of_turn_first(base, wanted):
    assert serving.eos_ids(base, 7) == wanted


def test_a_template_that_writes_the_date_is_learned_and_served_with_a_fixed_one(tmp_path):
    tokenizer = tiny.tokenizer(chat_templates.DATED)
    renderer = Renderer(tokenizer)
    [ids] = renderer.prompts([TALKS[0]])
    assert "Today is 2024-07-26." in tokenizer.decode(ids)
    config = settings.load(tiny.train_toml(tmp_path, tiny.skill(4)))
    write_serving_files(tmp_path, renderer, config)
    server = AutoTokenizer.from_pretrained(tmp_path)
    for talk in TALKS:
        served = server.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        assert served == renderer.prompts([talk])[0]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% set f = '%Y' %}{{ strftime_now(f) }}" + tiny.CHATML, "current time"),
        ("{{ ['a', 'b'] | random }}" + tiny.CHATML, "random"),
    ],
)
def test_a_template_whose_output_can_not_be_fixed_is_refused(template, message):
    with pytest.raises(StudentError, match=message):
        Renderer(tiny.tokenizer(template))


@pytest.mark.parametrize("tools", [(), (published_template.PROBES[-1].tools[0],)], ids=["no tools", "tools"])
@pytest.mark.parametrize("name", [*SHAPES, "tools", "dated"])
def test_learned_ids_begin_with_what_a_server_continues_from(name, tools):
    more = {"tools": chat_templates.TOOLS, "dated": chat_templates.DATED}
    tokenizer = tiny.tokenizer(more[name]) if name in more else SHAPES[name].tokenizer()
    renderer = Renderer(tokenizer)
    for thought in (None, "Hm.") if renderer.chat_shape.reasoning else (None,):
        template = published_template.pinned_template(renderer, thinking=thought is not None)
        talks = TALKS if name == "gemma" else [*TALKS, *([SYSTEM, *talk] for talk in TALKS)]
        for talk in talks:
            [example] = renderer.examples([Conversation(tuple(talk), tools)], ["ok"], [True], [thought])
            served = tokenizer.apply_chat_template(
                talk,
                tools=list(tools) or None,
                chat_template=template,
                add_generation_prompt=True,
                return_dict=False,
            )
            assert example.ids[: example.prompt_length].tolist() == served
