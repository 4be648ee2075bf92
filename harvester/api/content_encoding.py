"""Decode the content encoding of a reply in pieces of limited size. Pure.

A kilobyte can decode to gigabytes when encodings are nested, and httpx decodes each network chunk whole. So
only one encoding is accepted, and it is decoded a piece at a time: the reader stops at its limit.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

# Most bytes of one decoded piece.
PIECE_BYTES = 256 * 1024
_GZIP_BITS, _ZLIB_BITS, _RAW_BITS = 31, 15, -15
_BITS = {"gzip": _GZIP_BITS, "x-gzip": _GZIP_BITS, "deflate": _ZLIB_BITS}


class EncodingError(ValueError):
    """The encoding of a reply is not one that was asked for, or its data is broken."""


class Decoder:
    """Decodes one body.

    Args:
        encoding: value of the header `content-encoding`; "" for none.

    Raises:
        EncodingError: more than one encoding, or one that was not asked for.
    """

    def __init__(self, encoding: str) -> None:
        names = [name for name in (part.strip().lower() for part in encoding[:200].split(",")) if name]
        names = [name for name in names if name != "identity"]
        if len(names) > 1 or len(encoding) > 200:
            raise EncodingError("the body has more than one encoding")
        if names and names[0] not in _BITS:
            raise EncodingError(f"the body has the encoding {names[0]!r}, which was not asked for")
        self._bits = _BITS[names[0]] if names else 0
        self._inflater = zlib.decompressobj(self._bits) if names else None
        self._is_first = True

    def decode(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the decoded bytes of a chunk in pieces.

        Raises:
            EncodingError: the data is broken.
        """
        if self._inflater is None:
            yield chunk
            return
        rest = chunk
        try:
            while rest:
                piece, rest = self._inflate(rest)
                if piece:
                    yield piece
        except zlib.error as error:
            raise EncodingError(f"the body's encoding is broken: {error}") from None

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
        self._is_first = False
        return piece, self._inflater.unconsumed_tail or self._inflater.unused_data
