"""Serve a GGUF file by llama.cpp's own HTTP server in a process of its own, and ask it.

    python -m trainer.evaluation.llama_server FILE THREADS CONTEXT [ADAPTER]

The process needs `xllamacpp` (llama.cpp as a wheel). It prints its address and serves until its input ends,
so it does not outlive the process that started it.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from trainer.errors import ConfigError, StudentError

# Seconds for one reply: a large model on a slow machine.
_TIMEOUT_S = 3600.0


@dataclass(frozen=True, slots=True)
class ServedAnswer:
    """One greedy answer of a server.

    Attributes:
        text: without the token that ended it.
        is_cut: it reached the limit of tokens instead of an end.
        tokens: tokens that were written. write_s: seconds that took.
        prompt_tokens: tokens that were read. read_s: seconds that took.
    """

    text: str
    is_cut: bool
    tokens: int
    write_s: float
    prompt_tokens: int
    read_s: float


class LlamaServer:
    """Ask a server that listens on this machine."""

    def __init__(self, address: str) -> None:
        """Args: address: such as "http://127.0.0.1:8080"."""
        self._place = address.removeprefix("http://")

    def rendered(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] = ()) -> str:
        """Return the prompt that the server makes of a conversation by the template in its file."""
        body: dict[str, Any] = {"messages": list(messages), **({"tools": list(tools)} if tools else {})}
        return str(self._post("/apply-template", body)["prompt"])

    def token_ids(self, text: str) -> list[int]:
        """Return the ids of a text whose special tokens are control tokens, as those of a prompt are."""
        body = {"content": text, "add_special": False, "parse_special": True}
        return list(self._post("/tokenize", body)["tokens"])

    def answer(self, prompt: str, max_new_tokens: int) -> ServedAnswer:
        """Continue a prompt greedily."""
        reply = self._post(
            "/completion",
            {"prompt": prompt, "temperature": 0, "n_predict": max_new_tokens, "cache_prompt": False},
        )
        timings = reply["timings"]
        return ServedAnswer(
            text=str(reply["content"]),
            is_cut=reply["stop_type"] == "limit",
            tokens=int(timings["predicted_n"]),
            write_s=float(timings["predicted_ms"]) / 1000,
            prompt_tokens=int(timings["prompt_n"]),
            read_s=float(timings["prompt_ms"]) / 1000,
        )

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self._place, timeout=_TIMEOUT_S)
        with contextlib.closing(connection):
            headers = {"Content-Type": "application/json"}
            connection.request("POST", path, json.dumps(body).encode(), headers)
            reply = connection.getresponse()
            content = reply.read()
        if reply.status != 200:
            raise StudentError(
                f"llama.cpp's server refuses {path}: {content[:200].decode(errors='replace')}",
                place=self._place,
                remedy="a prompt may not fit the context; leave out --gguf to score the student without "
                "this server",
            )
        return dict(json.loads(content))


def require_server() -> None:
    """Do nothing where llama.cpp's server can be imported.

    Raises:
        ConfigError: it is not installed.
    """
    if importlib.util.find_spec("xllamacpp") is None:
        raise ConfigError(
            "llama.cpp's server is not installed (xllamacpp)",
            place="--gguf",
            remedy="pip install 'blackbox-distillation[gguf]'",
        )


@contextlib.contextmanager
def serving(file: Path, *, threads: int, context: int, adapter: Path | None = None) -> Iterator[LlamaServer]:
    """Serve a GGUF file until the block ends.

    Args:
        threads: CPU threads. context: tokens of prompt and answer together.
        adapter: GGUF file of a LoRA adapter on that model.

    Raises:
        StudentError: llama.cpp can't load the file; has the last lines of its log.
    """
    words = [str(file), str(threads), str(context), *([str(adapter)] if adapter else [])]
    with TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", __spec__.name, *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            address = process.stdout.readline().strip()  # it listens once it says so
            if not address:
                process.wait()
                log.seek(0)
                said = " ".join(line.strip() for line in log.readlines()[-3:])
                raise StudentError(
                    f"llama.cpp can't serve the file: {said}",
                    place=str(file),
                    remedy="write the file again with `trainer export --gguf`, and check the free memory",
                )
            try:
                yield LlamaServer(address)
            finally:
                process.stdin.close()
                try:
                    process.wait(timeout=60)
                except subprocess.TimeoutExpired:
                    process.kill()


def main() -> None:
    """Serve as the command line says."""
    import xllamacpp

    file, threads, context, *adapter = sys.argv[1:]
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.hostnames = ["127.0.0.1"]
    params.port = 0
    params.n_parallel = 1
    params.n_ctx = int(context)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = int(threads)
    if adapter:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter[0], 1.0)]
    server = xllamacpp.Server(params)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main()
