"""Test that the mock teacher with a model scores given texts in four ways, over real sockets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from harvester.errors import ConfigError
from harvester.mock_teacher.__main__ import score_forms
from tests.raw_client import Caller, body_of

SKILLS = Path(__file__).resolve().parents[3] / "data" / "skills"
TEACHER = SKILLS / "mock-teacher"
TEXT = "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\nüé 42<|im_end|>"


@pytest.fixture(scope="module")
def model():
    return AutoTokenizer.from_pretrained(TEACHER), AutoModelForCausalLM.from_pretrained(
        TEACHER, dtype=torch.float32
    ).eval()


def expected_of(model, text):
    """Return the ids of a text, and the log-probability of each but the first by the model's own forward."""
    tokenizer, network = model
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.inference_mode():
        every = network(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
    return ids, every[:-1].gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).tolist()


def ask(served, path, **fields):
    with Caller(served.base_url.removesuffix("/v1"), "") as line:
        return line.send({"model": "mock-teacher", "max_tokens": 1, **fields}, path)


def test_the_tokens_of_a_text_have_the_models_own_log_probabilities(mock_teacher, model):
    served = mock_teacher(model_folder=TEACHER)
    ids, expected = expected_of(model, TEXT)

    listed = ask(served, "/v1/completions", prompt=TEXT, prompt_logprobs=3).json()["choices"][0]
    rows = listed["prompt_logprobs"]
    assert rows[0] is None
    assert [int(next(iter(row))) for row in rows[1:]] == ids[1:]
    values = [next(iter(row.values())) for row in rows[1:]]
    assert [value["logprob"] for value in values] == pytest.approx(expected, abs=1e-4)
    assert all(3 <= len(row) <= 4 for row in rows[1:])
    for row in rows[1:]:
        own, *others = row.values()
        assert (
            own["rank"] == 1 + sum(other["logprob"] > own["logprob"] for other in others) or own["rank"] > 3
        )

    echoed = ask(served, "/v1/completions", prompt=TEXT, echo=True, logprobs=1).json()["choices"][0]
    lists = echoed["logprobs"]
    assert len(lists["tokens"]) == len(ids) + 1
    # Each byte of a character outside ASCII is a token of its own here, and servers send it as U+FFFD.
    assert "".join(lists["tokens"][: len(ids)]) == TEXT.replace("ü", "��").replace("é", "��")
    assert echoed["text"].startswith(TEXT)
    assert lists["token_logprobs"][0] is None
    assert lists["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-4)

    sampling = {"max_new_tokens": 1, "temperature": 0}
    native = ask(
        served, "/generate", text=TEXT, return_logprob=True, logprob_start_len=0, sampling_params=sampling
    ).json()
    triples = native["meta_info"]["input_token_logprobs"]
    assert [number for _, number, _ in triples] == ids
    assert [value for value, _, _ in triples[1:]] == pytest.approx(expected, abs=1e-4)


def test_a_chat_is_scored_in_the_models_own_template(mock_teacher, model):
    served = mock_teacher(model_folder=TEACHER)
    turns = [{"role": "user", "content": "What is 12 + 30?"}, {"role": "assistant", "content": "42"}]
    for fields in ({"add_generation_prompt": False}, {"continue_final_message": True}):
        flags = {"add_generation_prompt": False, "continue_final_message": False} | fields
        text = model[0].apply_chat_template(turns, tokenize=False, **flags)
        ids, expected = expected_of(model, text)
        body = {"messages": turns, "prompt_logprobs": 0, **flags}
        rows = ask(served, "/v1/chat/completions", **body).json()["prompt_logprobs"]
        assert [int(token) for row in rows[1:] for token in row] == ids[1:]
        assert [v["logprob"] for row in rows[1:] for v in row.values()] == pytest.approx(expected, abs=1e-4)


def test_texts_of_different_length_are_scored_as_alone(mock_teacher, model):
    from concurrent.futures import ThreadPoolExecutor

    served = mock_teacher(model_folder=TEACHER)
    texts = [TEXT[: 10 + 4 * number] for number in range(14)]
    with ThreadPoolExecutor(len(texts)) as pool:
        replies = list(
            pool.map(lambda text: ask(served, "/v1/completions", prompt=text, prompt_logprobs=0), texts)
        )
    for text, reply in zip(texts, replies, strict=True):
        rows = reply.json()["choices"][0]["prompt_logprobs"]
        values = [value["logprob"] for row in rows[1:] for value in row.values()]
        assert values == pytest.approx(expected_of(model, text)[1], abs=1e-4)


def test_ways_that_are_left_out_are_ignored_or_not_found(mock_teacher):
    served = mock_teacher(model_folder=TEACHER, scores=())
    silent = ask(served, "/v1/completions", prompt=TEXT, prompt_logprobs=1, echo=True, logprobs=1).json()
    assert "prompt_logprobs" not in silent["choices"][0]
    assert len(silent["choices"][0]["logprobs"]["tokens"]) <= 1
    assert (
        "prompt_logprobs"
        not in ask(served, "/v1/chat/completions", **body_of("2 + 2"), prompt_logprobs=1).json()
    )
    assert ask(served, "/generate", text=TEXT, return_logprob=True).status == 404
    rules = mock_teacher()
    assert ask(rules, "/v1/completions", prompt=TEXT, echo=True, logprobs=1).status == 404


def test_requests_for_scores_are_checked_and_charged(mock_teacher):
    served = mock_teacher(model_folder=TEACHER)
    assert ask(served, "/v1/completions", prompt="").status == 400
    assert ask(served, "/v1/completions", prompt="ab", prompt_logprobs=21).status == 400
    reply = ask(served, "/v1/completions", prompt="abc", echo=True, logprobs=1, max_tokens=0)
    assert reply.json()["usage"]["prompt_tokens"] == 3
    assert len(served.ledger()["entries"]) == 1


def test_the_list_of_ways_is_checked():
    assert score_forms("echo, chat") == ("echo", "chat")
    assert score_forms("none") == ()
    with pytest.raises(ConfigError, match="unknown way"):
        score_forms("ehco")
