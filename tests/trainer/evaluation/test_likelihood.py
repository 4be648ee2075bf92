"""Test what a model thinks of the teacher's answers, against plain transformers and sums by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trainer.data import dataset
from trainer.data.chat_template import Renderer
from trainer.data.held_out import held_out_examples
from trainer.evaluation import likelihood
from trainer.evaluation.likelihood import BINS, Likelihood
from trainer.model import model


def test_each_answer_has_the_log_probability_and_confidence_of_transformers(learned):
    config, _ = learned
    renderer = Renderer(model.load_tokenizer(config.base))
    examples = held_out_examples(dataset.read(config).held_out, renderer, config)
    student = model.load_trained_student(config, config.out_path / "adapter", torch.device("cpu"))
    nats, confidence, correct = [], [], []
    with torch.no_grad():
        for e in examples:
            ids = torch.from_numpy(e.ids.astype("int64"))
            probs = student(input_ids=ids[None]).logits[0, e.prompt_length - 1 : -1].softmax(dim=-1)
            targets = ids[e.prompt_length :]
            nats.append(-float(probs.gather(1, targets[:, None]).log().sum()))
            confidence.append(float(probs.max(dim=-1).values.sum()))
            correct.append(int((probs.argmax(dim=-1) == targets).sum()))
    measured = likelihood.measure(student, examples, config)
    assert measured is not None
    assert measured.nats.tolist() == pytest.approx(nats, rel=1e-4)
    assert measured.confidence.sum(axis=1).tolist() == pytest.approx(confidence, rel=1e-4)
    assert measured.correct.sum(axis=1).tolist() == correct
    assert measured.counts.sum(axis=1).tolist() == [e.supervised for e in examples]
    assert likelihood.measure(student, (), config) is None


def planted(confidence: float, share_right: float, examples: int = 400) -> Likelihood:
    """Examples of ten tokens with one confidence, of which a share is right."""
    counts, right, sums = (np.zeros((examples, BINS)) for _ in range(3))
    place = int(confidence * BINS)
    counts[:, place], sums[:, place] = 10, 10 * confidence
    right[:, place] = np.random.default_rng(0).binomial(10, share_right, size=examples)
    return Likelihood(np.full(examples, 10 * math.log(4)), counts.sum(axis=1), sums, right, counts)


def test_the_calibration_error_is_the_gap_between_confidence_and_truth():
    overconfident = likelihood.calibration(planted(0.9, 0.6), 500)
    assert overconfident["ece"]["low"] < 0.3 < overconfident["ece"]["high"]
    assert overconfident["ece"]["high"] - overconfident["ece"]["low"] < 0.05
    assert overconfident["bins"] == [
        {"tokens": 4000, "confidence": pytest.approx(0.9), "correct": pytest.approx(0.6, abs=0.02)}
    ]
    calibrated = likelihood.calibration(planted(0.9, 0.9), 500)
    assert calibrated["ece"]["value"] < 0.02


def test_perplexity_and_bits_per_byte_follow_from_the_nats():
    facts = likelihood.summary(planted(0.5, 0.5), [20] * 400, 50)
    assert facts["perplexity"]["value"] == pytest.approx(4.0)
    # Two bits a token, two bytes a token.
    assert facts["bits_per_byte"] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0})
