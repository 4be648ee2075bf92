"""Serve a merged student by `transformers serve`, and compare its answers with those of the evaluation."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time

import pytest
import torch

from trainer.data import dataset
from trainer.data.chat_template import Renderer
from trainer.model import generate, model
from trainer.publish.export import export_merged

pytestmark = pytest.mark.slow
START_S = 240.0
# Tokens of an answer, well above those of a whole one: the server calls an answer that just fits "length".
LIMIT = 40


def free_port():
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return listening.getsockname()[1]


def asked(port, path, body=None):
    """Return the status and the body of a reply; None while nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        text = None if body is None else json.dumps(body)
        connection.request(
            "GET" if body is None else "POST", path, text, {"Content-Type": "application/json"}
        )
        reply = connection.getresponse()
        return reply.status, reply.read().decode()
    except ConnectionRefusedError:
        return None
    finally:
        connection.close()


def test_transformers_serve_gives_the_answers_of_the_evaluation(learned, tmp_path):
    config, _ = learned
    merged = tmp_path / "merged"
    export_merged(config, merged)
    renderer = Renderer(model.load_tokenizer(merged))
    held_out = dataset.read(config, learns=False).held_out[:4]
    prompts = [held.conversation for held in held_out]
    stop, pad = renderer.chat_shape.stop_id, renderer.tokenizer.pad_token_id
    limits = generate.Limits(stop_id=stop, max_new_tokens=LIMIT, batch=4, pad_id=pad)
    loaded = model.load_base(merged, torch.device("cpu"), dtype=torch.float32)
    expected = generate.generate(loaded, renderer.prompts(prompts), limits)
    assert not all(answer.is_cut for answer in expected)
    port = free_port()
    code = "from transformers.cli.transformers import main; main()"
    words = ["serve", str(merged), "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with (tmp_path / "log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, *words],
            stdout=log,
            stderr=log,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        )
        with server:
            try:
                end = time.monotonic() + START_S
                while asked(port, "/health") is None and server.poll() is None and time.monotonic() < end:
                    time.sleep(0.2)
                for prompt, answer in zip(prompts, expected, strict=True):
                    reply = asked(
                        port,
                        "/v1/chat/completions",
                        {
                            "model": str(merged),
                            "messages": list(prompt.messages),
                            "temperature": 0,
                            "max_tokens": LIMIT,
                            "stream": False,
                        },
                    )
                    assert reply is not None, (tmp_path / "log").read_text()[-2000:]
                    status, text = reply
                    assert status == 200, text
                    [choice] = json.loads(text)["choices"]
                    assert choice["message"]["content"] == renderer.decode(answer.ids)
                    assert choice["finish_reason"] == ("length" if answer.is_cut else "stop")
            finally:
                server.terminate()
