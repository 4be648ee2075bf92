"""Check the evaluation: greedy answers, the loss on the teacher's answers, and what the scorecard counts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import GenerationConfig, LlamaForCausalLM

from tests.trainer import tiny
from tests.trainer.chat_templates import SHAPES
from tests.trainer.command_line import lines, run_trainer  # noqa: F401 - a fixture
from trainer import config as settings
from trainer.data import dataset
from trainer.data.chat_template import Renderer
from trainer.data.held_out import held_out_examples
from trainer.evaluation import evaluate, speed
from trainer.model import generate, model, self_test, weights
from trainer.publish.adapter import recorded_base_sha256


def test_the_held_out_loss_is_that_of_transformers_forward(learned):
    config, done = learned
    renderer = Renderer(model.load_tokenizer(config.base))
    examples = held_out_examples(dataset.read(config).held_out, renderer, config)
    assert len(examples) == 10
    cpu = torch.device("cpu")
    student = model.load_trained_student(config, config.out_path / "adapter", cpu)
    summed = 0.0
    with torch.no_grad():
        for e in examples:
            ids = torch.from_numpy(e.ids.astype("int64"))
            logits = student(input_ids=ids[None]).logits[0, e.prompt_length - 1 : -1]
            summed += float(functional.cross_entropy(logits, ids[e.prompt_length :], reduction="sum"))
    mean = summed / sum(e.supervised for e in examples)
    loss = evaluate.held_out_loss(student, examples, config)
    base_loss = evaluate.held_out_loss(model.load_base(config.base, cpu), examples, config)
    assert loss == pytest.approx(mean, rel=1e-5)
    assert loss < base_loss - 0.3
    assert loss == pytest.approx(done.loss, abs=0.7)  # of the size of the training loss
    assert evaluate.held_out_loss(student, (), config) is None


@pytest.mark.parametrize("reasoning", ["drop", "inline", "keep"])
def test_reasoning_is_learned_by_choice_and_never_judged(tmp_path, reasoning):
    rows = [tiny.sample(i, f"q{i}", f"answer {i}", reasoning=f"because {i}\n\nso ") for i in range(6)]
    path = tiny.train_toml(tmp_path, rows, data={"reasoning": reasoning, "eval_share": 0.0})
    config = settings.load(path)
    renderer = Renderer(SHAPES["qwen-3"].tokenizer())
    data = dataset.render(dataset.read(config), renderer, config)
    first = data.examples[0]
    learned = renderer.tokenizer.decode(first.ids[first.prompt_length :].tolist())
    think = renderer.tokenizer.convert_tokens_to_ids("<think>")
    if reasoning == "drop":
        assert learned == "answer 0<|im_end|>"
    else:
        assert learned == "<think>\nbecause 0\n\nso \n</think>\n\nanswer 0<|im_end|>"
        assert (think in first.ids[first.prompt_length :].tolist()) is (reasoning == "keep")
    assert evaluate.judged_text(learned.removesuffix("<|im_end|>"), renderer, config) == "answer 0"


@pytest.fixture
def trained(learned, tmp_path) -> Path:
    """train.toml of a copy of the finished training, which a test may change."""
    config, _ = learned
    shutil.copytree(config.root, tmp_path / "copy")
    return tmp_path / "copy" / "train.toml"


WHO = ("base", "student")


def set_evaluate(toml: Path, line: str) -> None:
    toml.write_text(f"{toml.read_text()}[evaluate]\n{line}\n")


def scored(run_trainer, toml: Path) -> dict[str, object]:  # noqa: F811
    code, out, err = run_trainer("evaluate", toml, "--json")
    assert code == 0, err
    return json.loads(out.splitlines()[-1])


def test_without_references_losses_and_answers_are_reported_all_the_same(run_trainer, trained):  # noqa: F811
    rows = [replace(row, reference=None) for row in tiny.skill(40, held_out=10)]
    tiny.corpus(trained.parent / "store", rows)
    code, _, err = run_trainer("evaluate", trained)
    assert code == 0
    assert "loss on the teacher's answers" in err
    card = json.loads((trained.parent / "out" / "scorecard.json").read_text())
    assert 0 < card["loss"]["student"] < card["loss"]["base"]
    assert (card["tasks"], card["recovery"], card["without_reference"]) == ({}, None, 10)
    assert card["agreement"]["prompts"] == 10
    assert card["agreement"]["metrics"]["token_f1"]["student_minus_base"]["low"] is not None
    assert card["references"]["metrics"] == {}
    answers = lines(trained.parent / "out" / "answers.jsonl")
    assert len(answers) == 10
    assert all(isinstance(row[name], str) for row in answers for name in ("base", "student", "teacher"))


def test_prompts_without_a_reference_are_answered_next_to_the_judged_ones(run_trainer, trained):  # noqa: F811
    rows = tiny.skill(40, held_out=10)
    tiny.corpus(trained.parent / "store", [*rows[:44], *(replace(r, reference=None) for r in rows[44:])])
    card = scored(run_trainer, trained)
    assert (card["prompts"], card["without_reference"]) == (4, 6)
    assert len(lines(trained.parent / "out" / "answers.jsonl")) == 10


def test_any_text_is_scored_next_to_the_teacher_and_its_repeat(run_trainer, trained):  # noqa: F811
    rows = tiny.skill(40, held_out=10)
    sentences = [
        replace(r, completion=f"It is {r.reference}.", tags=["a" if n % 2 else "b"])
        for n, r in enumerate(rows[40:])
    ]
    second = [
        replace(
            r, key=f"{1000 + n:064x}", sample_index=1, completion=r.completion if n < 8 else "I can't answer"
        )
        for n, r in enumerate(sentences)
    ]
    tiny.corpus(trained.parent / "store", [*rows[:40], *sentences, *second])
    code, out, err = run_trainer("evaluate", trained, "--json")
    assert code == 0
    card = json.loads(out)
    # A teacher that answers in sentences is judged by what they contain, and so is the student.
    assert card["judged_by"] == {"reverse": "contains"}
    assert card["macro"]["teacher"]["accuracy"] == 1.0
    assert card["recovery"] == card["macro"]["student"]["accuracy"]
    metrics = card["references"]["metrics"]
    assert metrics["exact"]["teacher"]["value"] == 0.0
    assert metrics["contains"]["teacher"]["value"] == 1.0
    assert metrics["contains"]["repeat"]["value"] == 0.8
    assert 0 < metrics["chrf"]["teacher"]["value"] < 1
    assert set(metrics["rouge_l"]) == {
        *("base", "student", "teacher", "repeat", "student_minus_base", "student_minus_teacher")
    }
    assert card["agreement"]["metrics"]["exact"]["repeat"]["value"] == 0.8
    assert "teacher" not in card["agreement"]["metrics"]["exact"]
    assert card["ceiling"]["repeat"]["accuracy"] == card["ceiling"]["recovery"] == 0.8
    assert set(card["tags"]) == set(card["references"]["tags"]) == {"a", "b"}
    assert card["tags"]["a"]["prompts"] == 5
    pair = card["paired"]["student_vs_teacher"]
    assert pair["only_first"] == 0
    assert pair["only_second"] + pair["both"] == 10
    assert card["behaviour"]["repeat"]["refusals"]["value"] == 0.2
    assert card["behaviour"]["teacher"]["length_ratio"]["value"] == 1
    assert card["behaviour"]["base"]["length_ratio"]["value"] == pytest.approx(64 / 11)  # cut at 64 tokens
    assert card["behaviour"]["base"]["cut"]["value"] == 1
    bits = card["likelihood"]
    assert bits["student"]["nats_per_token"]["value"] == card["loss"]["student"]
    assert bits["bytes"] == sum(len(r.completion) for r in sentences)
    assert bits["student_minus_base"]["bits_per_byte"]["value"] == pytest.approx(
        bits["student"]["bits_per_byte"]["value"] - bits["base"]["bits_per_byte"]["value"]
    )
    tags = bits["tags"]
    assert {name: group["answers"] for name, group in tags.items()} == {"a": 5, "b": 5}
    sizes = [sum(len(r.completion) for r in sentences if tag in r.tags) for tag in tags]
    # Bits of all answers are those of both tags, which share the prompts.
    assert bits["base"]["bits_per_byte"]["value"] == pytest.approx(
        sum(tags[tag]["base"]["bits_per_byte"]["value"] * n for tag, n in zip(tags, sizes, strict=True))
        / bits["bytes"]
    )
    assert bits["tasks"]["reverse"]["student"]["perplexity"] == bits["student"]["perplexity"]
    assert bits["tasks"]["reverse"]["student"]["ece"] == card["calibration"]["student"]["ece"]
    assert 0 <= card["calibration"]["student"]["ece"]["value"] <= 1
    assert card["missing_packages"] == []
    assert "judged by what the answer contains" in err
    assert "bits per byte" in err
    assert "the student writes" in err
    page = (trained.parent / "out" / "disagreements.html").read_text()
    assert "similarity" in page


def test_the_students_cost_is_measured_next_to_the_teachers(run_trainer, trained):  # noqa: F811
    set_evaluate(trained, "machine_usd_per_hour = 3.6\nspeed_prompts = 3")
    rows = tiny.skill(40, held_out=10)
    priced = [replace(r, latency_s=2.0, output_tokens=8, cost_microusd=500) for r in rows]
    # Of another teacher in the same store.
    dear = [
        replace(r, key=f"{900 + n:064x}", latency_s=9.0, output_tokens=9, cost_microusd=9000, tags=("other",))
        for n, r in enumerate(rows)
    ]
    tiny.corpus(trained.parent / "store", [*priced, *dear])
    text = trained.read_text()
    trained.write_text(text.replace("[data]", '[data]\nwhere = {not = {tags = "other"}}'))
    speed = scored(run_trainer, trained)["speed"]
    student, teacher = speed["student"], speed["teacher"]
    assert (teacher["answers"], teacher["answer_s"]["value"], teacher["tokens_per_s"]["value"]) == (10, 2, 4)
    assert teacher["usd_per_1000_answers"] == pytest.approx({"value": 0.5, "low": 0.5, "high": 0.5})
    assert student["answers_timed"] == 3
    assert 0 < student["first_token_s"]["value"] <= student["answer_s"]["value"]
    assert (
        student["tokens_per_s"]["low"] <= student["tokens_per_s"]["value"] <= student["tokens_per_s"]["high"]
    )
    # 3.6 dollars an hour are a tenth of a cent a second.
    assert student["usd_per_1000_answers"] == pytest.approx(student["answer_s_in_batches"])
    assert speed["cost_ratio"] == pytest.approx(student["usd_per_1000_answers"] / 0.5)
    base = sum(t.numel() for t in load_file(trained.parent / "base" / "model.safetensors").values())
    assert student["parameters"] == base
    assert student["weight_bytes"] == 4 * base
    files = [
        *(trained.parent / "base").glob("*.safetensors"),
        *(trained.parent / "out/adapter").glob("*.saf*"),
    ]
    assert student["disk_bytes"] == sum(file.stat().st_size for file in files)


def test_a_teachers_answer_costs_what_its_truncated_ones_cost_too(tmp_path):
    rows = [replace(row, cost_microusd=100) for row in tiny.skill(4, held_out=2)]
    rows[-1] = replace(rows[-1], outcome="truncated", cost_microusd=9000)
    path = tiny.train_toml(tmp_path, rows)
    path.write_text(path.read_text().replace("[data]", '[data]\nwhere = {not = {outcome = "truncated"}}'))
    facts = speed.teacher_facts(settings.load(path), frozenset(row.prompt_id for row in rows[-2:]))
    assert (facts["answers"], facts["usd_per_1000_answers"]["value"]) == (2, pytest.approx(4.55))


def test_the_card_has_the_pass_rates_of_all_the_teachers_answers(run_trainer, trained):  # noqa: F811
    rows = tiny.skill(40, held_out=10)
    further = [
        replace(row, key=f"{1000 * more + n:064x}", sample_index=more, completion=text)
        for n, row in enumerate(rows[40:])
        for more, text in enumerate((f" {row.reference}\n", "no idea", "no idea"), start=1)
    ]
    tiny.corpus(trained.parent / "store", [*rows, *further])
    card = scored(run_trainer, trained)
    facts = card["teacher_pass"]["reverse"]
    assert (facts["prompts"], facts["passed"], facts["failed"], facts["unverifiable"]) == (10, 20, 20, 0)
    assert facts["pass_at"]["1"] == {"value": 0.5, "prompts": 10}
    assert facts["pass_at"]["4"] == {"value": 1.0, "prompts": 10}


def test_all_three_are_judged_by_the_verifier_and_a_check_that_fails_is_counted(run_trainer, trained):  # noqa: F811
    (trained.parent / "checks.py").write_text(
        "def shares_a_letter(answer, reference, metadata):\n"
        "    if reference.endswith(('a', 'b')):\n"
        "        raise ValueError\n"
        "    return bool(set(answer) & set(reference))\n"
    )
    verify = '[verify.reverse]\nkind = "python"\nfunction = "checks:shares_a_letter"\n'
    trained.write_text(trained.read_text() + verify)
    rows = tiny.skill(40, held_out=10)
    bad = [row for row in rows[40:] if row.reference.endswith(("a", "b"))]
    others = [replace(row, completion="zzzz") for row in rows[40:] if row not in bad]
    assert (len(bad), len(others)) == (4, 6)
    tiny.corpus(trained.parent / "store", [*rows[:40], *bad, *others])
    card = scored(run_trainer, trained)
    assert card["unverifiable"] == {"check raised an error": 4}
    assert (card["prompts"], card["without_reference"]) == (6, 0)
    assert card["macro"]["teacher"]["accuracy"] == 0.0


def test_a_corpus_without_held_out_prompts_is_refused(run_trainer, trained):  # noqa: F811
    tiny.corpus(trained.parent / "store", tiny.skill(40))
    trained.write_text(trained.read_text().replace("[lora]", "eval_share = 0.0\n[lora]"))
    code, _, err = run_trainer("evaluate", trained)
    assert code == 2
    assert "no prompt is held out" in err


HOSTILE_GENERATION = {
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 3.0,
    "no_repeat_ngram_size": 1,
    "num_beams": 4,
    "min_new_tokens": 40,
    "min_length": 200,
    "max_length": 3,
    "suppress_tokens": list(range(100, 200)),
    "begin_suppress_tokens": list(range(200, 260)),
    "bad_words_ids": [[105]],
    "forced_bos_token_id": 9,
    "forced_eos_token_id": 9,
    "sequence_bias": [[[110], 50.0]],
    "exponential_decay_length_penalty": [1, 9.0],
    "guidance_scale": 3.0,
    "stop_strings": ["a"],
    "do_sample": True,
    "temperature": 9.0,
    "eos_token_id": list(range(100, 140)),
    "max_time": 0.0001,
    "num_return_sequences": 2,
    "watermarking_config": {"bias": 9.0},
    "prompt_lookup_num_tokens": 3,
    "a_field_of_its_own": 1,
}


def test_no_generation_setting_of_the_base_reaches_greedy_answers(learned):
    config, _ = learned
    student = model.load_trained_student(config, config.out_path / "adapter", torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(20, 280, (6, 12), generator=generator).tolist()
    limits = generate.Limits(stop_id=7, max_new_tokens=12, batch=6, pad_id=0)
    expected = generate.generate(student, prompts, limits)
    assert len({answer.ids for answer in expected}) > 3
    for name, value in HOSTILE_GENERATION.items():
        hostile = GenerationConfig()
        setattr(hostile, name, value)  # the constructor refuses some combinations
        student.get_base_model().generation_config = hostile
        assert generate.generate(student, prompts, limits) == expected, name
        assert student.get_base_model().generation_config is hostile  # the model is given back as it was


def test_the_answers_do_not_change_with_the_generation_config(run_trainer, trained):  # noqa: F811
    scored(run_trainer, trained)
    answers = lines(trained.parent / "out" / "answers.jsonl")
    file = trained.parent / "base" / "generation_config.json"
    hostile = {"repetition_penalty": 5.0, "stop_strings": ["a"], "min_new_tokens": 40, "num_beams": 4}
    file.write_text(json.dumps({**json.loads(file.read_text()), **hostile}))
    scored(run_trainer, trained)
    assert lines(trained.parent / "out" / "answers.jsonl") == answers


def test_answers_end_at_every_token_at_which_a_server_of_the_student_ends_them(run_trainer, trained):  # noqa: F811
    """A base often ends its text with another token than its chat template does."""
    scored(run_trainer, trained)
    before = lines(trained.parent / "out" / "answers.jsonl")
    tokenizer = tiny.tokenizer()
    texts = {who: [tokenizer.encode(row[who], add_special_tokens=False) for row in before] for who in WHO}
    [stop, *_] = [ids[2] for ids in texts["student"] if len(ids) > 4]
    generation = trained.parent / "base" / "generation_config.json"
    generation.write_text(json.dumps({"eos_token_id": stop}))
    card = scored(run_trainer, trained)
    after = lines(trained.parent / "out" / "answers.jsonl")
    shorter = dict.fromkeys(WHO, 0)
    for who in WHO:
        for ids, row, old in zip(texts[who], after, before, strict=True):
            is_stopped = stop in ids
            expected = tokenizer.decode(ids[: ids.index(stop)]) if is_stopped else old[who]
            assert row[who] == expected
            assert row[f"{who}_cut"] == (old[f"{who}_cut"] and not is_stopped)
            shorter[who] += is_stopped
        assert card["cut"][who] == sum(row[f"{who}_cut"] for row in after)
    assert shorter["student"]


def test_answers_cut_by_the_limit_are_counted_apart_and_noted_before(run_trainer, trained):  # noqa: F811
    set_evaluate(trained, "max_new_tokens = 2")
    code, out, err = run_trainer("evaluate", trained, "--json")
    assert code == 0
    assert json.loads(out)["cut"] == {"base": 10, "student": 10, "answers": 10, "max_new_tokens": 2}
    assert "10 of 10 references need more than 2 tokens" in err
    assert err.index("references need more") < err.index("score: ")
    assert "cut at 2 tokens, of 10: base 10, student 10" in err
    answers = lines(trained.parent / "out" / "answers.jsonl")
    assert all(row["student_cut"] and row["base_cut"] for row in answers)


@pytest.mark.slow
def test_the_default_limit_follows_the_taught_answers(run_trainer, trained):  # noqa: F811
    assert scored(run_trainer, trained)["cut"]["max_new_tokens"] == evaluate.MIN_NEW_TOKENS
    long = [replace(row, completion="x" * 80) for row in tiny.skill(40, held_out=10)]
    tiny.corpus(trained.parent / "store", long)
    code, out, err = run_trainer("evaluate", trained, "--json")
    assert code == 0
    assert json.loads(out)["cut"]["max_new_tokens"] == 81  # a token for each letter, and the end of turn
    assert "need more than" not in err


@pytest.mark.slow
def test_when_memory_runs_out_the_batch_is_halved_and_no_answer_changes(
    run_trainer,  # noqa: F811
    trained,
    monkeypatch,
):
    expected = scored(run_trainer, trained)
    answers = lines(trained.parent / "out" / "answers.jsonl")
    plain = LlamaForCausalLM.forward
    sizes = []

    def small_memory(self, input_ids, **rest):
        if len(input_ids) > 3:
            sizes.append(len(input_ids))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(LlamaForCausalLM, "forward", small_memory)
    code, out, err = run_trainer("evaluate", trained, "--json")
    assert code == 0
    assert {**json.loads(out), "speed": None} == {**expected, "speed": None}
    assert lines(trained.parent / "out" / "answers.jsonl") == answers
    assert sizes == [10, 5] * 2  # of base and student
    assert "now 2 prompts are answered together" in err


def test_one_prompt_that_does_not_fit_ends_in_one_message(run_trainer, trained, monkeypatch):  # noqa: F811
    plain = LlamaForCausalLM.forward

    def no_memory(self, input_ids, use_cache=None, **rest):
        if use_cache and input_ids.shape[1] > max(self_test.LENGTHS):  # a prompt, not those of the check
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
        return plain(self, input_ids=input_ids, use_cache=use_cache, **rest)

    monkeypatch.setattr(LlamaForCausalLM, "forward", no_memory)
    code, _, err = run_trainer("evaluate", trained)
    assert code == 1
    assert "max_new_tokens" in err


def test_one_model_is_loaded_and_without_its_adapter_it_is_the_base(run_trainer, trained, monkeypatch):  # noqa: F811
    config = settings.load(trained)
    cpu = torch.device("cpu")
    student = model.load_trained_student(config, config.out_path / "adapter", cpu)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad(), student.disable_adapter():
        assert torch.equal(
            student(input_ids=ids).logits, model.load_base(config.base, cpu)(input_ids=ids).logits
        )
    loads = []
    plain = model.load_base
    monkeypatch.setattr(model, "load_base", lambda *a, **k: loads.append(1) or plain(*a, **k))
    scored(run_trainer, trained)
    assert len(loads) == 1


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_an_adapter_that_was_changed_is_neither_scored_nor_exported(run_trainer, trained, command):  # noqa: F811
    path = trained.parent / "out" / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "init_lora_weights": "pissa"}))
    merged = [trained.parent / "merged"] if command == "export" else []
    code, _, err = run_trainer(command, trained, *merged)
    assert code == 1
    assert "adapter_config.json was changed" in err


def swap_base(toml: Path) -> tuple[str, str]:
    """Change one weight of the base; return its hash before and after."""
    folder = toml.parent / "base"
    before = weights.base_sha256(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * 1.01
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return before, weights.base_sha256(folder)


@pytest.mark.parametrize("command", ["evaluate", "export"])
def test_another_base_than_the_adapters_is_refused_with_both_hashes(run_trainer, trained, command):  # noqa: F811
    before, after = swap_base(trained)
    merged = [trained.parent / "merged"] if command == "export" else []
    code, _, err = run_trainer(command, trained, *merged)
    assert code == 2
    assert before in err
    assert after in err
    assert not (trained.parent / "merged").exists()


@pytest.mark.parametrize("command", ["evaluate", "export"])
@pytest.mark.parametrize(
    ("file", "message"), [("tokenizer_config.json", "tokenizer files"), ("chat_template.jinja", "template")]
)
def test_another_tokenizer_or_template_is_refused(run_trainer, trained, command, file, message):  # noqa: F811
    path = trained.parent / "base" / file
    text = path.read_text()
    path.write_text(text.replace("{{ m['role'] }}", "{{ m['role'] }} ") if "jinja" in file else text + " ")
    assert path.read_text() != text
    merged = [trained.parent / "merged"] if command == "export" else []
    code, _, err = run_trainer(command, trained, *merged)
    assert code == 2
    assert message in err


@pytest.mark.parametrize("command", ["plan", "doctor", "train", "evaluate", "export"])
def test_every_command_refuses_a_base_that_is_not_the_pinned_one(run_trainer, trained, command):  # noqa: F811
    actual = weights.base_sha256(trained.parent / "base")
    trained.write_text(trained.read_text().replace("[data]", f'sha256 = "{"ab" * 32}"\n[data]'))
    more = {"plan": ["--probe", "0"], "export": [trained.parent / "merged"]}.get(command, [])
    code, _, err = run_trainer(command, trained, *more)
    assert code == 2
    assert actual in err
    assert "ab" * 32 in err


def test_the_record_of_the_base_is_found_in_adapters_of_earlier_versions(trained):
    adapter = trained.parent / "out" / "adapter"
    file = adapter / "lineage.json"
    lineage = json.loads(file.read_text())
    recorded = lineage.pop("base_sha256")
    file.write_text(json.dumps(lineage))
    assert recorded_base_sha256(adapter) == recorded == weights.base_sha256(trained.parent / "base")


def test_the_base_is_hashed_once_and_again_when_a_file_changes(trained, monkeypatch):
    folder = trained.parent / "base"
    reads = []
    plain = Path.open
    monkeypatch.setattr(Path, "open", lambda self, *a, **k: reads.append(self.name) or plain(self, *a, **k))
    first = weights.base_sha256(folder)
    assert reads.count("model.safetensors") == 1
    assert weights.base_sha256(folder) == first
    assert reads.count("model.safetensors") == 1
    before, after = swap_base(trained)
    assert (before, after != first) == (first, True)
