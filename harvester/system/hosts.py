"""Normalise names of hosts and models so that they can be compared, and check base URLs."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from urllib.parse import urlsplit

LOOPBACK = frozenset({"127.0.0.1", "localhost", "::1"})

_PRIVATE_NETWORKS = tuple(
    ipaddress.ip_network(text)
    for text in (
        *("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "169.254.0.0/16"),
        *("::1/128", "fe80::/10", "fc00::/7"),
    )
)
# A name without a dot begins with a letter and is no hexadecimal number: some resolvers take 0x7f000001 or
# 2130706433 for an address.
_PRIVATE_NAME = re.compile(r"(?!0x)[a-z][a-z0-9_-]*\Z|.+\.(svc|local|internal)\Z")
# Path of a request, copied together with the address.
_ROUTE = re.compile(r"(/(?:chat/)?completions)/*\Z", re.IGNORECASE)

_HOST = re.compile(r"(?!-)[a-z0-9_-]+(?:\.[a-z0-9_-]+)*\Z")
_BETWEEN_WORDS = re.compile(r"[^a-z0-9.]+|(?<![0-9])\.|\.(?![0-9])")
# How weights are cut, packed and served: a name that adds only such words means the same weights.
_PACKING = re.compile(
    r"\d[\d.]*[a-z]{0,2}|[ae]\d[\d.]*b|v\d[\d.]*|i?q\d|w\d+a\d+|(u?int|fp|bf|nf|nvfp|mxfp)\d+|[0kmsl]|xx?[sl]|"
    r"instruct|chat|it|base|thinking|text|preview|latest|free|meta|mini|small|medium|large|tiny|nano|flash|pro|"
    r"hf|awq|gptq|gguf|ggml|exl2|exl3|mlx|onnx|bnb|bit|autoround|imat|i1|ud|nl|dynamic|quantized|qat|unsloth"
)


def host_of(address: str) -> str:
    """Return the host of `name:port`, `[v6]:port` or a bare name, normalised by `plain_host`."""
    if address.startswith("["):
        return plain_host(address[1:].partition("]")[0])
    return plain_host(address if address.count(":") > 1 else address.partition(":")[0])


def plain_host(host: str) -> str:
    """Normalise a host: lower case, no final dot, IPv6 in its short form."""
    name = host.lower().removesuffix(".")
    if ":" in name:
        try:
            return str(ipaddress.IPv6Address(name))
        except ValueError:
            return name
    return name


def is_plain(host: str) -> bool:
    """Return whether every library reads the same name from this host.

    Full-width letters, ideographic dots, percent signs, backslashes and a final dot are read differently by
    a URL parser, an IDNA encoder and a resolver, so a comparison of names must refuse them.
    """
    return bool(_HOST.match(host)) or (":" in host and plain_host(host) == host)


def check_url(url: str) -> str:
    """Return the URL with its host in lower case and without a trailing slash.

    Raises:
        ValueError: no http(s), user info, a query or a fragment (secrets may be in them), the path of a
            request, or a host that two libraries would read differently. Whether plain http may be used is
            decided by `check_plain_http`.
    """
    if not url.isascii() or not url.isprintable() or set(url) & set(" \\%"):
        raise ValueError(
            "a base URL is plain ASCII without spaces, % or backslashes (xn--... for other names)"
        )
    parts = urlsplit(url)
    if set(url) & set("?#") or "@" in parts.netloc:
        raise ValueError(
            "a base URL carries no user, password, query or fragment; name the key in api_key_env"
        )
    host = parts.hostname or ""
    if parts.scheme not in {"http", "https"} or not host:
        raise ValueError(f"{url!r} is not an http(s) URL such as http://127.0.0.1:8000/v1")
    if not is_plain(host):
        raise ValueError(f"host {host!r} is not in its plain form: no dot at the end, no odd characters")
    if route := _ROUTE.search(parts.path):
        raise ValueError(
            f"a base URL ends before {route[1]!r}, which each request adds: "
            f"{url[: url.lower().rindex(route[1].lower())]}"
        )
    name = f"[{host}]" if ":" in host else host
    place = name if parts.port is None else f"{name}:{parts.port}"
    return f"{parts.scheme}://{place}{parts.path}".rstrip("/")


def is_private(host: str) -> bool:
    """Return whether a host is in a private network, by its address or its name.

    Addresses: loopback, RFC 1918, link-local (RFC 3927, RFC 4291), unique local (RFC 4193). Names: without a
    dot, or under `.svc`, `.local`, `.internal`, which public DNS does not delegate.
    """
    name = plain_host(host)
    if name in LOOPBACK:
        return True
    try:
        address = ipaddress.ip_address(name)
    except ValueError:
        return bool(_PRIVATE_NAME.match(name))
    address = getattr(address, "ipv4_mapped", None) or address
    return any(address in network for network in _PRIVATE_NETWORKS if network.version == address.version)


def check_plain_http(url: str, *, has_key: bool, is_allowed: bool) -> str:
    """Return what the operator must know about plain http to this URL; "" where nothing is to be said.

    Args:
        url: as `check_url` returns it.
        has_key: whether a credential is sent along.
        is_allowed: whether the configuration allows plain http everywhere.

    Raises:
        ValueError: plain http would carry a credential, or leave the private network, and is not allowed.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if parts.scheme != "http" or plain_host(host) in LOOPBACK:
        return ""
    carried = "the API key, prompts and answers" if has_key else "prompts and answers"
    if is_allowed:
        if not has_key and is_private(host):
            return ""
        return f"plain http to {host}: whoever is on the way can read {carried} (allow_http = true)"
    if has_key:
        raise ValueError(
            f"plain http would carry the API key readable to {host}; use https, or remove api_key_env if the "
            "server needs no key, or set [teacher] allow_http = true in a network that you trust"
        )
    if is_private(host):
        return ""
    raise ValueError(
        "plain http is for private addresses (loopback, 10.x, 172.16-31.x, 192.168.x, names without a dot, "
        f".svc, .local, .internal); use https for {host}, or set [teacher] allow_http = true in a network "
        "that you trust"
    )


def printable(name: str) -> str:
    """Return a name that is safe to print: answers name their own model, and their text is not trusted."""
    return name if name.isprintable() else ascii(name)


def unexplained_words(model: str, patterns: Iterable[str]) -> list[str]:
    """Return words of a model's name that neither patterns nor common suffixes of packed weights explain.

    `Qwen3-8B-Instruct-AWQ` are the weights of `qwen3?8b*`; `Qwen3-8B-Opus-Reasoning` is a derivative,
    with terms of its own.
    """
    name = model.lower().rsplit("/", 1)[-1].removesuffix(".gguf")
    known = {word for pattern in patterns for word in _split(re.sub(r"[*?\[\]]", " ", pattern.lower()))}
    return [word for word in _split(name) if word not in known and not _PACKING.fullmatch(word)]


def _split(text: str) -> list[str]:
    return [word for word in _BETWEEN_WORDS.split(text) if word]
