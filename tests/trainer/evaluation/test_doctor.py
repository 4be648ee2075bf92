"""Check that doctor finds each planted fault by name, and none in a correct corpus."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from tests.trainer import chat_templates, tiny
from tests.trainer.chat_templates import SHAPES
from tests.trainer.command_line import run_trainer, toml  # noqa: F401 - fixtures
from trainer import config
from trainer.data import data_checks
from trainer.data.chat_template import Renderer
from trainer.evaluation import doctor


def change_examples(monkeypatch, change) -> None:
    """Apply `change` to every example that the renderer returns."""
    original = Renderer.examples

    def examples(self, *args):
        return [change(example) for example in original(self, *args)]

    monkeypatch.setattr(Renderer, "examples", examples)


def plant_no_supervised_token(path, monkeypatch):
    count = []

    def every_second(e):
        count.append(1)
        return replace(e, prompt_length=len(e.ids)) if len(count) % 2 else e

    change_examples(monkeypatch, every_second)


def plant_end_never_learned(path, monkeypatch):
    change_examples(monkeypatch, lambda e: replace(e, ids=e.ids[:-1]))


def plant_double_bos(path, monkeypatch):
    template = "{{ bos_token }}{{ bos_token }}" + tiny.CHATML
    tiny.tokenizer(template, bos_token="<s>").save_pretrained(path.parent / "base")


def plant_text_not_verbatim(path, monkeypatch):
    lowercasing = tiny.tokenizer()
    lowercasing.backend_tokenizer.normalizer = normalizers.Lowercase()
    lowercasing.save_pretrained(path.parent / "base")
    tiny.corpus(path.parent / "store", [replace(s, completion="LOUD") for s in tiny.skill(8)])


def plant_cut_answer_taught_as_whole(path, monkeypatch):
    rows = tiny.skill(8)
    tiny.corpus(path.parent / "store", [replace(rows[0], finish_reason="length"), *rows[1:]])


def plant_pad_is_eos_and_masked(path, monkeypatch):
    original = data_checks.collate

    def masking(examples):
        batch = original(examples)
        kept = batch.targets != 2  # as collators do that mask by id
        return replace(batch, targets=torch.where(kept, batch.targets, torch.tensor(-100)))

    monkeypatch.setattr(data_checks, "collate", masking)


def plant_ids_out_of_range(path, monkeypatch):
    file = path.parent / "base" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "vocab_size": 50}))


def plant_leaked_prompt(path, monkeypatch):
    rows = tiny.skill(8, held_out=2)
    sent = rows[8].messages[0]["content"]
    spelt = [{"role": "user", "content": f"  {sent.upper()} "}]
    tiny.corpus(path.parent / "store", [replace(rows[0], messages=spelt), *rows[1:]])


def plant_shifted_border(path, monkeypatch):
    change_examples(monkeypatch, lambda e: replace(e, prompt_length=e.prompt_length - 1))


def plant_control_token_in_answer(path, monkeypatch):
    def parsed(e):
        return replace(e, ids=np.insert(e.ids, e.prompt_length + 1, 1))

    change_examples(monkeypatch, parsed)


def plant_unknown_tokens(path, monkeypatch):
    letters = [*"abcdefghijklmnopqrstuvwxyz :<|_>", "\n"]
    vocabulary = {piece: i for i, piece in enumerate([*tiny.SPECIALS, "<unk>", *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        unk_token="<unk>",
        extra_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = tiny.CHATML
    tiny.base(path.parent / "base", speech=fast)
    tiny.corpus(path.parent / "store", [replace(s, completion="größer") for s in tiny.skill(8)])


def plant_most_rows_too_long(path, monkeypatch):
    rows = tiny.skill(8)
    tiny.corpus(
        path.parent / "store", [replace(s, completion="x" * 300) if i > 2 else s for i, s in enumerate(rows)]
    )


FAULTS = [
    (plant_no_supervised_token, "no supervised token: 20 of 40"),
    (plant_end_never_learned, "end of turn is not learned: 40 of 40"),
    (plant_double_bos, "begins with two BOS tokens: 40 of 40"),
    (plant_text_not_verbatim, "not verbatim: 8 of 8"),
    (plant_cut_answer_taught_as_whole, "learned as complete: 1 of 8"),
    (plant_pad_is_eos_and_masked, "masked by its id): 40 of 40"),
    (plant_ids_out_of_range, "token ids outside the model's 50: 40 of 40"),
    (plant_leaked_prompt, "in another spelling: 1 of 8"),
    (plant_shifted_border, "is not the prompt served: 40 of 40"),
    (plant_control_token_in_answer, "control tokens inside the answer: 40 of 40"),
    (plant_unknown_tokens, "unknown tokens in the answer: 8 of 8"),
    (plant_most_rows_too_long, "too long to learn: 5 of 8"),
]


# The others run with the slow tests: `test_train_refuses_data_with_a_fatal_fault` plants them all.
QUICK_FAULTS = {plant_no_supervised_token, plant_text_not_verbatim, plant_leaked_prompt, plant_shifted_border}


@pytest.mark.parametrize(
    ("plant", "message"),
    [
        pytest.param(
            *fault, id=fault[0].__name__[6:], marks=[] if fault[0] in QUICK_FAULTS else pytest.mark.slow
        )
        for fault in FAULTS
    ],
)
def test_a_planted_fault_is_fatal_by_name(run_trainer, toml, monkeypatch, plant, message):  # noqa: F811
    plant(toml, monkeypatch)
    code, _, err = run_trainer("doctor", toml)
    assert code == 1
    assert message in err


@pytest.mark.parametrize(("plant", "message"), FAULTS, ids=[f.__name__[6:] for f, _ in FAULTS])
def test_train_refuses_data_with_a_fatal_fault(run_trainer, toml, monkeypatch, plant, message):  # noqa: F811
    plant(toml, monkeypatch)
    code, _, err = run_trainer("train", toml)
    assert code == (2 if plant is plant_ids_out_of_range else 1)
    assert plant is plant_ids_out_of_range or message in err
    assert not (toml.parent / "out" / "adapter").exists()


@pytest.mark.slow
def test_forced_faults_are_named_in_both_cards(run_trainer, toml, monkeypatch):  # noqa: F811
    plant_cut_answer_taught_as_whole(toml, monkeypatch)
    message = "learned as complete: 1 of 8"
    code, out, _ = run_trainer("plan", toml, "--probe", "0")
    assert code == 0
    assert message in out
    assert run_trainer("train", toml)[0] == 1
    assert run_trainer("train", toml, "--force-faults")[0] == 0
    merged = toml.parent / "merged"
    assert run_trainer("export", toml, merged)[0] == 0
    for folder in (toml.parent / "out" / "adapter", merged):
        assert message in (folder / "README.md").read_text(encoding="utf-8")


def test_a_correct_corpus_has_no_finding(run_trainer, toml):  # noqa: F811
    code, out, _ = run_trainer("doctor", toml)
    assert code == 0
    assert out.count("⟦") == doctor.SAMPLES_SHOWN
    assert doctor.diagnose(config.load(toml)).findings == ()


@pytest.mark.parametrize("pad", [{"pad_token": "<|im_end|>"}, {"pad_token": None}])
def test_pad_that_equals_eos_is_no_fault_here(toml, pad):  # noqa: F811
    tiny.tokenizer(**pad).save_pretrained(toml.parent / "base")
    assert doctor.diagnose(config.load(toml)).findings == ()


def test_a_cut_answer_learned_without_its_end_is_no_fault(toml):  # noqa: F811
    rows = tiny.skill(8)
    cut = replace(rows[0], finish_reason="length", outcome="truncated")
    tiny.corpus(toml.parent / "store", [cut, *rows[1:]])
    toml.write_text(toml.read_text().replace("[lora]", 'truncated = "unterminated"\n[lora]'))
    assert doctor.diagnose(config.load(toml)).findings == ()


def test_a_corpus_in_which_no_answer_ends_is_fatal(run_trainer, toml):  # noqa: F811
    cut = [replace(s, finish_reason="length", outcome="truncated") for s in tiny.skill(8)]
    tiny.corpus(toml.parent / "store", cut)
    toml.write_text(toml.read_text().replace("[lora]", 'truncated = "unterminated"\n[lora]'))
    code, out, err = run_trainer("doctor", toml)
    assert code == 1
    assert "not learn to stop: 8 of 8" in err
    assert "note: 8 answers cut by the token limit" in out


@pytest.mark.parametrize("reasoning", ["keep", "inline", "drop"])
def test_no_treatment_of_reasoning_is_a_fault(toml, reasoning):  # noqa: F811
    tiny.base(toml.parent / "base", speech=SHAPES["qwen-3"].tokenizer())
    rows = [
        replace(s, reasoning="so\n\n</think> it is " if i % 2 else None) for i, s in enumerate(tiny.skill(8))
    ]
    tiny.corpus(toml.parent / "store", rows)
    toml.write_text(toml.read_text().replace("[lora]", f'reasoning = "{reasoning}"\n[lora]'))
    diagnosis = doctor.diagnose(config.load(toml))
    assert diagnosis.findings == ()
    assert any("4 rows" in line for line in diagnosis.notices) is (reasoning == "drop")


class Tags(HTMLParser):
    """Collect the tags with their attributes, and the text, as a browser would read them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_every_check_and_token_and_runs_nothing(run_trainer, toml):  # noqa: F811
    hostile = '<script>alert(1)</script>"><img src=x onerror=alert(2)>\u202e\x1b[31m'
    rows = tiny.skill(8)
    tiny.corpus(toml.parent / "store", [replace(rows[0], prompt_id=hostile, completion=hostile), *rows[1:]])
    code, out, _ = run_trainer("doctor", toml)
    path = toml.parent / "out" / "doctor.html"
    assert (code, f"page in {path}" in out) == (0, True)
    page = path.read_text(encoding="utf-8")
    parsed = Tags(page)
    names = {tag for tag, _ in parsed.tags}
    assert not names & {"script", "img", "link", "iframe", "object", "form"}
    assert not [a for _, attrs in parsed.tags for a in attrs if a.startswith("on") or a in {"src", "href"}]
    [policy] = [a["content"] for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    assert "\x1b" not in page
    assert "\u202e" not in page
    diagnosis = doctor.diagnose(config.load(toml))
    assert all(check.fault in parsed.text for check in diagnosis.checks)
    spans = [a["class"].split() for tag, a in parsed.tags if tag == "span" and "title" in a]
    shown = [token for sample in diagnosis.shown for token in sample.tokens]
    assert len(spans) == len(shown) == sum(len(s.tokens) for s in diagnosis.shown)
    assert [("s" in c) for c in spans] == [t.supervised for t in shown]
    assert [("c" in c) for c in spans] == [t.control for t in shown]
    assert {"t", "s", "c"} in [set(c) for c in spans]


def test_the_first_row_of_a_fault_comes_first_on_the_page(run_trainer, toml):  # noqa: F811
    rows = tiny.skill(8)
    tiny.corpus(toml.parent / "store", [*rows[:5], replace(rows[5], finish_reason="length"), *rows[6:]])
    code, out, _ = run_trainer("doctor", toml, "--json", "--page", toml.parent / "deep" / "page.html")
    first = json.loads(out)["shown"][0]
    assert (code, first["prompt_id"], first["is_faulty"]) == (1, "p5", True)
    assert "1 fatal fault found" in (toml.parent / "deep" / "page.html").read_text()


@pytest.mark.parametrize("tokenizer", [chat_templates.llama2, chat_templates.spaced])
def test_a_tokenizer_that_drops_a_leading_space_when_decoding_is_no_fault(toml, tokenizer):  # noqa: F811
    tiny.base(toml.parent / "base", speech=tokenizer())
    rows = [replace(s, completion=" two words" if i % 2 else "Paris.") for i, s in enumerate(tiny.skill(8))]
    tiny.corpus(toml.parent / "store", rows)
    assert doctor.diagnose(config.load(toml)).findings == ()
