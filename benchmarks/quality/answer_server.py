"""Serve known answers as chat completions, so that right answers are harvested as a teacher's are."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@contextmanager
def serve(model: str, answers: Mapping[str, str], port: int) -> Iterator[None]:
    """Answer prompts on a port of 127.0.0.1 during a block. A prompt without an answer gets status 404."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": model, "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            prompt = body["messages"][-1]["content"]
            answer = answers.get(prompt)
            if answer is None:
                self._send(404, {"error": {"message": "no answer to this prompt"}})
                return
            sent, received = len(prompt), len(answer)
            message = {"role": "assistant", "content": answer}
            self._send(
                200,
                {
                    "id": "answer",
                    "object": "chat.completion",
                    "created": 0,
                    "model": model,
                    "choices": [{"index": 0, "message": message, "finish_reason": "stop"}],
                    "usage": {
                        "prompt_tokens": sent,
                        "completion_tokens": received,
                        "total_tokens": sent + received,
                    },
                },
            )

        def _send(self, status: int, value: object) -> None:
            content = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Write no log."""

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
