"""Compute request keys (cache keys) over canonical JSON, and which rank owns a key. Pure.

The key is SHA-256 over canonical JSON (RFC 8785) of exactly the body that is sent, defaults included, plus
the teacher's base URL or identity, the sample number and the epoch. Never the API key, never a timeout. Text
is hashed as it is, without Unicode normalisation. `data/FORMAT.md` has a worked example, the tests have
golden vectors.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import rfc8785

KEY_VERSION = 1
KEY_BYTES = 32
# Fields that change how an answer is transferred and never what it says: they are left out of the key.
TRANSPORT_ONLY = frozenset({"stream", "stream_options"})

# `RequestKeys` caches the end of the document for this many sample numbers.
CACHED_SAMPLES = 1000

# orjson sorts names by code point, RFC 8785 by UTF-16 code unit: the same for ASCII names. Both refuse
# integers beyond 2**53 - 1 and write strings alike. Floats differ (1.0), so `_is_plain` excludes them.
_PLAIN = orjson.OPT_SORT_KEYS | orjson.OPT_STRICT_INTEGER
_LEAVES = frozenset({str, bool, int, type(None)})


def canonical(value: Any) -> bytes:
    """Encode a value as canonical JSON (RFC 8785), in UTF-8.

    Raises:
        ValueError: NaN, an infinity, a lone surrogate, an integer beyond 2**53 - 1, a name that is
            not a string, a type that JSON doesn't have, or nesting that is too deep.
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
    """Return the 32-byte cache key of one request.

    Args:
        endpoint: what stands for the teacher: its base URL as configured, or its identity.
        body: the JSON body after defaults; `stream` and `stream_options` are ignored.
        sample_index: which of the prompt's samples this asks for, counted from 0.
        epoch: a number that is raised to ask all prompts again.

    Raises:
        ValueError: the body has no canonical JSON.
    """
    wire = {name: value for name, value in body.items() if name not in TRANSPORT_ONLY}
    return hashlib.sha256(b'{"body":' + canonical(wire) + _end(endpoint, sample_index, epoch)).digest()


class RequestKeys:
    """Keys of many requests that share endpoint, epoch and every field of the body but `messages`.

    Equal to `request_key` at a fraction of its cost: the shared fields are encoded once.

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
        self._ends: dict[int, bytes] = {}

    def key(self, messages: Sequence[Mapping[str, Any]], sample_index: int) -> bytes:
        """Return the key of `{**shared, "messages": messages}`.

        Raises:
            ValueError: the messages have no canonical JSON.
        """
        end = self._ends.get(sample_index)
        if end is None:
            end = self._after + _end(self._endpoint, sample_index, self._epoch)
            if len(self._ends) < CACHED_SAMPLES:
                self._ends[sample_index] = end
        return hashlib.sha256(self._before + canonical(messages) + end).digest()


def short_digest(data: bytes) -> int:
    """Return a 64-bit BLAKE2b digest for in-memory sets where a collision costs a check; no request key."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")


def owner(key: bytes, world: int) -> int:
    """Return the rank that asks for this key: its first 8 bytes, big-endian, modulo the `world` ranks."""
    if world < 1:
        raise ValueError("a world has at least one rank")
    return int.from_bytes(key[:8], "big") % world


def _end(endpoint: str, sample_index: int, epoch: int) -> bytes:
    """The canonical document {body, endpoint, epoch, sample, v}, from the end of the body on."""
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
        return all(type(name) is str and name.isascii() and _is_plain(item) for name, item in value.items())
    if kind is list or kind is tuple:
        return all(map(_is_plain, value))
    return False


def _encode(value: Any) -> bytes:
    """Encode by the whole standard: containers here, floats and other types by the reference library."""
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
