"""Score a trained student on the held-out prompts: its answers, and how sure it is of the right ones.

The answers are those of `trainer evaluate`, by the same functions. That command also lets the base answer
and writes a scorecard and a page of disagreements, which takes longer than the student's own answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality import cache, calibration


@dataclass(frozen=True)
class Trained:
    """A student as `trainer train` has left it, and what it is scored on.

    Attributes:
        config: a `trainer.config.TrainConfig`.
        rows: the `dataset.Rows` of its corpus.
        renderer: a `chat_template.Renderer`.
        model: base and adapter, not merged.
    """

    config: Any
    rows: Any
    renderer: Any
    model: Any

    @classmethod
    def load(cls, config_file: Path) -> Trained:
        """Load the student whose adapter lies in `[out] path` of a train.toml."""
        import torch

        from trainer.config import load
        from trainer.data import dataset
        from trainer.data.chat_template import Renderer
        from trainer.model import model

        config = load(config_file)
        model.set_threads(config.train)
        return cls(
            config,
            dataset.read(config, learns=False),
            Renderer(model.load_tokenizer(config.base)),
            model.load_trained_student(config, config.out_path / "adapter", torch.device("cpu")),
        )

    def write_calibration(self) -> None:
        """Write calibration.json into the output folder."""
        features = calibration.measure(self.model, self.config, self.renderer, self.rows.held_out)
        cache.write_json(self.config.out_path / "calibration.json", features)

    def write_answers(self) -> None:
        """Write answers.jsonl, without the base's answers. Merges the adapter into the model."""
        from trainer.evaluation import evaluate, evaluated_rows

        # As `trainer evaluate` does on the CPU: a merged adapter costs no time per token.
        self.model.merge_adapter()
        held_out = self.rows.held_out
        limit = evaluate.answer_limit(
            self.config,
            self.rows.held_out,
            lambda: evaluated_rows.taught_lengths((), self.rows, self.renderer, self.config),
            self.renderer,
        )
        test = evaluate.HeldOutTest(self.config, self.renderer, held_out, (), limit)
        answers = evaluate.generate_answers(test, self.model)
        texts = [self.renderer.decode(answer.ids) for answer in answers]
        found = [
            {
                "prompt_id": held.prompt_id,
                "task": held.task,
                "split": held.split,
                "reference": held.reference,
                "student": evaluate.judged_text(text, self.renderer, self.config),
                "teacher": held.teacher,
            }
            for held, text in zip(held_out, texts, strict=True)
        ]
        cache.write_lines(self.config.out_path / "answers.jsonl", found)


def score(config_file: Path) -> None:
    """Write calibration.json and answers.jsonl of a trained student."""
    trained = Trained.load(config_file)
    trained.write_calibration()
    trained.write_answers()
