"""Recognise and check URLs of object storage. Sends nothing and imports no library."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from urllib.parse import parse_qsl, urlsplit

from harvester.errors import ConfigError, UsageError

# Options that a URL may have, by scheme. None of them is a secret.
_OPTIONS: Mapping[str, frozenset[str]] = {
    "s3": frozenset({"endpoint_override", "scheme", "region", "anonymous"}),
    "gs": frozenset({"endpoint_override", "scheme", "project_id", "anonymous"}),
    "az": frozenset({"account_name"}),
    "hf": frozenset(),
    "file": frozenset(),
}
SCHEMES = tuple(_OPTIONS)
# `Path` writes "s3://bucket" as "s3:/bucket".
_URL = re.compile(rf"({'|'.join(SCHEMES)}):/+(?=[^/])|(file):/+")
# What would be a host, which a folder has none of.
_FILE_HOST = re.compile(r"file://(?!/)")
_ANY_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


class ObjectUrl(NamedTuple):
    """A URL that was checked: its scheme, bucket and key prefix (or folder), and options."""

    scheme: str
    prefix: str
    options: Mapping[str, str]

    def __str__(self) -> str:
        """Return it without options."""
        return f"{self.scheme}://{self.prefix}"


def url_in(name: str | os.PathLike[str]) -> str:
    """Return the URL that a name is, "" if it is an ordinary path.

    A URL that went through `Path` has lost a slash, which is put back.
    """
    text = os.fspath(name)
    if _FILE_HOST.match(text):  # refused by `parse`
        return text
    match = _URL.match(text)
    if match is None:
        return ""
    scheme = match[1] or match[2]
    return f"{scheme}://{'/' if scheme == 'file' else ''}{text[match.end() :]}"


def require_local(name: str | os.PathLike[str]) -> None:
    """Do nothing for an ordinary path.

    Raises:
        UsageError: it is a URL.
    """
    text = os.fspath(name)
    if (url := url_in(name)) or _ANY_SCHEME.match(text):
        raise UsageError(
            "this needs a store on this machine",
            place=(url or text).split("?")[0].rsplit("@", 1)[-1],
            remedy="`harvester fetch URL FOLDER` downloads what was published",
        )


@contextlib.contextmanager
def refusals_of_a_setting() -> Iterator[None]:
    """Turn a refusal into the error that a configuration reports, without its place, which is the URL.

    Raises:
        ValueError: with message and remedy; the configuration names file and key.
    """
    try:
        yield
    except UsageError as error:
        raise ValueError(f"{error.message}; {error.remedy}") from None


def require_path_or_url(name: str) -> None:
    """Do nothing for an ordinary path or a URL that `parse` takes.

    Raises:
        UsageError: it is a URL of another scheme, or one that `parse` refuses.
    """
    if url_in(name) or _ANY_SCHEME.match(name):
        parse(name)


def require_elsewhere(store: Path, url: str) -> None:
    """Do nothing unless a URL names a folder in a store, or one that holds it.

    Raises:
        ConfigError: what is written there would lie among the store's own files.
        UsageError: as `parse`.
    """
    parsed = parse(url)
    if parsed.scheme == "file":
        there, here = Path(parsed.prefix).resolve(), store.resolve()
        if there == here or here in there.parents or there in here.parents:
            raise ConfigError(
                "lies in the store, or around it", place=str(parsed), remedy="name another folder"
            )


def parse(url: str) -> ObjectUrl:
    """Check a URL and take it apart.

    Raises:
        UsageError: it holds credentials, an option that is not known, or no bucket; the message never
            repeats what may be a secret.
    """
    text = url_in(url)
    remedy = (
        "name it as s3://bucket/prefix, gs://, az://container/prefix, hf://datasets/owner/name or file:///"
    )
    try:
        parts = urlsplit(text)
    except ValueError:  # brackets, as of an address, that can't be one
        text = ""
    if not text or not text.isprintable():
        raise UsageError(
            "is no URL of object storage", place=url.split("?")[0].rsplit("@", 1)[-1], remedy=remedy
        )
    shown = f"{parts.scheme}://{parts.netloc.rsplit('@', 1)[-1]}{parts.path}"
    if "@" in parts.netloc:
        raise UsageError(
            "credentials don't belong into a URL",
            place=shown,
            remedy="leave them out; the library of the cloud takes them from its environment variables",
        )
    if parts.scheme == "file" and parts.netloc:
        path = f"{'' if parts.netloc == 'localhost' else '/' + parts.netloc}{parts.path}"
        raise UsageError(
            f"{parts.netloc!r} stands where a host would, and a folder has none",
            place=shown,
            remedy=f"name a folder with three slashes, as file://{path or '/'}",
        )
    options = dict(parse_qsl(parts.query, keep_blank_values=True))
    unknown = sorted(set(options) - _OPTIONS[parts.scheme])
    if unknown or parts.fragment:
        known = ", ".join(sorted(_OPTIONS[parts.scheme])) or "none"
        raise UsageError(
            f"the option {unknown[0]!r} is not known" if unknown else "a URL here has no fragment",
            place=shown,
            remedy=f"known options: {known}; credentials come from the environment of the cloud's library",
        )
    prefix = "/".join(part for part in f"{parts.netloc}{parts.path}".split("/") if part)
    if ".." in prefix.split("/"):
        raise UsageError("has a part '..'", place=shown, remedy=remedy)
    if parts.scheme == "file":
        prefix = f"/{prefix}"
    if not prefix.strip("/"):
        raise UsageError("names no bucket", place=shown, remedy=remedy)
    return ObjectUrl(parts.scheme, prefix, options)
