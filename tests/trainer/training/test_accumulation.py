"""Test that a step of eight packs has the same gradient at once, one by one, or spread over two ranks."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from tests.trainer import teacher_logprobs, tiny

TOKENIZER = tiny.tokenizer()
TEXTS = ["word " * (1 + i % 7) for i in range(24)]
# Every second row has log-probabilities.
ROWS = [
    tiny.sample(
        i,
        f"say {'ab' * (i % 5)}",
        text,
        logprobs=teacher_logprobs.of_text(TOKENIZER, text, seed=i) if i % 2 else None,
    )
    for i, text in enumerate(TEXTS)
]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, fork_server):
    """The step learned in one pack, and a way to learn it otherwise."""
    folder = tmp_path_factory.mktemp("step")
    soft = {"soft_targets": "auto"}
    toml = tiny.train_toml(folder, ROWS, data={"eval_share": 0.0}, train=soft)

    def learn(name: str, **how: int) -> dict[str, torch.Tensor]:
        ended = fork_server("gradients", toml=toml, out=folder / name, **how)
        assert (ended["code"], ended["signal"]) == (0, 0), ended["err"]
        return load_file(folder / name)

    return learn("whole", packs=1), learn


@pytest.mark.slow
@pytest.mark.parametrize(
    "how", [{"packs": 8}, {"packs": 8, "world": 2}, {"packs": 5, "world": 2}], ids=["8x1", "2 ranks", "odd"]
)
def test_one_by_eight_is_eight_by_one_is_two_ranks(whole, how):
    wanted, learn = whole
    result = learn("-".join(map(str, how.values())), **how)
    assert result.keys() == wanted.keys()
    worst = {name: float((result[name] - wanted[name]).abs().max()) for name in wanted}
    assert max(worst.values()) < 1e-6, worst
    assert float(wanted["norm"]) > 0.1
    # what dividing by each pack's own tokens would have made: the rows' lengths differ, so this differs
    assert len({len(row.completion) for row in ROWS}) > 1
