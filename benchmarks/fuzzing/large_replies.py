"""Make large replies of hostile kinds from short recipes, and serve them from a process of its own.

`python -m fuzzing.large_replies` prints its port. The last message of a request is the recipe of its reply,
so that the process which is measured never holds what it was made of.
"""

from __future__ import annotations

import gzip
import json
import socketserver
from dataclasses import dataclass
from random import Random

from . import bodies, mutate
from .scaling import BODIES

# The harvester reads no larger body. Written down here again: it must not follow the code that it tests.
MAX_BODY_BYTES = 32 << 20
_NO_LIST = b"HTTP/1.1 404 Not Found\r\ncontent-length: 2\r\n\r\n{}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a reply is made from, as `text`; equal texts give equal bytes."""

    text: str

    @classmethod
    def of_shape(cls, name: str, size_bytes: int = MAX_BODY_BYTES) -> Recipe:
        """Return the recipe of a reply in one of the shapes (`BODIES`)."""
        return cls(f"{name}, {size_bytes} bytes")

    @classmethod
    def random(cls, seed: int, number: int) -> Recipe:
        """Return the recipe of a mutated body of any shape, size, status and encoding."""
        return cls(f"random {seed}:{number}")

    def reply(self) -> bytes:
        """Make the whole HTTP reply."""
        if self.text.startswith("random "):
            return _random_reply(Random(self.text))
        name, _, size = self.text.rpartition(", ")
        size_bytes = int(size.removesuffix(" bytes"))
        return http(BODIES[name](max(0, size_bytes - 1000))[:size_bytes])


def all_shapes() -> list[Recipe]:
    """Return the recipes of a reply at the size limit in each shape."""
    return [Recipe.of_shape(name) for name in BODIES]


def _random_reply(random: Random) -> bytes:
    size = int(2 ** random.uniform(13, 25))
    if random.random() < 0.5:
        body = BODIES[random.choice(list(BODIES))](size)
    else:
        unit = mutate.mutate_bytes(random, bodies.make_body(random).raw) or b"{}"
        body = unit * (size // len(unit) + 1)
    if random.random() < 0.5:
        cut = random.randrange(len(body) + 1)
        body = body[:cut] + mutate.mutate_bytes(random, body[cut : cut + 1000]) + body[cut + 1000 :]
    statuses = ("200 OK", "200 OK", "200 OK", "400 Bad Request", "422 Unprocessable Entity")
    return http(body[:MAX_BODY_BYTES], random.choice(statuses), random.choice(("", "", "gzip")))


def http(body: bytes, status: str = "200 OK", encoding: str = "") -> bytes:
    """Return a whole HTTP reply."""
    if encoding == "gzip":
        body = gzip.compress(body, 1)
    lines = [f"HTTP/1.1 {status}", "content-type: application/json", f"content-length: {len(body)}"]
    lines += [f"content-encoding: {encoding}"] if encoding else []
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


class Handler(socketserver.StreamRequestHandler):
    """Answers the requests of one connection."""

    def handle(self) -> None:
        """Answer until the client closes the connection."""
        while line := self.rfile.readline():
            length = 0
            while header := self.rfile.readline().strip().lower():
                if header.startswith(b"content-length:"):
                    length = int(header.partition(b":")[2])
            request = self.rfile.read(length)
            if line.startswith(b"POST"):
                recipe = Recipe(json.loads(request)["messages"][-1]["content"])
                self.wfile.write(recipe.reply())
            else:
                self.wfile.write(_NO_LIST)


class Server(socketserver.ThreadingTCPServer):
    """A thread for each connection; a broken one ends its own thread silently."""

    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Ignore it: the client closed the connection."""


if __name__ == "__main__":
    with Server(("127.0.0.1", 0), Handler) as server:
        print(server.server_address[1], flush=True)
        server.serve_forever()
