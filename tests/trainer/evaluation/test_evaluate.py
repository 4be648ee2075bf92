"""Judging: greedy answers, the loss on what the teacher said, and reasoning that is not judged."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from tests.trainer import tiny
from tests.trainer.chat_templates import SHAPES
from trainer import config as settings
from trainer.data import dataset
from trainer.data.chat_template import Renderer
from trainer.evaluation import evaluate
from trainer.model import model


def test_the_held_out_loss_is_that_of_transformers_forward(learned):
    config, done = learned
    renderer = Renderer(model.load_tokenizer(config.base))
    examples = evaluate.held_out_examples(dataset.read(config).held_out, renderer, config)
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
    told = evaluate.held_out_loss(student, examples, config)
    base = evaluate.held_out_loss(model.load_base(config.base, cpu), examples, config)
    assert told == pytest.approx(mean, rel=1e-5)
    assert told < base - 0.3
    assert told == pytest.approx(done.loss, abs=0.7)  # of the size of the training's, not a thousand times it
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
