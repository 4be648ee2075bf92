"""Talk to the Files and Batches endpoints of a provider: answers in up to a day, at the batch price.

It is the only module that imports `openai`: the SDK is good at files and batches, and single requests don't
go through it. Loading it takes a second, so that waits for the first client. Custom ids are request keys, so
a result finds its row in whatever order it comes. A batch carries its name in its metadata, by which it is
found again after a crash.
"""

from __future__ import annotations

import itertools
import json
import re
import ssl
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Self

import orjson

from harvester.api.error_body import RAW_KEPT_BYTES, classify, describe, error_inside, excerpt
from harvester.api.redaction import Redactor
from harvester.api.shapes.envelopes import choices_of
from harvester.api.types import Request
from harvester.config.teacher_section import BatchApiSection, TeacherSection
from harvester.errors import BrokenAnswer, TeacherError, TeacherUnavailable
from harvester.system.command_line.extras import require
from harvester.system.command_line.version import __version__

if TYPE_CHECKING:
    import openai

FINISHED = frozenset({"completed", "failed", "expired", "cancelled"})
# The member of a batch's metadata that holds its name.
NAME: Final = "harvester_batch"
# A line of a result file may have this many bytes; an answer has some kilobytes.
MAX_LINE_BYTES = 40 * 1024 * 1024
# The list of batches is read back to this long before the batches that are looked for: clocks differ.
CLOCK_MARGIN_S = 86_400.0
# Fields of a body that only say how a single answer travels.
_ONLY_ONLINE = ("stream", "stream_options")
# Error codes of a line that was not worked on.
UNANSWERED_CODES = frozenset({"batch_expired", "batch_cancelled"})
_BODY = re.compile(r'"body"\s*:\s*')
# Members of that name that are looked at in one line.
MOST_BODIES = 4
_decoder = json.JSONDecoder()


@dataclass(frozen=True, slots=True)
class ProviderBatch:
    """A batch as the provider shows it. `failure` and `message` say why it failed, "" where it did not."""

    batch_id: str
    status: str
    output_file_id: str | None
    error_file_id: str | None
    completed: int
    failed: int
    total: int
    failure: str = ""
    message: str = ""

    @property
    def is_finished(self) -> bool:
        """Whether no more answers will come. An expired batch still has those that were finished."""
        return self.status in FINISHED


@dataclass(frozen=True, slots=True)
class ResultLine:
    """One line of a result or error file.

    Attributes:
        key: of the request.
        status: HTTP status of the reply, 200 for every answer; None where the request was not worked on.
        body: of the reply, byte for byte as the line holds it; "" for none.
        error: the line's own error, beside or in place of a reply.
    """

    key: bytes
    status: int | None
    body: bytes
    error: Mapping[str, Any]

    def failure(self, place: str) -> TeacherError:
        """Return the error that a line without an answer means, by the rules for single replies."""
        code = str(self.error.get("code") or "")
        if self.status is None and code in UNANSWERED_CODES:
            message = excerpt(str(self.error.get("message") or code))
            return TeacherUnavailable(
                f"the batch ended before this row was processed: {message}", error_code=code, place=place
            )
        if self.status is not None and self.status != 200:
            return classify(self.status, {}, self.body, place=place)
        raw = orjson.dumps({"error": dict(self.error)})[:RAW_KEPT_BYTES]
        known = error_inside({"error": dict(self.error)}, raw) if self.error else None
        return known or BrokenAnswer("a line of a batch holds neither answer nor error", raw=raw, place=place)


def body_of(request: Request) -> dict[str, Any]:
    """Return the body of a request as a line of a batch holds it: without the fields of a stream."""
    return {name: value for name, value in request.body.items() if name not in _ONLY_ONLINE}


def batch_line(key: bytes, body: Mapping[str, Any], path: str) -> bytes:
    """Return a request as a line of a batch file: custom_id, method, url, body."""
    line = {"custom_id": key.hex(), "method": "POST", "url": path, "body": dict(body)}
    return orjson.dumps(line) + b"\n"


def read_line(line: bytes) -> ResultLine:
    """Parse a line of a result or error file.

    Raises:
        BrokenAnswer: it is none; the error has its bytes in `raw`.
    """
    try:
        row = orjson.loads(line)
        key = bytes.fromhex(row["custom_id"])
        response = row.get("response") or {}
        status = response.get("status_code")
        content, error = response.get("body"), row.get("error")
        if status is None and content is None and choices_of(response)[0]:
            content = response  # Fireworks writes the completion itself
        status = None if status is None else int(status)
        if (status is None or 200 < status < 300) and isinstance(content, dict) and choices_of(content)[0]:
            status = 200
        return ResultLine(
            key,
            status,
            b"" if content is None else _as_written(line, content),
            error if isinstance(error, dict) else {},
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BrokenAnswer(
            f"a line of a batch result is not one: {error}", raw=line[:RAW_KEPT_BYTES], maybe_billed=True
        ) from None


def _as_written(line: bytes, content: Any) -> bytes:
    """Return the bytes of `response.body` in a line; encoded again where they can't be told apart."""
    try:
        text = line.decode()
        for begin in itertools.islice(_BODY.finditer(text), MOST_BODIES):
            _, end = _decoder.raw_decode(text, begin.end())
            written = text[begin.end() : end].encode()
            if orjson.loads(written) == content:
                return written
    except (ValueError, RecursionError):
        pass
    return orjson.dumps(content)


class BatchClient:
    """The Files and Batches endpoints of one teacher. One credential, no retry layer of its own.

    Every method raises a `TeacherError` by the rules for single replies: what is permanent will not change,
    the rest may be called again. `create` may have been carried out unless the error has a status below 500.
    """

    def __init__(self, teacher: TeacherSection, key: str | None, *, trust_env: bool = False) -> None:
        """Open the client; no request is sent.

        Raises:
            MissingPackage: the extra `batch` is not installed.
        """
        require("batch", "the transport `batch` or `hybrid`")
        import openai

        self._headers: dict[str, Any] = {"User-Agent": f"blackbox-distillation/{__version__}"}
        if key is None:
            self._headers["Authorization"] = openai.Omit()  # how the SDK leaves a header out
        self._place = teacher.base_url
        self._api = teacher.batch or BatchApiSection()
        self._key = key
        self.redactor = Redactor(key)
        self._client = openai.AsyncOpenAI(
            api_key=key or "none",
            base_url=teacher.base_url,
            max_retries=0,
            http_client=_http_client(teacher, trust_env),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._client.close()

    async def upload(self, name: str, content: bytes) -> str:
        """Upload a batch file; return its id. Nothing is paid for it."""
        try:
            file = await self._client.files.create(
                file=(f"{name}.jsonl", content),
                # Providers have words of their own for it.
                purpose=self._api.purpose,  # type: ignore[arg-type]
                extra_headers=self._headers,
            )
            return file.id
        except Exception as error:  # noqa: BLE001 - the SDK lets errors of the transport through
            raise self._translated(error) from None

    async def create(self, file_id: str, name: str) -> ProviderBatch:
        """Create a batch of an uploaded file, with its name in its metadata."""
        try:
            batch = await self._client.batches.create(
                input_file_id=file_id,
                endpoint=self._api.path,  # type: ignore[arg-type]
                completion_window=self._api.window,  # type: ignore[arg-type]
                metadata={NAME: name},
                extra_headers=self._headers,
            )
            return _ticket(batch)
        except Exception as error:  # noqa: BLE001
            raise self._translated(error) from None

    async def poll(self, batch_id: str) -> ProviderBatch:
        """Ask for the state of a batch."""
        try:
            return _ticket(await self._client.batches.retrieve(batch_id, extra_headers=self._headers))
        except Exception as error:  # noqa: BLE001
            raise self._translated(error) from None

    async def cancel(self, batch_id: str) -> ProviderBatch:
        """Ask for the end of a batch; what it has answered by then is kept, and paid for."""
        try:
            return _ticket(await self._client.batches.cancel(batch_id, extra_headers=self._headers))
        except Exception as error:  # noqa: BLE001
            raise self._translated(error) from None

    async def find(self, files: Mapping[str, str], *, since: float) -> dict[str, ProviderBatch]:
        """Find batches that a crash left unrecorded, by their metadata or their input file.

        Args:
            files: the file id of each name that is looked for, "" where it is unknown.
            since: when the oldest of them may have been created, in Unix seconds.
        """
        by_file = {file_id: name for name, file_id in files.items() if file_id}
        tickets: dict[str, ProviderBatch] = {}
        try:
            async for batch in self._client.batches.list(limit=100, extra_headers=self._headers):
                name = (batch.metadata or {}).get(NAME) or by_file.get(batch.input_file_id or "", "")
                if name in files:
                    tickets[name] = _ticket(batch)
                if len(tickets) == len(files) or (batch.created_at or since) < since - CLOCK_MARGIN_S:
                    break
        except Exception as error:  # noqa: BLE001
            raise self._translated(error) from None
        return tickets

    async def lines(self, file_id: str) -> AsyncIterator[bytes]:
        """Yield the lines of a result file as they come, without loading the file as a whole.

        Raises:
            BrokenAnswer: a line is longer than `MAX_LINE_BYTES`.
        """
        rest = b""
        try:
            async with self._client.files.with_streaming_response.content(
                file_id, extra_headers=self._headers
            ) as response:
                async for piece in response.iter_bytes():
                    *whole, rest = (rest + piece).split(b"\n")
                    for line in whole:
                        if line.strip():
                            yield line
                    if len(rest) > MAX_LINE_BYTES:
                        raise BrokenAnswer("a line of a batch result is too long", place=self._place)
        except TeacherError:
            raise
        except Exception as error:  # noqa: BLE001
            raise self._translated(error) from None
        if rest.strip():
            yield rest

    def _translated(self, error: Exception) -> TeacherError:
        """Our error for one of the SDK. It keeps no reference to it: the SDK's has the request's headers."""
        import openai

        if isinstance(error, openai.APIStatusError):
            headers = {name.lower(): value for name, value in error.response.headers.items()}
            try:
                body = error.response.content
            except Exception:  # noqa: BLE001 - a reply that was streamed and not read
                body = b""
            return classify(error.status_code, headers, body, place=self._place, secret=self._key)
        detail = self.redactor.string(describe(error))
        return TeacherUnavailable(f"the Batch API can't be used now: {detail}", place=self._place)


def _http_client(teacher: TeacherSection, trust_env: bool) -> Any:
    """An HTTP client for the SDK that follows no redirects: the SDK's own would send the key along."""
    import openai

    verify: ssl.SSLContext | bool = True
    if not teacher.base_url.startswith("https:"):
        verify = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # reading the public roots takes time
    elif teacher.ca_file is not None:
        verify = ssl.create_default_context()
        verify.load_verify_locations(teacher.ca_file)
    return openai.DefaultAsyncHttpxClient(follow_redirects=False, trust_env=trust_env, verify=verify)


def _ticket(batch: openai.types.Batch) -> ProviderBatch:
    counts = batch.request_counts
    errors = (batch.errors.data if batch.errors else None) or []
    return ProviderBatch(
        batch_id=batch.id,
        status=str(batch.status).lower(),
        output_file_id=batch.output_file_id,
        error_file_id=batch.error_file_id,
        completed=counts.completed if counts else 0,
        failed=counts.failed if counts else 0,
        total=counts.total if counts else 0,
        failure=next((str(each.code or "") for each in errors), ""),
        message=next((excerpt(str(each.message or "")) for each in errors), ""),
    )
