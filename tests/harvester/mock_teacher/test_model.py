"""Test the mock teacher with a local model: sampling, log-probabilities and batches, over real sockets."""

from __future__ import annotations

import json
import math
import os
import queue
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from harvester.errors import ConfigError
from harvester.mock_teacher.__main__ import model_folder
from harvester.mock_teacher.answerers import make_answerer
from harvester.mock_teacher.neural.batch import GeneratedRow
from harvester.mock_teacher.neural.probe import check_batches
from harvester.mock_teacher.neural.sampling import choose
from harvester.mock_teacher.neural.worker import ModelThread
from harvester.mock_teacher.running import start_process
from harvester.mock_teacher.settings import MockSettings
from harvester.store.reader import Corpus
from tests.journey.run_process import harvester, write_folder
from tests.raw_client import once

BASE = Path(__file__).resolve().parents[3] / "data" / "base"
PROMPTS = ["say kfuzab", "mirror ABCD", "hop 123 on 2", "What is 12 + 30?", "tally A of BABA and the rest"]
FIELDS = {"max_tokens": 12, "logprobs": True, "top_logprobs": 5}


@pytest.fixture
def served(mock_teacher):
    return mock_teacher(model_folder=BASE)


def choice_of(served, prompt, **fields):
    return once(served.base_url, prompt, **(FIELDS | fields)).json()["choices"][0]


def values_of(choice):
    return [entry["logprob"] for entry in choice["logprobs"]["content"]]


def test_an_answer_does_not_depend_on_its_batch(served):
    asks = [(prompt, temperature) for prompt in PROMPTS for temperature in (0, 1)] * 4
    alone = [choice_of(served, prompt, temperature=warm, seed=3) for prompt, warm in asks[:10]] * 4
    with ThreadPoolExecutor(len(asks)) as pool:
        together = list(pool.map(lambda ask: choice_of(served, ask[0], temperature=ask[1], seed=3), asks))
    for one, other in zip(alone, together, strict=True):
        assert one["message"] == other["message"]
        assert [e["token"] for e in one["logprobs"]["content"]] == [
            e["token"] for e in other["logprobs"]["content"]
        ]
        assert values_of(one) == pytest.approx(values_of(other), abs=1e-5)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_logprobs_are_those_of_the_models_own_forward_pass(served, temperature):
    tokenizer, model = AutoTokenizer.from_pretrained(BASE), AutoModelForCausalLM.from_pretrained(BASE)
    for prompt in PROMPTS:
        turn = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        choice = choice_of(served, prompt, temperature=temperature, seed=1)
        for entry in choice["logprobs"]["content"]:
            with torch.inference_mode():
                expected = model(torch.tensor([ids])).logits[0, -1].log_softmax(dim=-1)
            [token] = tokenizer(entry["token"])["input_ids"]
            assert entry["logprob"] == pytest.approx(float(expected[token]), abs=1e-4)
            listed = [other["logprob"] for other in entry["top_logprobs"]]
            assert listed == pytest.approx(expected.topk(5).values.tolist(), abs=1e-4)
            assert sum(math.exp(value) for value in listed) <= 1 + 1e-6
            if temperature == 0:
                assert entry["top_logprobs"][0]["token"] == entry["token"]
            ids.append(token)
        text = b"".join(bytes(entry["bytes"]) for entry in choice["logprobs"]["content"])
        assert text.decode() == choice["message"]["content"]


def test_a_seed_repeats_the_samples_and_none_gives_others(served):
    fields = {"temperature": 1.5, "n": 8, "max_tokens": 8}
    first, again = (once(served.base_url, PROMPTS[0], seed=5, **fields).json() for _ in range(2))
    other = once(served.base_url, PROMPTS[0], seed=6, **fields).json()
    loose = [once(served.base_url, PROMPTS[0], **fields).json()["choices"] for _ in range(2)]
    assert first["choices"] == again["choices"]
    assert first["choices"] != other["choices"]
    assert loose[0] != loose[1]
    assert len({choice["message"]["content"] for choice in first["choices"]}) > 1
    assert [choice["index"] for choice in first["choices"]] == list(range(8))
    narrow = once(served.base_url, PROMPTS[0], top_p=0, **fields).json()
    assert len({choice["message"]["content"] for choice in narrow["choices"]}) == 1


def test_max_tokens_stop_usage_and_stream(served):
    whole = once(served.base_url, "say kfuzab", temperature=0).json()
    text = whole["choices"][0]["message"]["content"]
    assert len(text) > 3
    assert whole["choices"][0]["finish_reason"] == "stop"
    assert whole["usage"]["completion_tokens"] == len(text)
    short = once(served.base_url, "say kfuzab", temperature=0, max_tokens=2).json()
    assert short["choices"][0]["finish_reason"] == "length"
    assert short["choices"][0]["message"]["content"] == text[:2]
    stopped = once(served.base_url, "say kfuzab", temperature=0, stop=[text[2:4]]).json()
    assert stopped["choices"][0]["message"]["content"] == text[:2]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    events = once(
        served.base_url, "say kfuzab", temperature=0, stream=True, logprobs=True, top_logprobs=2
    ).events()
    deltas = [event["choices"][0]["delta"].get("content", "") for event in events[:-1]]
    assert "".join(deltas) == text


def test_a_fault_and_a_context_limit_still_apply(mock_teacher):
    served = mock_teacher(model_folder=BASE, faults=[{"action": "status", "status": 503, "nth": 1}])
    assert once(served.base_url, "say ab").status == 503
    assert once(served.base_url, "say ab").status == 200
    assert sum(served.fired().values()) == 1
    assert served.totals()["requests"] == 1
    assert once(served.base_url, "a" * 600).json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.slow
def test_a_server_process_with_a_model_ends_in_good_order():
    with start_process("--model", str(BASE)) as served:
        fields = {"model": "base", "n": 16, "temperature": 1.0, "max_tokens": 40}
        assert len(once(served.base_url, "say kfuzab", **fields).json()["choices"]) == 16
        os.kill(served.pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(served.pid, 0)[1]) == 0


def test_an_error_of_the_model_fails_its_request_only():
    class Broken:
        def __call__(self, **_):
            raise RuntimeError("out of memory")

    thread, errors = ModelThread(Broken()), queue.SimpleQueue()
    for _ in range(2):
        row = GeneratedRow([1, 2], 0.0, 1.0, b"", False, lambda _: True, lambda _: None, errors.put)
        thread.put(row)
        assert "out of memory" in str(errors.get(timeout=240))
    thread.close()


def test_a_harvest_stores_the_models_answers_and_log_probabilities(mock_teacher, tmp_path):
    served = mock_teacher(model_folder=BASE, faults=[{"action": "status", "status": 503, "nth": 2}])
    path = write_folder(tmp_path, served.base_url, 0, more="top_logprobs = 3")
    rows = [{"id": str(at), "prompt": prompt} for at, prompt in enumerate(PROMPTS)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = harvester("run", path)
    assert ended.returncode == 0, ended.stderr
    assert served.fired()
    samples = {sample.prompt_id: sample for sample in Corpus.open(tmp_path / "store").samples()}
    assert len(samples) == len(PROMPTS)
    for at, prompt in enumerate(PROMPTS):
        sample = samples[str(at)]
        choice = choice_of(served, prompt, temperature=0, max_tokens=None, top_logprobs=3)
        assert sample.completion == choice["message"]["content"]
        assert [entry["bytes"] for entry in sample.logprobs] == [
            bytes(entry["bytes"]) for entry in choice["logprobs"]["content"]
        ]
        stored = [entry["logprob"] for entry in sample.logprobs]
        assert stored == pytest.approx(values_of(choice), rel=1e-3, abs=1e-5)  # float16


def test_a_model_whose_answers_depend_on_padding_is_refused(tmp_path):
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=300, hidden_size=16, num_hidden_layers=1, state_size=4)
    MambaForCausalLM(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="can't generate with a cache of keys and values"):
        make_answerer(MockSettings(model_folder=tmp_path))
    model = AutoModelForCausalLM.from_pretrained(BASE)

    class Unmasked:
        """A model that reads its padding."""

        get_input_embeddings = model.get_input_embeddings

        def __call__(self, **arguments):
            return model(**{name: value for name, value in arguments.items() if name != "attention_mask"})

    check_batches(model, BASE)
    with pytest.raises(ConfigError, match="depend on the padding"):
        check_batches(Unmasked(), BASE)


def test_a_folder_without_a_model_and_a_missing_extra_are_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="can't load the model"):
        make_answerer(MockSettings(model_folder=tmp_path))
    with pytest.raises(ConfigError, match="no such folder"):
        model_folder("./missing")
    assert model_folder("org/name") is None

    def missing(name):
        raise ModuleNotFoundError("no torch", name="torch")

    monkeypatch.setattr("harvester.mock_teacher.answerers.importlib.import_module", missing)
    with pytest.raises(ConfigError, match=r"package torch"):
        make_answerer(MockSettings(model_folder=BASE))


def test_sampling_follows_the_distribution_within_top_p():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().repeat(1000, 1)
    draws = [(at + 0.5) / 1000 for at in range(1000)]
    counts = choose(logits, [1.0] * 1000, [1.0] * 1000, draws).bincount(minlength=3)
    assert counts.tolist() == pytest.approx([500, 300, 200], abs=1)
    counts = choose(logits, [1.0] * 1000, [0.6] * 1000, draws).bincount(minlength=3)
    assert counts.tolist() == pytest.approx([625, 375, 0], abs=1)
