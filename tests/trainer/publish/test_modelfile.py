"""Check the Modelfile against Ollama's grammar, and that its parameters leave greedy answers alone."""

from __future__ import annotations

import pytest

from tests.trainer import tiny
from tests.trainer.chat_templates import SHAPES
from trainer.data.chat_template import Renderer
from trainer.publish import modelfile, modelfile_grammar
from trainer.publish.modelfile_grammar import parse

# The examples of Ollama's documentation, and what its parser makes of odd ones.
READ = {
    "FROM llama3.2\n# a comment\nPARAMETER temperature 1\nSYSTEM You are Mario, acting\n": [
        ("from", "llama3.2"),
        ("temperature", "1"),
        ("system", "You are Mario, acting"),
    ],
    'from .\nTemplate """{{ if .System }}<|s|>\n{{ .System }}{{ end }}\n"""\nPARAMETER stop "<|a b|>"': [
        ("from", "."),
        ("template", "{{ if .System }}<|s|>\n{{ .System }}{{ end }}\n"),
        ("stop", "<|a b|>"),
    ],
    "FROM x\nMESSAGE user Is Toronto in Canada?\n\n\nREQUIRES 0.14.0": [
        ("from", "x"),
        ("message", "user: Is Toronto in Canada?"),
        ("requires", "0.14.0"),
    ],
    'FROM x\nSYSTEM "two\nlines"\n': [("from", "x"), ("system", "two\nlines")],
    'FROM x\nTEMPLATE """a"""\nb"""\n': None,  # the value ends with the first line that ends in quotes
    "FROM x\nTEMPLATE a\u200bb\n": [("from", "x"), ("template", "ab")],  # invisible: dropped without a word
    "PARAMETER stop x\n": None,
    "FROM x\nTEMPERATURE 1\n": None,
    "FROM x\nPARAMETER top-k 1\n": None,
    "FROM x\nMESSAGE tool hi\n": None,
    'FROM x\nTEMPLATE """never closed\n': None,
    "FROM x\nSYSTEM": None,
}


@pytest.mark.parametrize(("text", "instructions"), READ.items(), ids=range(len(READ)))
def test_a_modelfile_is_read_as_ollama_reads_it(text, instructions):
    if instructions is None:
        with pytest.raises(ValueError, match="line"):
            parse(text)
    else:
        assert parse(text) == instructions


@pytest.mark.parametrize("name", SHAPES)
def test_the_written_modelfile_says_what_was_meant(name):
    turns = modelfile.infer_turn_template(Renderer(SHAPES[name].tokenizer()))
    parameters = modelfile.ollama_parameters({})
    text = turns.modelfile(SHAPES[name].stop, source="./a b-q8_0.gguf", parameters=parameters)
    read = dict(parse(text))
    assert read.pop("template").count("{{ end }}") >= 2
    assert read == {
        "from": "./a b-q8_0.gguf",
        "stop": SHAPES[name].stop,
        "repeat_penalty": "1",
        "temperature": "0",
    }


def test_a_template_with_a_character_that_ollama_drops_gets_no_modelfile():
    invisible = tiny.CHATML.replace("<|im_end|>\n", "<|im_end|>\u200b\n")
    turns = modelfile.infer_turn_template(Renderer(tiny.tokenizer(invisible)))
    assert turns is not None
    assert turns.modelfile("<|im_end|>") is None


@pytest.mark.parametrize(
    ("generation", "lengths", "parameters"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, {}, {"repeat_penalty": 1, "temperature": 0}),
        (
            {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.05},
            {"context": 8192, "longest": 2048},
            {"repeat_penalty": 1.05, "temperature": 0.6, "top_p": 0.9, "top_k": 20},
        ),
        ({}, {"context": 8192, "longest": 16384}, {"repeat_penalty": 1, "temperature": 0, "num_ctx": 8192}),
        ({}, {"longest": 6000}, {"repeat_penalty": 1, "temperature": 0, "num_ctx": 6000}),
    ],
)
def test_ollama_samples_as_the_generation_config_says(generation, lengths, parameters):
    assert modelfile.ollama_parameters(generation, **lengths) == parameters


def test_the_grammar_refuses_what_has_no_from_line():
    with pytest.raises(ValueError, match="no FROM line"):
        modelfile_grammar.parse("# nothing\n")
