"""Plain http is for loopback and private networks without a credential; elsewhere only by a switch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from harvester.config.config import parse
from harvester.errors import ConfigError, TermsRefused
from harvester.run.planning import plan
from harvester.run.prepare import prepare
from harvester.system.hosts import is_private

PRIVATE = (
    *("127.0.0.2", "10.0.0.5", "172.16.3.4", "172.31.255.1", "192.168.1.9", "169.254.7.7"),
    *("[fe80::1]", "[fd12:3456::1]", "vllm", "vllm-0", "vllm.models.svc"),
    *("vllm.models.svc.cluster.local", "nas.local", "gpu.corp.internal"),
)
PUBLIC = (
    *("example.com", "8.8.8.8", "172.32.0.1", "172.15.9.9", "192.169.0.1", "11.0.0.1", "100.64.0.1"),
    *("[2001:db8::1]", "local.example.com", "0x7f000001", "2130706433"),
    *("10.1", "0.0.0.0", "internal.com"),
)


def read(host: str, **teacher: Any) -> Any:
    table = {"base_url": f"http://{host}:8000/v1", "model": "m", **teacher}
    return parse({"teacher": table, "prompts": {"files": ["a.jsonl"]}}, place="harvest.toml")


@pytest.mark.parametrize("host", PRIVATE)
def test_private_addresses_need_no_switch_without_a_key(host: str) -> None:
    assert plan.warnings(read(host)) == ()
    with pytest.raises(ConfigError, match="API key"):
        read(host, api_key_env="KEY")
    (warning,) = plan.warnings(read(host, api_key_env="KEY", allow_http=True))
    assert host.strip("[]") in warning
    assert "API key" in warning


@pytest.mark.parametrize("host", PUBLIC)
def test_public_addresses_need_https_or_the_switch(host: str) -> None:
    with pytest.raises(ConfigError, match="use https"):
        read(host)
    assert len(plan.warnings(read(host, allow_http=True))) == 1
    with pytest.raises(ConfigError):
        read("10.0.0.5", replicas=[f"http://{host}:8000/v1"])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_loopback_takes_a_key_without_a_word(host: str) -> None:
    assert plan.warnings(read(host, api_key_env="KEY")) == ()


def test_names_that_only_end_alike_are_not_private() -> None:
    assert not is_private("evil-svc.example.com")
    assert not is_private("notlocal.com")
    assert not is_private("x.svc.example.com")


RECORDS = """
[[record]]
id = "own-server"
layer = "{layer}"
match = {{ host = "gpu.corp.internal", model = "mymodel*" }}
verdict = "permit"
gist = "our own server and model"
licence = "LicenseRef-own"
url = "https://example.com"
source = "ourselves"
established = "primary"
seen = 2026-11-01
review_after = 2027-04-01
covers_weights = {covers}
"""


def test_each_run_warns_of_a_key_on_plain_http_and_the_terms_are_asked_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEY", "sk-test")
    (tmp_path / "a.jsonl").write_text('{"prompt": "Say a."}\n')
    path = tmp_path / "harvest.toml"
    path.write_text(
        '[teacher]\nbase_url = "http://gpu.corp.internal:8000/v1"\nmodel = "mymodel"\napi_key_env = "KEY"\n'
        'allow_http = true\n[prompts]\nfiles = ["a.jsonl"]\n'
    )
    with pytest.raises(TermsRefused):
        prepare(path)
    (tmp_path / "terms").mkdir()
    (tmp_path / "terms" / "own.toml").write_text(RECORDS.format(layer="service", covers="true"))
    for _ in range(2):
        assert sum("plain http" in line for line in prepare(path).lines()) == 1
