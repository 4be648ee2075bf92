"""Push files to a repository of the Hugging Face Hub in one commit, and compare what is there afterwards.

The client is huggingface_hub (extra `hub`). The token is that of a named environment variable and no other.
HF_ENDPOINT names another server.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from harvester.errors import ConfigError, FindingsError, RemoteStoreError, UsageError
from harvester.system.command_line.extras import require
from harvester.system.counted import first_few
from harvester.system.files import sha256_of
from harvester.system.safe_text import one_line

RepositoryType = Literal["dataset", "model"]
DEFAULT_ENDPOINT = "https://huggingface.co"
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
_CHUNK = 1024 * 1024


@dataclass(frozen=True, slots=True)
class HubTarget:
    """Where files are pushed to.

    Attributes:
        private: create the repository as a private one; one that exists stays as it is.
        token_env: name of the environment variable that holds the token.
    """

    repository: str
    type: RepositoryType
    private: bool = True
    token_env: str = "HF_TOKEN"  # noqa: S105 - the name of a variable

    @property
    def endpoint(self) -> str:
        """The server."""
        return os.environ.get("HF_ENDPOINT", "").rstrip("/") or DEFAULT_ENDPOINT


@dataclass(frozen=True, slots=True)
class Pushed:
    """What was pushed, or would be.

    Attributes:
        files: sizes in bytes by path.
        url: of the commit; "" where nothing was sent.
    """

    target: HubTarget
    files: Mapping[str, int]
    url: str = ""

    def facts(self) -> dict[str, Any]:
        """Return the fields for `--json`."""
        return {
            "repository": self.target.repository,
            "type": self.target.type,
            "endpoint": self.target.endpoint,
            "private": self.target.private,
            "files": dict(self.files),
            "uploaded": bool(self.url),
            "url": self.url,
        }

    def lines(self) -> list[str]:
        """Return it as lines of text."""
        kind = "private" if self.target.private else "public"
        where = f"{kind} {self.target.type} {self.target.repository} at {self.target.endpoint}"
        size = f"{len(self.files):,} files, {sum(self.files.values()):,} bytes"
        if self.url:
            return [f"pushed {size}, to {self.url}; each was compared with what the Hub says it holds"]
        lines = [f"would push {size}, to the {where}:"]
        lines += [f"  {size:>12,}  {path}" for path, size in self.files.items()]
        return [*lines, "nothing was sent: `--upload` uploads"]


def push_files(target: HubTarget, files: Mapping[str, Path], *, upload: bool, message: str) -> Pushed:
    """Push files in one commit. Equal files that are there already are not sent.

    Args:
        files: by path in the repository.
        upload: False only says what would be sent.
        message: of the commit.

    Raises:
        UsageError: the name of the repository can't be used, or the variable of the token is empty.
        MissingPackage: the extra `hub` is not installed.
        RemoteStoreError: the Hub refuses or can't be reached.
        FindingsError: exit 1; what the Hub holds afterwards is something else.
    """
    if not _REPOSITORY.fullmatch(target.repository):
        raise UsageError("is no OWNER/NAME", place=target.repository, remedy="name it as my-name/my-corpus")
    if not files:
        raise ConfigError(
            "there is no file to push", place=target.repository, remedy="make it first, then push it again"
        )
    pushed = Pushed(target, {path: file.stat().st_size for path, file in files.items()})
    if not upload:
        return pushed
    token = os.environ.get(target.token_env)
    if not token:
        raise UsageError(
            f"the environment variable {target.token_env} holds no token",
            place=target.repository,
            remedy="set it, or name another variable with --token-env",
        )
    url = _commit(target, token, files, message)
    return Pushed(target, pushed.files, url)


def _commit(target: HubTarget, token: str, files: Mapping[str, Path], message: str) -> str:
    require("hub", "a push to the Hub")
    from huggingface_hub import CommitOperationAdd, HfApi, RepoFile
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    api = HfApi(endpoint=target.endpoint, token=token)
    named: dict[str, Any] = {"repo_id": target.repository, "repo_type": target.type}
    with _translating(target, token):
        api.create_repo(**named, private=target.private, exist_ok=True)
        operations = [
            CommitOperationAdd(path_in_repo=path, path_or_fileobj=file) for path, file in files.items()
        ]
        commit = api.create_commit(**named, operations=operations, commit_message=message)
        there = {
            entry.path: (entry.lfs.sha256 if entry.lfs else "", entry.blob_id)
            for entry in api.get_paths_info(**named, paths=list(files), revision=commit.oid)
            if isinstance(entry, RepoFile)
        }
    wrong = [path for path, file in files.items() if not _is_same(file, *there.get(path, ("", "")))]
    if wrong:
        raise FindingsError(
            f"{len(wrong)} files on the Hub are not what was pushed: {first_few(wrong, separator=', ')}",
            place=commit.commit_url,
            remedy="push again",
        )
    return str(commit.commit_url)


def _is_same(file: Path, sha256: str, blob_id: str) -> bool:
    """Compare a file with the SHA-256 of a large file on the Hub, or the git id of a small one."""
    if sha256:
        return sha256_of(file) == sha256
    digest = hashlib.sha1(f"blob {file.stat().st_size}\0".encode(), usedforsecurity=False)
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest() == blob_id


@contextlib.contextmanager
def _translating(target: HubTarget, token: str) -> Iterator[None]:
    """Turn what the client raises into a RemoteStoreError; the token is never in its text.

    Raises:
        RemoteStoreError: the Hub refuses or can't be reached.
    """
    from huggingface_hub.errors import HfHubHTTPError

    # That of all errors of the HTTP client, which differs by release.
    client_error: Any = HfHubHTTPError.__bases__[0]
    try:
        yield
    except (client_error, OSError, ValueError, RuntimeError) as error:
        causes = [str(each).strip().split("\n")[0] for each in (error, error.__cause__) if each is not None]
        text = one_line(": ".join(causes)).replace(token, "***")[:500]
        raise RemoteStoreError(
            f"the Hub refuses: {text or type(error).__name__}",
            place=f"{target.endpoint} {target.repository}",
            remedy=f"check the token in {target.token_env}, the name and the network; push again",
        ) from None
