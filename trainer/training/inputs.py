"""Read everything a training learns from: the corpus, rendered to examples, in the order of the steps."""

from __future__ import annotations

from dataclasses import dataclass

from trainer.config import TrainConfig
from trainer.data import dataset
from trainer.data.chat_template import Example, Renderer
from trainer.data.order import Order
from trainer.model import model, weights


@dataclass(frozen=True, slots=True)
class TrainingInputs:
    """Rows of the corpus, the renderer, the rendered examples and their order."""

    rows: dataset.Rows
    renderer: Renderer
    dataset: dataset.Dataset
    order: Order

    def packs(self, step: int) -> list[list[Example]]:
        """Return the examples of each pack of a step (0-based)."""
        return [[self.dataset.examples[number] for number in pack] for pack in self.order.packs(step)]

    @property
    def largest_pack(self) -> list[Example]:
        """The pack with the most tokens: the one that decides how much memory is needed."""
        return [self.dataset.examples[number] for number in self.order.largest()]


def read_inputs(config: TrainConfig, rows: dataset.Rows | None = None) -> TrainingInputs:
    """Read the corpus (unless `rows` has been read already) and render it with the student's template.

    Raises:
        DataError: no corpus, or no row to learn from.
        StudentError: the base's tokenizer or chat template can't be used.
        TermsRefused: a teacher's terms do not permit training.
    """
    rows = rows or dataset.read(config)
    renderer = Renderer(model.load_tokenizer(config.base, config.template))
    rendered = dataset.render(rows, renderer, config, weights.vocabulary_size(config.base))
    return TrainingInputs(rows, renderer, rendered, Order(rendered.lengths, config.train))
