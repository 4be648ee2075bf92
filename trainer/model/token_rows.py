"""Find tokens whose rows of embedding or output layer were never trained, from the base's files.

A base that is no chat model often has rows for control tokens, such as the end of a turn, that are zero or
equal to each other. The student can't learn what such a token means while the rows are frozen. Only the rows
in question and a sample of others are read, not the whole matrix.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from safetensors import safe_open

from trainer.model.weights import tensor_shapes

# Rows that are read to learn how long a trained row is.
SAMPLED_ROWS = 256
# A row with a norm below this share of the sampled rows' median was never trained.
SMALLEST_NORM = 0.05
# Parts of the names that transformers gives to embedding and output layer, without what only looks alike.
_EMBEDDINGS = ("embed_tokens", "word_embeddings", "wte", "embed_in", "tok_embeddings")
_OUTPUTS = ("lm_head", "embed_out", "output")


def untrained_tokens(base: Path, ids: Iterable[int], generated_ids: Iterable[int] = ()) -> list[int]:
    """Return the ids whose row is zero, far shorter than others, or equal to another row.

    Args:
        base: folder of the base.
        ids: tokens that the student reads: their rows of the embedding are looked at.
        generated_ids: tokens that the student has to generate: their rows of the output layer are looked at,
            too, if it is not tied to the embedding.

    Returns:
        In ascending order; empty if no matrix with these rows can be recognised.

    Raises:
        StudentError: a file of the base is damaged.
    """
    shapes = tensor_shapes(base)
    untrained: set[int] = set()
    for names, wanted in ((_EMBEDDINGS, set(ids)), (_OUTPUTS, set(generated_ids))):
        matrix = _matrix_name(shapes, names)
        if matrix and wanted:
            count = shapes[matrix][0]
            untrained |= _untrained_rows(base, matrix, sorted(i for i in wanted if i < count), count)
    return sorted(untrained)


def _matrix_name(shapes: dict[str, tuple[int, ...]], layers: Sequence[str]) -> str:
    """The name of the largest matrix that belongs to one of these layers; "" if there is none."""
    names = [
        name
        for name, shape in shapes.items()
        if len(shape) == 2 and name.endswith(".weight") and name.split(".")[-2:-1][0] in layers
    ]
    return max(names, key=lambda name: shapes[name][0], default="")


def _untrained_rows(base: Path, matrix: str, ids: Sequence[int], count: int) -> set[int]:
    wanted = set(ids)
    sampled = [i for i in range(0, count, max(1, count // SAMPLED_ROWS)) if i not in wanted]
    places = {i: place for place, i in enumerate(sorted([*ids, *sampled]))}
    rows = _read_rows(base, matrix, list(places))
    if rows is None:
        return set()
    norms = rows.norm(dim=1).tolist()
    median = float(torch.tensor([norms[places[i]] for i in sampled] or [0.0]).median())
    contents = [row.tobytes() for row in rows.numpy()]
    copies = Counter(contents)
    return {i for i in ids if norms[places[i]] <= SMALLEST_NORM * median or copies[contents[places[i]]] > 1}


def _read_rows(base: Path, matrix: str, ids: Sequence[int]) -> torch.Tensor | None:
    """Read rows of a matrix as fp32, in the order of `ids`; None if no file of the base has the matrix.

    Args:
        base: folder of the base.
        matrix: name of the tensor.
        ids: in ascending order, at least one. Neighbours are read together.
    """
    for path in sorted(base.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            if matrix not in file.keys():  # noqa: SIM118 - safe_open has no `in`
                continue
            tensor = file.get_slice(matrix)
            starts = [place for place, i in enumerate(ids) if place == 0 or i != ids[place - 1] + 1]
            return torch.cat(
                [
                    tensor[ids[start] : ids[end - 1] + 1].float()
                    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True)
                ]
            )
    return None
