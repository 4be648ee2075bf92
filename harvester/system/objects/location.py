"""Name a place in object storage by URL, and open it with a library's filesystem.

`s3://`, `gs://` and `az://` are pyarrow's own filesystems, which come with the base install; `hf://` is
huggingface_hub's fsspec filesystem behind pyarrow's adapter; `file://` is a folder, such as a mounted disk.
Credentials are looked for by these libraries alone, in their usual variables, files and metadata services.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import pyarrow.fs as pafs

from harvester.errors import RemoteStoreError, UsageError
from harvester.system.command_line.extras import require
from harvester.system.objects.url import parse
from harvester.system.safe_text import one_line

# Environment variables from which the address of an S3-compatible server is taken, as by the AWS SDKs.
_S3_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
_CONNECT_S = 10
_RETRIES = 5
_RETRY_LIMIT = timedelta(minutes=1)
# What the libraries' messages contain, and what can be done about it. A message without any has no remedy.
_REMEDIES = (
    (("NO_SUCH_BUCKET", "NoSuchBucket", "ContainerNotFound"), "make the bucket first; none is made here"),
    (
        ("ACCESS_DENIED", "AccessDenied", "403", "Forbidden", "InvalidAccessKeyId", "SignatureDoesNotMatch"),
        "give the credentials of this bucket the right to list, read and write under this prefix",
    ),
    (("401", "credential", "Unauthorized"), "set the credentials in the environment of the cloud's library"),
    (
        ("NETWORK_CONNECTION", "curlCode", "onnection", "timed out", "imeout", "Could not resolve"),
        "check the network and the endpoint; the same command goes on where it ended",
    ),
)


@dataclass(frozen=True, slots=True)
class Location:
    """A prefix in object storage.

    Attributes:
        url: without options, for messages.
        prefix: bucket and key prefix, or folder, as the filesystem names it.
    """

    url: str
    prefix: str
    filesystem: Any

    @classmethod
    def open(cls, url: str) -> Location:
        """Open a URL; nothing is sent yet.

        Raises:
            UsageError: it holds credentials, an option that is not known, or no bucket.
            MissingPackage: the library of its scheme is not installed. RemoteStoreError: it can't be set up.
        """
        scheme, prefix, options = parse(url)
        shown = f"{scheme}://{prefix}"
        with translating(shown):
            return cls(shown, prefix, _filesystem(scheme, options))

    @property
    def is_local(self) -> bool:
        """Whether it is a folder, where a file that is being written can be seen."""
        return self.url.startswith("file:")

    def path(self, name: str) -> str:
        """Return the path of an object, by its name under the prefix."""
        return f"{self.prefix}/{name}"

    def __str__(self) -> str:
        return self.url


def _filesystem(scheme: str, options: Mapping[str, str]) -> Any:
    if scheme == "file":
        return pafs.LocalFileSystem()
    anonymous = {"anonymous": options.get("anonymous", "").lower() in {"1", "true", "yes"}}
    if scheme == "s3":
        return _s3(options, anonymous)
    if scheme == "gs":
        named = {name: value for name, value in options.items() if name != "anonymous"}
        return pafs.GcsFileSystem(**anonymous, **named, retry_time_limit=_RETRY_LIMIT)
    if scheme == "az":
        return _azure(options)
    return _hugging_face()


def _s3(options: Mapping[str, str], anonymous: Mapping[str, bool]) -> Any:
    endpoint = options.get("endpoint_override", "")
    endpoint = endpoint or next((os.environ[name] for name in _S3_ENDPOINTS if os.environ.get(name)), "")
    server: dict[str, Any] = {}
    if endpoint:
        address = urlsplit(endpoint if "//" in endpoint else f"//{endpoint}")
        server = {
            "endpoint_override": address.netloc.rsplit("@", 1)[-1] + address.path.rstrip("/"),
            "scheme": options.get("scheme") or address.scheme or "https",
        }
    if region := options.get("region"):
        server["region"] = region
    return pafs.S3FileSystem(
        **server,
        **anonymous,
        connect_timeout=_CONNECT_S,
        # One request for a small object, instead of a multipart upload of three.
        allow_delayed_open=True,
        background_writes=False,
        retry_strategy=pafs.AwsStandardS3RetryStrategy(max_attempts=_RETRIES),
    )


def _azure(options: Mapping[str, str]) -> Any:
    """Open Azure Blob Storage; the variables are those of Azure's command line."""
    account = options.get("account_name") or os.environ.get("AZURE_STORAGE_ACCOUNT", "")
    if not account:
        raise UsageError(
            "which storage account is not said",
            place="az://",
            remedy="set AZURE_STORAGE_ACCOUNT, or add ?account_name=NAME to the URL",
        )
    key, token = (os.environ.get(f"AZURE_STORAGE_{name}") for name in ("KEY", "SAS_TOKEN"))
    secret = {"account_key": key} if key else {"sas_token": token} if token else {}
    return pafs.AzureFileSystem(account_name=account, **secret)


def _hugging_face() -> Any:
    require("hub", "hf://")
    from huggingface_hub import HfFileSystem

    return pafs.PyFileSystem(
        pafs.FSSpecHandler(HfFileSystem(skip_instance_cache=True, use_listings_cache=False))
    )


@contextlib.contextmanager
def translating(place: str) -> Iterator[None]:
    """Turn what a filesystem raises into a RemoteStoreError that names the place.

    Raises:
        RemoteStoreError: the storage can't be reached, refuses, or lacks the object.
    """
    try:
        yield
    except RemoteStoreError:
        raise
    except FileNotFoundError as error:
        raise RemoteStoreError(
            "no such object", place=place, remedy=_remedy_of(str(error)) or "name the URL of a publication"
        ) from None
    except (OSError, ValueError, NotImplementedError) as error:
        text = one_line(str(error).split("\n")[0])[:500]
        raise RemoteStoreError(
            f"the storage refuses: {text or type(error).__name__}", place=place, remedy=_remedy_of(str(error))
        ) from None


def _remedy_of(text: str) -> str:
    return next((remedy for words, remedy in _REMEDIES if any(word in text for word in words)), "")
