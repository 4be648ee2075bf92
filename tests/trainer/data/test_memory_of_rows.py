"""Test that commands hold no rows of a large corpus: what they allocate is counted for two sizes of one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from benchmarks import copied_corpus
from harvester.store.shards import schema
from harvester.store.shards.parquet_file import open_writer
from harvester.terms.lineage import Lineage
from tests.peak_memory import most_held
from tests.trainer import teacher_logprobs, tiny
from trainer import config as settings
from trainer.data import dataset
from trainer.data.chat_template import Example, Renderer
from trainer.evaluation import audit, evaluate, evaluated_rows, likelihood
from trainer.experiments.taught_store import trainings_of_store
from trainer.experiments.trainings import NO_DISPLAY
from trainer.model import generate, model
from trainer.training.inputs import read_inputs

# Rows of the shard that is copied, and copies in the smaller and in the larger corpus.
SHARD, FEW, MANY = 64, 2, 16
# Times the bytes of the smaller corpus that may be held of the larger one, which has eight times its rows.
MOST = 2.0


def copied(folder: Path, copies: int) -> settings.TrainConfig:
    """A corpus of copies of a shard with log-probabilities, and the parts of its token store."""
    rows = folder / "rows"
    rows.mkdir(parents=True)
    skill = teacher_logprobs.skill(SHARD - 16, held_out=16, k=2)
    named = [
        replace(row, key=copied_corpus.key_of(n), prompt_id=copied_corpus.prompt_id_of(n))
        for n, row in enumerate(skill)
    ]
    lineage = Lineage(tiny.lineage())
    with (rows / "part-00000001-0.parquet").open("wb") as sink, open_writer(sink, [lineage]) as writer:
        writer.write_table(schema.to_table(named).cast(writer.schema))
    copied_corpus.copy_shards(rows, SHARD * copies, SHARD, lineage)
    toml = tiny.train_toml(folder, [], data={"corpus": "rows"}, train={"soft_targets": "auto"})
    copied_corpus.copy_parts(toml, SHARD, lambda _: None)
    return settings.load(toml)


def made_up_answers(
    _model: object, prompts: Sequence[Sequence[int]], _limits: generate.Limits, **_: object
) -> list[generate.Answer]:
    """Answers of another text to each prompt."""
    return [generate.Answer(tuple(prompt[-3:]), is_cut=False) for prompt in prompts]


def made_up_likelihood(_model: object, examples: Sequence[Example], _config: object) -> likelihood.Likelihood:
    """A likelihood of each example."""
    tokens = np.array([example.supervised for example in examples], dtype=np.float64)
    binned = np.repeat(tokens[:, None], likelihood.BINS, axis=1)
    return likelihood.Likelihood(tokens / 2, tokens, binned / 2, binned, binned)


@pytest.mark.slow
def test_what_is_held_hardly_grows_with_the_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "STORED_ROWS", 0)
    monkeypatch.setattr("trainer.data.tokens.row_ranges.SIGNAL_PART_ROWS", SHARD)
    monkeypatch.setattr(audit.model, "load_base_of", lambda *_: None)
    losses = lambda _model, examples, _config: np.arange(len(examples)) / 7  # noqa: E731
    monkeypatch.setattr(audit.likelihood, "losses", losses)
    monkeypatch.setattr(audit, "spread", lambda rows, _: [rows[0], rows[-1]])  # at most 50,000 prompts
    few, many = (copied(tmp_path / str(copies), copies) for copies in (FEW, MANY))

    def chosen(config: settings.TrainConfig) -> object:
        """Choose rows and map their soft targets, as the first command does."""
        for folder in config.cache.glob("*/selections"):
            shutil.rmtree(folder)
        return read_inputs(config, rehearses=False)

    def opened(config: settings.TrainConfig) -> object:
        return read_inputs(config, rehearses=False)

    def audited(config: settings.TrainConfig) -> object:
        return audit.audit(config, 0)

    def known(config: settings.TrainConfig) -> object:
        """Hash rows and held-out prompts, as the train stage of `trainer distil` does."""
        _, rows = trainings_of_store(config, config.out_path, NO_DISPLAY)
        return rows.sha256()

    def evaluated(config: settings.TrainConfig) -> object:
        """Evaluate made-up answers, with one resample: up to 2,000 prompts, more are drawn of more."""
        renderer = Renderer(model.load_tokenizer(config.base, config.template))
        rows = evaluated_rows.read(config, renderer)
        once = config.model_copy(update={"evaluate": config.evaluate.model_copy(update={"resamples": 1})})
        test = evaluate.HeldOutTest(once, renderer, rows.held_out, rows.targets, 64, answered=rows.answered)
        ignore = lambda _: None  # noqa: E731
        answers = {name: test.answers_of(None, ignore, ignore) for name in ("base", "student")}
        card = evaluate.make_card(test, answers)
        evaluate._write_results(test, card, answers)
        assert card["cut"]["answers"] == len(rows.held_out)
        return card

    monkeypatch.setattr(generate, "generate", made_up_answers)
    monkeypatch.setattr(likelihood, "measure", made_up_likelihood)
    ratios = {}
    for do in (chosen, opened, audited, known, evaluated):
        do(few)  # what is made once in a process
        ratios[do.__name__] = most_held(partial(do, many)) / most_held(partial(do, few))
    assert max(ratios.values()) <= MOST, ratios
    read = partial(dataset.read, learns=False)
    assert most_held(partial(read, many)) / most_held(partial(read, few)) > 2 * MOST, "rows are counted"
