"""A teacher that replies with exactly the bytes that a test chose for a prompt, and echoes all others."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

Reply = bytes | Callable[[], Iterator[bytes]]


def http(body: bytes = b"", headers: Mapping[str, str] | None = None, status: str = "200 OK") -> bytes:
    """A complete HTTP reply."""
    given = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    lines = [f"HTTP/1.1 {status}", *(f"{name}: {value}" for name, value in given.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def completion(text: str) -> bytes:
    """The body of a good answer."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    usage = {"prompt_tokens": 5, "completion_tokens": max(1, len(text) // 4)}
    return json.dumps({"model": "mock-teacher", "choices": [choice], "usage": usage}).encode()


@dataclass
class HostileTeacher:
    """The server and what it was asked. `replies` holds a reply for a prompt, `models` that of the list."""

    base_url: str
    replies: dict[str, Reply]
    models: Reply = field(default_factory=lambda: http(b"{}", status="404 Not Found"))
    asked: list[str] = field(default_factory=list)


@contextmanager
def hostile_teacher(replies: Mapping[str, Reply] | None = None) -> Iterator[HostileTeacher]:
    """Serve in a thread until the block ends."""
    loop = asyncio.new_event_loop()
    teacher = HostileTeacher("", dict(replies or {}))

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while head := await reader.readuntil(b"\r\n\r\n"):
                reply: Reply = teacher.models
                if head.startswith(b"POST"):
                    length = next(
                        int(line.partition(b":")[2])
                        for line in head.lower().split(b"\r\n")
                        if line.startswith(b"content-length")
                    )
                    prompt = json.loads(await reader.readexactly(length))["messages"][-1]["content"]
                    teacher.asked.append(prompt)
                    reply = teacher.replies.get(prompt) or http(completion(prompt))
                for piece in (reply,) if isinstance(reply, bytes) else reply():
                    writer.write(piece)
                    await writer.drain()
        writer.close()

    server = loop.run_until_complete(asyncio.start_server(serve, "127.0.0.1", 0, limit=1 << 20))
    teacher.base_url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1"
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield teacher
    finally:

        async def stop() -> None:
            server.close()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)
            loop.stop()

        asyncio.run_coroutine_threadsafe(stop(), loop)
        thread.join()
        loop.close()
