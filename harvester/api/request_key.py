"""Canonical JSON, the cache key, and which rank owns a key.

The key is SHA-256 over canonical JSON (RFC 8785) of exactly what goes on the wire after defaults, plus the
teacher's address, the sample number and the epoch. Never the API key, never a timeout. Text is hashed as it
is: no Unicode normalisation. `data/FORMAT.md` holds a worked example, the tests hold golden vectors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import rfc8785

KEY_VERSION = 1
KEY_BYTES = 32
TRANSPORT_ONLY = frozenset({"stream", "stream_options"})
"""Fields that change how an answer travels and never what it says: left out of the key."""

MOST_RESTS_KEPT = 1000
"""Of so many sample numbers the end of the document is kept from prompt to prompt."""

# orjson sorts names by code point and RFC 8785 by UTF-16 unit: the same for ASCII names. Both refuse
# integers beyond 2**53 - 1 and write strings alike; floats differ (1.0), so they never take this path.
_PLAIN = orjson.OPT_SORT_KEYS | orjson.OPT_STRICT_INTEGER
_LEAVES = frozenset({str, bool, int, type(None)})


def canonical(value: Any) -> bytes:
    """RFC 8785 canonical JSON, UTF-8.

    Raises:
        ValueError: NaN, an infinity, a lone surrogate, an integer beyond 2**53 - 1, a name that is no
            string, a type JSON does not know, or nesting too deep to walk.
    """
    try:
        if _is_plain(value):
            try:
                return orjson.dumps(value, option=_PLAIN)
            except orjson.JSONEncodeError:  # also its own depth limit, which the standard does not have
                return _encode(value)
        return _encode(value)
    except (rfc8785.CanonicalizationError, orjson.JSONEncodeError, UnicodeEncodeError) as error:
        raise ValueError(f"no canonical JSON: {error}") from None
    except RecursionError:
        raise ValueError("no canonical JSON: nested too deep") from None


def request_key(endpoint: str, body: Mapping[str, Any], sample_index: int, epoch: int = 0) -> bytes:
    """The 32-byte cache key of one request.

    Args:
        endpoint: the teacher's base URL, as configured.
        body: the JSON body after defaults; `stream` and `stream_options` are ignored.
        sample_index: which of the prompt's samples this asks for, from 0.
        epoch: raised to ask again on purpose.

    Raises:
        ValueError: the body has no canonical JSON.
    """
    wire = {name: value for name, value in body.items() if name not in TRANSPORT_ONLY}
    return hashlib.sha256(b'{"body":' + canonical(wire) + _rest(endpoint, sample_index, epoch)).digest()


class RequestKeys:
    """Keys of many requests that share endpoint, epoch and every field of the body but `messages`.

    Equal to `request_key`, at a fraction of its cost: what is shared is made canonical once.

    Raises:
        ValueError: the shared fields have no canonical JSON.
    """

    def __init__(self, endpoint: str, shared: Mapping[str, Any], epoch: int = 0) -> None:
        wire = {name: value for name, value in shared.items() if name not in TRANSPORT_ONLY}
        before = {name: value for name, value in wire.items() if _utf16(name) < _utf16("messages")}
        after = {name: value for name, value in wire.items() if _utf16(name) > _utf16("messages")}
        self._before = b'{"body":' + canonical(before)[:-1] + (b"," if before else b"") + b'"messages":'
        self._after = (b"," if after else b"") + canonical(after)[1:]
        self._endpoint, self._epoch = endpoint, epoch
        self._rests: dict[int, bytes] = {}

    def key(self, messages: Sequence[Mapping[str, Any]], sample_index: int) -> bytes:
        """The key of `{**shared, "messages": messages}`.

        Raises:
            ValueError: the messages have no canonical JSON.
        """
        rest = self._rests.get(sample_index)
        if rest is None:
            rest = self._after + _rest(self._endpoint, sample_index, self._epoch)
            if len(self._rests) < MOST_RESTS_KEPT:
                self._rests[sample_index] = rest
        return hashlib.sha256(self._before + canonical(messages) + rest).digest()


def short_digest(data: bytes) -> int:
    """64 bits that tell one thing from another where a clash costs a second look; never a key (BLAKE2b)."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def owner(key: bytes, world: int) -> int:
    """The rank, of `world` ranks, that asks for this key: its first 8 bytes, big-endian, modulo `world`."""
    if world < 1:
        raise ValueError("a world has at least one rank")
    return int.from_bytes(key[:8], "big") % world


def _rest(endpoint: str, sample_index: int, epoch: int) -> bytes:
    """The canonical document {body, endpoint, epoch, sample, v} from the end of the body on."""
    if sample_index < 0 or epoch < 0:
        raise ValueError("samples and epochs count from 0")
    return b',"endpoint":%b,"epoch":%d,"sample":%d,"v":%d}' % (
        canonical(endpoint),
        epoch,
        sample_index,
        KEY_VERSION,
    )


def _is_plain(value: Any) -> bool:
    """Whether orjson's bytes are provably RFC 8785's: exact types, no floats, ASCII names."""
    kind = type(value)
    if kind in _LEAVES:
        return True
    if kind is dict:
        return all(type(name) is str and name.isascii() and _is_plain(held) for name, held in value.items())
    if kind is list or kind is tuple:
        return all(map(_is_plain, value))
    return False


def _encode(value: Any) -> bytes:
    """The whole standard: floats and odd types by the reference library, containers here."""
    kind = type(value)
    if kind in _LEAVES:
        return orjson.dumps(value, option=_PLAIN)
    if kind is dict:
        if not all(isinstance(name, str) for name in value):
            raise ValueError("no canonical JSON: a name must be a string")
        names = sorted(value, key=_utf16)
        return b"{" + b",".join(orjson.dumps(n) + b":" + _encode(value[n]) for n in names) + b"}"
    if kind is list or kind is tuple:
        return b"[" + b",".join(map(_encode, value)) + b"]"
    return rfc8785.dumps(value)


def _utf16(name: str) -> bytes:
    """RFC 8785 section 3.2.3: names sort by UTF-16 code unit."""
    return name.encode("utf-16-be")
