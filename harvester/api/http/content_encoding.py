"""Decode the content encoding of a reply in pieces of limited size. Pure.

A kilobyte can decode to gigabytes when encodings are nested, and httpx decodes each network chunk whole. So
only one encoding is accepted, and it is decoded a piece at a time: the reader stops at its limit.

Gateways that compress or decompress a body sometimes leave the header as it was. So the first bytes count
before the header: an answer that was paid for is not lost on it.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator

# Most bytes of one decoded piece.
PIECE_BYTES = 256 * 1024
_GZIP_BITS, _ZLIB_BITS, _RAW_BITS = 31, 15, -15
_BITS = {"gzip": _GZIP_BITS, "x-gzip": _GZIP_BITS, "deflate": _ZLIB_BITS}
# Encodings that are not asked for. Another name (`utf-8`, `none`) is a mistake and means that there is none.
_OTHERS = frozenset({"br", "zstd", "compress", "x-compress", "dcb", "dcz", "exi", "pack200-gzip"})
_GZIP_MAGIC = b"\x1f\x8b"
# Bytes from which it is decided, and the beginnings of JSON, of events and of a page.
_DECIDING_BYTES = 2
_PLAIN = re.compile(rb"\s*(?:\{[\s\"}]|\[[\s\[{\"\]]|<[!a-z]|da|ev|:[ :\r\n])")


class EncodingError(ValueError):
    """The encoding of a reply is not one that was asked for, or its data is broken."""


class Decoder:
    """Decodes one body.

    Args:
        encoding: value of the header `content-encoding`; "" for none.
    """

    def __init__(self, encoding: str) -> None:
        names = {name for name in (part.strip().lower() for part in encoding[:200].split(",")) if name}
        self._names = sorted(names & (_BITS.keys() | _OTHERS))
        self._bits = 0
        self._inflater: zlib._Decompress | None = None
        self._head: bytes | None = b""  # None once it is decided
        self._is_first = True

    def decode(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the decoded bytes of a chunk in pieces.

        Raises:
            EncodingError: the data is broken, has more than one encoding, or one that was not asked for.
        """
        if self._head is not None:
            self._head += chunk
            if len(self._head) < _DECIDING_BYTES and self._names:
                return
            chunk, self._head = self._head, None
            self._decide(chunk)
        if self._inflater is None:
            yield chunk
            return
        rest = chunk
        try:
            while rest:
                is_first = self._is_first
                piece, rest = self._inflate(rest)
                if is_first and piece.startswith(_GZIP_MAGIC):
                    raise EncodingError("the body has more than one encoding")
                if piece:
                    yield piece
        except zlib.error as error:
            raise EncodingError(f"the body's encoding is broken: {error}") from None

    def _decide(self, head: bytes) -> None:
        """Find the encoding from the first bytes, else from the header.

        Raises:
            EncodingError: it was not asked for.
        """
        if head.startswith(_GZIP_MAGIC):
            self._bits = _GZIP_BITS
        elif self._names and not _PLAIN.match(head):
            name = self._names[0]
            if len(self._names) > 1 or name not in _BITS:
                raise EncodingError(f"the body has the encoding {', '.join(self._names)}, not asked for")
            self._bits = _BITS[name]
        if self._bits:
            self._inflater = zlib.decompressobj(self._bits)

    def _inflate(self, data: bytes) -> tuple[bytes, bytes]:
        """Return a decoded piece, and the data that is left."""
        assert self._inflater is not None
        if self._inflater.eof:
            if self._bits != _GZIP_BITS or not data.strip(b"\0"):
                return b"", b""  # padding
            self._inflater = zlib.decompressobj(self._bits)  # gzip files may be concatenated
        try:
            piece = self._inflater.decompress(data, PIECE_BYTES)
        except zlib.error:
            if not self._is_first or self._bits != _ZLIB_BITS:
                raise
            self._bits = _RAW_BITS  # some servers send `deflate` without the header of zlib
            self._inflater = zlib.decompressobj(_RAW_BITS)
            piece = self._inflater.decompress(data, PIECE_BYTES)
        self._is_first = self._is_first and not piece
        return piece, self._inflater.unconsumed_tail or self._inflater.unused_data
