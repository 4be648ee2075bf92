"""Bring sealed shards to the mirror of `[store] mirror` while a run goes on.

Each try is a process of its own, with lower priority: a slow, hanging or failing storage takes nothing from
the harvest, and can be ended at any moment. A try that fails is repeated, ever later.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harvester.errors import ConfigError, RemoteStoreError, TermsRefused
from harvester.store.journal.group_commit import GroupCommit, on_writer
from harvester.store.journal.journal import Journal
from harvester.store.shards.manifest import read_manifest
from harvester.system.command_line.shell_words import shell_word
from harvester.system.objects import url as object_url

LOOK_EVERY_S = 5.0
LONGEST_WAIT_S = 300.0
# How long a run that is complete waits for the last shards, and one that was interrupted.
FINAL_S, FINAL_INTERRUPTED_S = 60.0, 5.0
_NICENESS = 10
# Begins the line with the remedy in what a command that fails prints.
_REMEDY = "  remedy "


class MirrorTask:
    """Mirrors a store during a run.

    Args:
        url: of the mirror.
        complain: is told what stands in the way, once for each message in a row.

    Attributes:
        news: for the status: url, shards, mirrored (shards), failures in a row, message, at (last success).
    """

    def __init__(
        self, store: Path, url: str, writer: GroupCommit, complain: Callable[[Exception], None]
    ) -> None:
        self._store, self._url, self._writer, self._complain = store, url, writer, complain
        self._mirrored: frozenset[str] = frozenset()
        self._shards: frozenset[str] = frozenset()
        self._trying = asyncio.Lock()
        self._next_try = 0.0
        self._needs_operator = False
        self.news: dict[str, Any] = {
            "url": str(object_url.parse(url)),
            "shards": 0,
            "mirrored": 0,
            "failures": 0,
            "message": "",
            "at": None,
        }

    async def run(self) -> None:
        """Mirror what is sealed, until cancelled."""
        while True:
            if time.monotonic() >= self._next_try:
                async with self._trying:
                    await self._mirror()
            await asyncio.sleep(LOOK_EVERY_S)

    async def finish(self, limit_s: float) -> None:
        """Mirror what was sealed last, unless that takes longer than this."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s), self._trying:
                await self._mirror()
        await self._look()

    def note(self) -> str:
        """Return what is not mirrored yet, and how it will be; "" if everything is."""
        left = len(self._shards - self._mirrored)
        if not left:
            return ""
        what = f"{left:,} of {len(self._shards):,} shards are not mirrored at {self.news['url']} yet"
        if self._needs_operator:
            return f"{what}: {self.news['message']}"
        why = f" ({self.news['message']})" if self.news["message"] else ""
        command = f"`harvester publish {shell_word(self._store)} URL`"
        return f"{what}{why}; the next run goes on, {command} does it now"

    async def _look(self) -> None:
        self._shards = await on_writer(self._writer, _shard_names)
        self._tell()

    def _tell(self) -> None:
        self.news.update(shards=len(self._shards), mirrored=len(self._shards & self._mirrored))

    async def _mirror(self) -> None:
        """Make one try, if there is anything to mirror."""
        await self._look()
        shards = self._shards
        if shards <= self._mirrored:
            return
        message = await self._publish()
        if message:
            if message != self.news["message"]:
                self._complain(RemoteStoreError(f"the mirror fails: {message}", place=self.news["url"]))
            self.news.update(failures=self.news["failures"] + 1, message=message)
            wait_s = min(LOOK_EVERY_S * 2.0 ** self.news["failures"], LONGEST_WAIT_S)
            self._next_try = time.monotonic() + wait_s
            return
        self._mirrored = shards
        self.news.update(failures=0, message="", at=time.time())
        self._tell()

    async def _publish(self) -> str:
        """Publish the store in a process of its own; return why that failed, "" if it did not."""
        command = ("-m", "harvester", "publish", str(self._store), self._url, "--as-mirror", "--json")
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the run
            )
        except OSError as error:
            return f"no process can be started: {error.strerror or error}"
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, process.pid, _NICENESS)
        try:
            _, stderr = await process.communicate()
        except asyncio.CancelledError:
            with contextlib.suppress(ProcessLookupError):
                process.kill()  # what it wrote counts only when its manifest is there
            await process.wait()
            raise
        self._needs_operator = process.returncode in (ConfigError.exit_code, TermsRefused.exit_code)
        if process.returncode == 0:
            return ""
        return _reason(stderr.decode("utf-8", "replace")) or f"its process ended with {process.returncode}"


def _shard_names(journal: Journal) -> frozenset[str]:
    return frozenset(entry.name for entry in read_manifest(journal))


def _reason(stderr: str) -> str:
    """Return the message and the remedy of a command that failed, from what it printed."""
    lines = stderr.splitlines()
    messages = [line.partition(": ")[2] for line in lines if line.startswith("error[")]
    remedies = [line.removeprefix(_REMEDY).strip() for line in lines if line.startswith(_REMEDY)]
    message = (messages or stderr.strip().splitlines() or [""])[-1][:500]
    return f"{message}; {remedies[-1][:500]}" if messages and remedies else message
