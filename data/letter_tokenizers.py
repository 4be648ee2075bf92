"""Make the tokenizers of the small neural teacher and its students: letters with whole words, and BPE-512.

The first spells what a task works on, one token a letter or digit, and has a token for every word of the
instructions; a row takes about 20 tokens. Both have the same special tokens and the ChatML template of
`base_tokenizer`, and neither loses any text. What begins a user's or the assistant's turn is one token.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from harvester_data.base_document import NAMES, WORDS
from harvester_data.base_tokenizer import CHAT_TEMPLATE, END, PAD, START, make_tokenizer
from harvester_data.skill_phrasings import WIDE
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TURNS: Final = (f"{START}user\n", f"{START}assistant\n")
SPECIAL: Final = (PAD, START, END, *TURNS)
_WORD: Final = re.compile(r"(?<!\{)\b[A-Za-z]{2,}\b(?!\})")
BPE_TOKENS: Final = 512


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """Return the teacher's tokenizer, with the words of wide phrasings and of the base text."""
    words = sorted(
        {word for templates in WIDE.values() for text in templates for word in _WORD.findall(text)}
    )
    tokenizer = make_tokenizer((*words, *WORDS, *NAMES))
    turns = [AddedToken(name, special=True, normalized=False) for name in TURNS]
    tokenizer.add_special_tokens({"additional_special_tokens": turns})
    return tokenizer


def bpe_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with `BPE_TOKENS` tokens, trained on `texts`."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=BPE_TOKENS,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return _finished(backend)


def _finished(backend: Tokenizer) -> PreTrainedTokenizerFast:
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token=PAD, eos_token=END, clean_up_tokenization_spaces=False
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer
