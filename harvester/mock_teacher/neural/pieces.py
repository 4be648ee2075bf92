"""Give the bytes of each token of a vocabulary, so that the bytes of all tokens join to the answer's text."""

from __future__ import annotations

import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_of_character() -> dict[str, int]:
    """Return the byte for each character of byte-level BPE (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [value for value in range(256) if value not in printable]
    table = {chr(value): value for value in printable}
    return table | {chr(256 + at): value for at, value in enumerate(others)}


def token_bytes(tokenizer: Any) -> list[bytes]:
    """Return the bytes of every token id, for byte-level BPE and for SentencePiece with byte fallback."""
    table = byte_of_character()
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
    is_byte_level = "ByteLevel" in tokenizer.backend_tokenizer.to_str()
    result = []
    for number in range(len(tokenizer)):
        name = added.get(number) or tokenizer.convert_ids_to_tokens(number) or ""
        if number in added:
            result.append(name.encode())
        elif is_byte_level:
            result.append(bytes(table[letter] for letter in name if letter in table))
        elif match := _BYTE.fullmatch(name):
            result.append(bytes([int(match[1], 16)]))
        else:
            result.append(name.replace("\u2581", " ").encode())
    return result
