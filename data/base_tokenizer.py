"""The base student's tokenizer: one token per instruction word, one per letter or digit of anything else.

A byte-level vocabulary without merges, plus whole words. Strings a task works on stay spelled out, so the
student sees their letters; instructions stay short, so a row takes about 28 tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from harvester.mock_teacher.tasks.phrasings import MONTHS, PHRASINGS
from harvester.mock_teacher.tasks.sql_grammar import NUMBER_COLUMNS, OPERATORS, TEXT_COLUMNS

PAD: Final = "<|pad|>"
START: Final = "<|im_start|>"
END: Final = "<|im_end|>"
PIECES: Final = r" ?[A-Za-z]+|[0-9]| ?[^\sA-Za-z0-9]+|\s"
CHAT_TEMPLATE: Final = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}"
    "{{ '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """A fast tokenizer with whole tokens for the words of the phrasings, of SQL and of `words`."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [PAD, START, END, *alphabet, *(word.replace(" ", "Ġ") for word in _whole_words(words))]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (PAD, START, END)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _whole_words(words: Iterable[str]) -> list[str]:
    """Each word with and without a space before it; single letters and digits are never whole words."""
    texts = [
        re.sub(r"\{\w+\}", " ", one)
        for asked in PHRASINGS.values()
        for one in (*asked.train, *asked.held_out)
    ]
    texts += [" ".join(names) for names in (*TEXT_COLUMNS.values(), *NUMBER_COLUMNS.values())]
    texts += [*MONTHS, *TEXT_COLUMNS, *OPERATORS, *OPERATORS.values(), *words]
    texts += ["user assistant system count SELECT COUNT (*) FROM WHERE + = : , ."]
    found = {piece.strip() for text in texts for piece in re.findall(PIECES, text)}
    whole = {piece for piece in found if piece and not (len(piece) == 1 and piece.isalnum())}
    return sorted({*whole, *(f" {piece}" for piece in whole)})
