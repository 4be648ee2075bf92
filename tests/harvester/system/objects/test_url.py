"""URLs of object storage: what is one, what it may hold, and that a secret in it is never repeated."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harvester.errors import UsageError
from harvester.system.objects.url import parse, require_path_or_url, url_in

SECRET = "AKIA5ECRETKEY"


@pytest.mark.parametrize(
    ("text", "scheme", "prefix"),
    [
        ("s3://bucket/a/b", "s3", "bucket/a/b"),
        ("s3://bucket/a//b/", "s3", "bucket/a/b"),
        ("gs://bucket", "gs", "bucket"),
        ("az://container/x", "az", "container/x"),
        ("hf://datasets/owner/name", "hf", "datasets/owner/name"),
        ("file:///mnt/disk/x", "file", "/mnt/disk/x"),
        ("s3://b/x?endpoint_override=127.0.0.1:9000&scheme=http", "s3", "b/x"),
    ],
)
def test_a_url_is_taken_apart(text: str, scheme: str, prefix: str) -> None:
    parsed = parse(text)
    assert (parsed.scheme, parsed.prefix) == (scheme, prefix)
    assert parse(url_in(Path(text))) == parsed  # as a command's argument arrives


@pytest.mark.parametrize("text", ["store", "/a/s3:/x", "s3", "s3:", "./s3://x", "http://x/y", "s3x://a/b"])
def test_other_names_are_paths(text: str) -> None:
    assert url_in(text) == ""


@pytest.mark.parametrize(
    "text",
    [
        f"s3://{SECRET}:{SECRET}@bucket/x",
        f"hf://user:{SECRET}@datasets/x",
        f"s3://bucket/x?access_key={SECRET}",
        f"s3://bucket/x?X-Amz-Signature={SECRET}",
        f"az://c/x?sas_token={SECRET}",
        f"https://{SECRET}@bucket.example/x",
        f"s3://bucket/x#{SECRET}",
    ],
)
def test_credentials_in_a_url_are_refused_and_never_repeated(text: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse(text)
    assert SECRET not in f"{raised.value.message} {raised.value.place} {raised.value.remedy}"


@pytest.mark.parametrize("text", ["s3:///", "s3://a/../b", "file:///"])
def test_a_url_without_a_place_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse(text)


@pytest.mark.parametrize("host", ["", "localhost/"])
def test_a_host_in_a_file_url_is_refused_with_the_url_that_was_meant(host: str) -> None:
    with pytest.raises(UsageError) as raised:
        parse(f"file://{host}tmp/x")
    assert raised.value.remedy.endswith("as file:///tmp/x")


@pytest.mark.parametrize("text", ["ftp://x/y", "s3://", "s3://?region=x", "S3://bucket/x", "file://tmp/x"])
def test_what_looks_like_a_url_and_is_none_is_no_path(text: str) -> None:
    with pytest.raises(UsageError):
        require_path_or_url(text)


@pytest.mark.parametrize("text", ["store", "/a/b", "../x", "a:b/c", "file:///tmp/x", "s3://bucket/x"])
def test_paths_and_urls_are_places(text: str) -> None:
    require_path_or_url(text)


@settings(max_examples=60)
@given(st.text(max_size=40))
def test_any_text_is_a_url_or_a_usage_error(text: str) -> None:
    for candidate in (text, f"s3://{text}", f"file:///{text}"):
        try:
            parsed = parse(candidate)
        except UsageError:
            continue
        assert ".." not in parsed.prefix.split("/")
        assert parsed.prefix.strip("/")
