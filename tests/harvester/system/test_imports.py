"""Test imports that leave other threads room, and those that read no certificates."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import threading

from harvester.system.paused_imports import paused_imports

MODULES = 5


class CountedEvent(threading.Event):
    """An event that counts the waits for it."""

    def __init__(self) -> None:
        super().__init__()
        self.waits = 0

    def wait(self, timeout: float | None = None) -> bool:
        self.waits += 1
        return super().wait(timeout)


def test_only_the_importing_thread_pauses_before_each_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    names = [f"paused_{number}_of_{tmp_path.name}" for number in range(2 * MODULES)]
    for name in names:
        (tmp_path / f"{name}.py").write_text("value = 1\n", encoding="utf-8")
    before, hurry = list(sys.meta_path), CountedEvent()
    with paused_imports(hurry):
        other = threading.Thread(target=lambda: [importlib.import_module(name) for name in names[MODULES:]])
        other.start()
        other.join()
        assert hurry.waits == 0
        assert all(importlib.import_module(name).value == 1 for name in names[:MODULES])
    assert hurry.waits == MODULES
    assert sys.meta_path == before
    assert set(names) <= set(sys.modules)


def test_aiohttp_reads_no_certificates_and_a_client_of_ours_reads_them_all():
    code = (
        "import os\n"
        "from harvester.system.command_line.unused_imports import import_without_certificates\n"
        "import_without_certificates('aiohttp')\n"
        "import aiohttp.connector, httpx, ssl\n"
        "ours, theirs = httpx.create_ssl_context(trust_env=False), aiohttp.connector._SSL_CONTEXT_VERIFIED\n"
        "assert ours.verify_mode == ssl.CERT_REQUIRED and len(ours.get_ca_certs()) > 10\n"
        "assert theirs.verify_mode == ssl.CERT_REQUIRED and not theirs.get_ca_certs()\n"
        "print(os.environ.get('SSL_CERT_FILE'))"
    )
    others = {name: value for name, value in os.environ.items() if name != "SSL_CERT_FILE"}
    for environment in (others, {**others, "SSL_CERT_FILE": "/a/file.pem"}):
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
        assert done.stdout.strip() == str(environment.get("SSL_CERT_FILE")), done.stderr
