"""Read the bytes of a tokenizer's tokens from the names in its vocabulary. Pure.

A tokenizer has no method for the bytes of a token: `decode` replaces parts of a character by a sign.
"""

from __future__ import annotations

import re
from typing import Any

# A byte that SentencePiece has a token of its own for.
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# SentencePiece's sign for a space.
_SPACE = "\u2581"


def byte_of_character() -> dict[str, int]:
    """Return the byte for each character of byte-level BPE (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    table = {chr(value): value for value in printable}
    return table | {chr(256 + at): value for at, value in enumerate(others)}


def is_byte_fallback(name: str) -> bool:
    """Whether this is SentencePiece's name of the token for a single byte."""
    return _BYTE.fullmatch(name) is not None


def token_bytes(tokenizer: Any) -> list[bytes]:
    """Return the bytes of every token id, for byte-level BPE and for SentencePiece with byte fallback.

    For other kinds of tokenizers they are wrong, which a comparison with the text shows.
    """
    table = byte_of_character()
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    is_byte_level = backend is not None and "ByteLevel" in backend.to_str()
    result = []
    for number in range(max(len(tokenizer), max(added, default=-1) + 1)):
        name = added.get(number) or tokenizer.convert_ids_to_tokens(number) or ""
        if number in added:
            result.append(name.encode())
        elif is_byte_level:
            result.append(bytes(table[letter] for letter in name if letter in table))
        elif match := _BYTE.fullmatch(name):
            result.append(bytes([int(match[1], 16)]))
        else:
            result.append(name.replace(_SPACE, " ").encode())
    return result
