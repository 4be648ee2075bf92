"""Turn the body of a reply into UTF-8, whatever charset it has. Pure.

JSON and event streams are UTF-8 (RFC 8259, the HTML standard), and the stored body is read again without its
headers. So a body that is UTF-8 stays as it is, whatever its header says. One in UTF-16 or UTF-32 is known by
its byte order mark or its null bytes; any other is read in the charset that its header names. What that
charset can't read strictly stays as it came, and its answer has the outcome `unknown`.
"""

from __future__ import annotations

import codecs
import re
from encodings.aliases import aliases

# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
# Codecs by which of the first four bytes of JSON or of an event are null, 1 for each that is (RFC 4627).
_NULLS = {
    b"\1\1\1\0": "utf-32-be",
    b"\0\1\1\1": "utf-32-le",
    b"\1\0\1\0": "utf-16-be",
    b"\0\1\0\1": "utf-16-le",
}
_CHARSET = re.compile(r";\s*charset\s*=\s*[\"']?([\w.:+-]{1,40})", re.IGNORECASE | re.ASCII)
_SEPARATORS = re.compile(r"[^0-9a-z]+")
# Codecs that are no charset of text on the wire, or take time in the square of their bytes.
_NEVER = frozenset(
    {"base64_codec", "bz2_codec", "hex_codec", "quopri_codec", "rot_13", "uu_codec", "zlib_codec", "hz"}
    | {"idna", "mbcs", "oem", "palmos", "punycode", "raw_unicode_escape", "undefined", "unicode_escape"}
    | {"utf_7", "utf_8", "utf_8_sig"}
)
_KNOWN = frozenset(aliases.values()) - _NEVER
# Charsets that stand for a larger one, as the Encoding Standard has it: servers do not tell them apart.
_SUPERSETS = {
    "ascii": "cp1252",
    "latin_1": "cp1252",
    "iso8859_9": "cp1254",
    "shift_jis": "cp932",
    "gb2312": "gb18030",
    "gbk": "gb18030",
    "euc_kr": "cp949",
    "big5": "big5hkscs",
}
_ESCAPE = b"\x1b"


def needs_reading(body: bytes, content_type: str) -> bool:
    """Whether `as_utf8` has to look at all of a body: hardly any."""
    return b"\0" in body[:4] or body[:2] in (b"\xff\xfe", b"\xfe\xff") or _named(content_type) is not None


def as_utf8(body: bytes, content_type: str) -> bytes:
    """Return a body in UTF-8, or unchanged where it is UTF-8 or can't be read.

    Args:
        content_type: value of the header `content-type`; "" for none.
    """
    for mark, name in _MARKS:
        if body.startswith(mark):
            return _decoded(body, name)
    wide = _NULLS.get(bytes(byte == 0 for byte in body[:4]))
    if wide is not None:
        return _decoded(body, wide)
    charset = _named(content_type)
    if charset is None or charset.startswith(("utf_16", "utf_32")):
        return body  # those have null bytes in the beginning of each JSON text
    if charset.startswith("iso2022"):  # seven bits: UTF-8, too, but no JSON holds its escape sequences
        return _decoded(body, charset) if _ESCAPE in body else body
    if _is_mostly_utf8(body):
        return body
    return _decoded(body, _SUPERSETS.get(charset, charset))


def _named(content_type: str) -> str | None:
    """Return the codec of the charset that a header names; None for UTF-8, an unknown one, or none."""
    named = _CHARSET.search(content_type[:400])
    if named is None:
        return None
    name = _SEPARATORS.sub("_", named[1].lower()).strip("_")
    codec = aliases.get(name, name)
    return codec if codec in _KNOWN else None


def _decoded(body: bytes, codec: str) -> bytes:
    try:
        return body.decode(codec).removeprefix("\ufeff").encode()
    except (UnicodeError, LookupError):
        return body


def _is_mostly_utf8(body: bytes) -> bool:
    """Whether a body is UTF-8, or damaged UTF-8 rather than text of another charset.

    In another charset, bytes that happen to form a character of UTF-8 are rarer than those that don't.
    """
    try:
        body.decode()
        return True
    except UnicodeDecodeError:
        text = body.decode("utf-8", "replace")
    broken, others = text.count("\ufffd"), len(text) - len(text.encode("ascii", "ignore"))
    return others - broken >= broken
