"""Make the two tokenizers of the small neural teacher and its students: one token a byte, and BPE-512.

Both have the same special tokens and the ChatML template of `base_tokenizer`, and neither loses any text.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from harvester_data.base_tokenizer import CHAT_TEMPLATE, END, PAD, START
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL: Final = (PAD, START, END)
BPE_TOKENS: Final = 512


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with 259 tokens: the special ones and one for each byte of UTF-8."""
    names = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {name: number for number, name in enumerate(names)}
    return _finished(Tokenizer(models.BPE(vocab=vocabulary, merges=[])))


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
