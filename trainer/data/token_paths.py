"""Sum a teacher's probabilities for student tokens that are longer than the teacher's. Loads no torch.

A teacher that writes "4" and then "2" gives a probability for each of them. A student with a token "42" needs
that of the whole. From a position on, the answer is followed token by token: the alternatives to each of its
tokens, after what was written before, are texts that differ from the answer from there on. Each text has a
probability, the product along its tokens, and goes to the first student token of the text as soon as no
longer token can be meant. The texts are disjoint, so the sums are the teacher's own probabilities.

A text's first token is that of the text encoded alone. A tokenizer that merges across its end may begin with
another one, so a sum is an approximation where the student's tokens overlap ("aa" and "ab" in "aab").

What stays open goes to the tail: texts that may still become one of several tokens, since the teacher was
not asked how they go on, and alternatives that were not listed. A token that they might be is listed only if
they are a small part of its probability.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

# Teacher tokens that are followed from one position, at most.
MOST_LEVELS = 24
# Largest share of a token's probability, the open part included, that may be open.
MOST_OPEN = 0.05


class Listing(NamedTuple):
    """The usable alternatives at one of the teacher's tokens.

    Attributes:
        chosen: bytes of the token that the answer has here; None if they are unknown.
        texts: probability by bytes, of tokens that are text, the chosen one included.
        ends: probability that the answer ends here.
        total: sum of all listed probabilities, control tokens and unknown bytes included.
    """

    chosen: bytes | None
    texts: Mapping[bytes, float]
    ends: float
    total: float


class Open(NamedTuple):
    """A text with a probability, of which the first student token isn't known yet.

    Attributes:
        is_unlisted: it goes on with a token that isn't listed, so not as the answer does.
    """

    text: bytes
    probability: float
    is_unlisted: bool = False


class Paths(NamedTuple):
    """Disjoint texts that the teacher could have written from one position on, with their probabilities.

    Attributes:
        target: probability of the answer's own student token, as far as it is certain.
        texts: probability of texts that aren't the answer's, by text.
        ended: probability by text of those after which the answer ends.
        open: what could become one of several tokens.
        total: listed probability at the position itself.
    """

    target: float
    texts: dict[bytes, float]
    ended: dict[bytes, float]
    open: list[Open]
    total: float


def follow(listings: Sequence[Listing | None], target: bytes, ambiguous: Callable[[bytes], bool]) -> Paths:
    """Follow the answer from a position until its student token is certain.

    Args:
        listings: of the position's teacher token and those after it; None: it can't be used.
        target: bytes of the student's token at the position.
        ambiguous: whether a text may become a longer student token.
    """
    paths = Paths(0.0, {}, {}, [], listings[0].total if listings and listings[0] else 0.0)
    reached, text = 1.0, b""
    for level in range(MOST_LEVELS):
        listing = listings[level] if level < len(listings) else None
        if listing is None:
            break
        _add_alternatives(paths, listing, text, reached, ambiguous)
        chosen = listing.chosen
        if chosen is None or chosen not in listing.texts:
            return paths
        reached *= listing.texts[chosen]
        text += chosen
        if len(text) >= len(target) and not ambiguous(text):
            return paths._replace(target=reached)
    if text:
        paths.open.append(Open(text, reached))
    return paths


def _add_alternatives(
    paths: Paths, listing: Listing, before: bytes, reached: float, ambiguous: Callable[[bytes], bool]
) -> None:
    """Add the texts that differ from the answer after `before`, a text of the probability `reached`."""
    if listing.ends:
        _add(paths.ended, before, reached * listing.ends)
    for data, probability in listing.texts.items():
        if data == listing.chosen:
            continue
        if ambiguous(before + data):
            paths.open.append(Open(before + data, reached * probability))
        else:
            _add(paths.texts, before + data, reached * probability)
    if before:
        paths.open.append(Open(before, reached * max(0.0, 1 - listing.total), is_unlisted=True))


def certain_tokens(
    paths: Paths,
    target: int,
    first: Callable[[bytes], int | None],
    data: Sequence[bytes],
    end: int,
) -> dict[int, float]:
    """Return the probability of each student token that is certain enough.

    Args:
        target: the student's token at the position.
        first: the first student token of a text, encoded alone; None if there is none.
        data: bytes of each student token.
        end: the student's end of the turn.
    """
    tokens: dict[int, float] = {}
    if paths.target:
        tokens[target] = paths.target
    for text, probability in paths.texts.items():
        token = first(text)
        if token is not None:
            _add(tokens, token, probability)
    for text, probability in paths.ended.items():
        token = first(text) if text else end
        if token is not None:
            _add(tokens, token, probability)
    doubt = dict.fromkeys(tokens, 0.0)
    for text, probability, is_unlisted in paths.open:
        for token in doubt:
            may_follow = not is_unlisted and token != end and data[token].startswith(text)
            if may_follow or text.startswith(data[token]):
                doubt[token] += probability
    return {
        token: probability
        for token, probability in tokens.items()
        if doubt[token] <= MOST_OPEN * (probability + doubt[token])
    }


Key = TypeVar("Key", bytes, int)


def _add(sums: dict[Key, float], key: Key, value: float) -> None:
    sums[key] = sums.get(key, 0.0) + value
