"""Send requests through the provider's Batch API: files of requests and answers, at half the price.

The Batch API client; no verb uses it yet. It is the only module that imports `openai`: the SDK is good at
files and batches, and single requests don't go through it. Custom ids are request keys, so a result finds its
row in whatever order it comes. A batch that was created before a crash is found again by its metadata, so it
isn't paid for twice.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final, Self

import openai
import orjson

from harvester import __version__
from harvester.api.types import RawAnswer, Request
from harvester.config.config import TeacherSection
from harvester.errors import BrokenAnswer, HarvesterError, TeacherRefused, TeacherUnavailable

ENDPOINT: Final = "/v1/chat/completions"
FINISHED = frozenset({"completed", "failed", "expired", "cancelled"})
# Requests in one batch file: the provider's own limit.
MAX_REQUESTS = 50_000


@dataclass(frozen=True, slots=True)
class Ticket:
    """A batch at the provider: what must be stored to collect its results later."""

    batch_id: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    completed: int
    failed: int
    total: int

    @property
    def is_finished(self) -> bool:
        """Whether no more answers will come. An expired batch still has those that were finished."""
        return self.status in FINISHED


@dataclass(frozen=True, slots=True)
class BatchResult:
    """One line of a result file: an answer, or an error's code and message."""

    key: bytes
    answer: RawAnswer | None
    error_code: str = ""
    message: str = ""


def batch_lines(requests: Iterable[Request]) -> bytes:
    """The requests as a batch file (JSON Lines of custom_id, method, url, body).

    Raises:
        ValueError: no request, or more than the provider takes in one file.
    """
    lines = [
        orjson.dumps({"custom_id": r.key.hex(), "method": "POST", "url": ENDPOINT, "body": dict(r.body)})
        for r in requests
    ]
    if not 0 < len(lines) <= MAX_REQUESTS:
        raise ValueError(f"a batch holds 1 to {MAX_REQUESTS} requests, got {len(lines)}")
    return b"\n".join(lines) + b"\n"


def read_results(body: bytes, *, endpoint: str, received_at: float) -> Iterable[BatchResult]:
    """Parse the lines of a result or error file.

    Raises:
        BrokenAnswer: a line is no result; the error has its bytes in `raw`.
    """
    for number, line in enumerate(body.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = orjson.loads(line)
            key = bytes.fromhex(row["custom_id"])
            response = row.get("response") or {}
            content = response.get("body")
            failure = (content.get("error") if isinstance(content, dict) else None) or row.get("error") or {}
            code = failure.get("code") or "batch_error"
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BrokenAnswer(
                f"line {number} of a batch result is not one: {error}", raw=line[:2048], maybe_billed=True
            ) from None
        if response.get("status_code") == 200:
            raw = orjson.dumps(content)
            yield BatchResult(key, RawAnswer(200, {}, raw, endpoint, 0.0, received_at))
        else:
            yield BatchResult(key, None, str(code), str(failure.get("message", "")))


class BatchClient:
    """The Files and Batches endpoints of one teacher. One credential, no retry layer of its own.

    Raises:
        TeacherRefused: the provider refuses the key, the file or the endpoint.
        TeacherUnavailable: the provider can't be reached now; the call may be repeated.
    """

    def __init__(self, teacher: TeacherSection, key: str | None) -> None:
        self._headers: dict[str, Any] = {"User-Agent": f"blackbox-distillation/{__version__}"}
        if key is None:
            self._headers["Authorization"] = openai.Omit()  # how the SDK leaves a header out
        self._teacher = teacher
        self._client = openai.AsyncOpenAI(
            api_key=key or "none",
            base_url=teacher.base_url,
            max_retries=0,
            http_client=_http_client(teacher),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def submit(self, requests: Iterable[Request], *, run_id: str) -> Ticket:
        """Upload the requests and create a batch, with the run id in its metadata."""
        content = batch_lines(requests)
        try:
            file = await self._client.files.create(
                file=(f"{run_id}.jsonl", content), purpose="batch", extra_headers=self._headers
            )
            batch = await self._client.batches.create(
                input_file_id=file.id,
                endpoint=ENDPOINT,
                completion_window="24h",
                metadata={"run_id": run_id},
                extra_headers=self._headers,
            )
        except openai.OpenAIError as error:
            raise self._translated(error) from None
        return _ticket(batch)

    async def poll(self, batch_id: str) -> Ticket:
        """Ask for the state of a batch."""
        try:
            return _ticket(await self._client.batches.retrieve(batch_id, extra_headers=self._headers))
        except openai.OpenAIError as error:
            raise self._translated(error) from None

    async def find(self, run_id: str) -> list[Ticket]:
        """Find the batches of a run by their metadata, also those that a crash left unrecorded."""
        try:
            return [
                _ticket(batch)
                async for batch in self._client.batches.list(limit=100, extra_headers=self._headers)
                if (batch.metadata or {}).get("run_id") == run_id
            ]
        except openai.OpenAIError as error:
            raise self._translated(error) from None

    async def collect(self, ticket: Ticket, *, received_at: float) -> AsyncIterator[BatchResult]:
        """Yield the finished answers and errors of a batch, in the order the provider wrote them."""
        for file_id in (ticket.output_file_id, ticket.error_file_id):
            if file_id is None:
                continue
            try:
                content = await self._client.files.content(file_id, extra_headers=self._headers)
            except openai.OpenAIError as error:
                raise self._translated(error) from None
            for result in read_results(
                content.content, endpoint=self._teacher.base_url, received_at=received_at
            ):
                yield result

    def _translated(self, error: openai.OpenAIError) -> HarvesterError:
        """Our error for one of the SDK. It keeps no reference to it: the SDK's has the request's headers."""
        status = error.status_code if isinstance(error, openai.APIStatusError) else None
        place = self._teacher.base_url
        if status is not None and status < 500 and status != 429:
            return TeacherRefused(
                f"the Batch API answered {status}",
                status=status,
                place=place,
                remedy="does this teacher offer /files and /batches, and may this key use them?",
            )
        return TeacherUnavailable("the Batch API can't be used now", status=status, place=place)


def _http_client(teacher: TeacherSection) -> Any:
    """An HTTP client for the SDK that follows no redirects: the SDK's own would send the key along."""
    verify: ssl.SSLContext | bool = True
    if teacher.ca_file is not None:
        verify = ssl.create_default_context()
        verify.load_verify_locations(teacher.ca_file)
    return openai.DefaultAsyncHttpxClient(follow_redirects=False, trust_env=False, verify=verify)


def _ticket(batch: openai.types.Batch) -> Ticket:
    counts = batch.request_counts
    return Ticket(
        batch_id=batch.id,
        status=batch.status,
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        completed=counts.completed if counts else 0,
        failed=counts.failed if counts else 0,
        total=counts.total if counts else 0,
    )
