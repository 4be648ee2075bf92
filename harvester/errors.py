"""Define all errors of the harvester, as one tree.

HarvesterError                      has a cause, a place, a remedy and an exit code
├── UsageError                  2   the operator must change something before we start
│   ├── ConfigError                 harvest.toml, a teacher row, a flag
│   ├── MissingPackage              a package of an extra is not installed
│   └── PromptError                 a prompt file, with file and line
│       └── NoPrompts                   no file or no prompt; a watching run waits
├── TermsRefused               77   the terms do not permit this use
├── StoreError                  5   the disk or the files on it
│   ├── StoreFull                   ENOSPC, EDQUOT, or less than the reserve is free
│   ├── StoreCorrupt                bytes are not what was written
│   ├── RemoteStoreError            object storage that can't be reached, refuses, or lacks an object
│   └── StoreFormatError            written by another version of the format
├── StoreLocked                75   another process holds the store
│   └── ShardsInUse                 another process reads the shards; nothing was changed
├── StoppedAtLimit             10   a ceiling the user set; resumable
├── Interrupted           130/143   a signal; drained; resumable
├── FindingsError               1   `verify` or `--check` found something
├── TooManyFailures             3   complete, but more failed or unusable than max_failed, max_unusable allow
├── TeacherChanged                  a canary got another model or other answers; reported, ends nothing
└── TeacherError                    one attempt brought no answer
    ├── transient: the same request may succeed later
    │   ├── RateLimited             429/503/529 with a wait; costs no attempt
    │   ├── TeacherUnavailable      5xx, 408, 409, connection refused, DNS failure
    │   ├── AttemptTimeout          no last byte within deadline_s (possibly billed)
    │   ├── ResultsDeleted          a batch whose results the provider no longer has (possibly billed)
    │   ├── ConnectionBroken        reset, cut body, garbage status line (possibly billed)
    │   └── BrokenAnswer            a 200 without a completion; raw bytes are kept
    └── permanent
        ├── PossiblyBilled          may have been billed, and must not be sent again: a dead letter
        ├── PromptRejected          this prompt will never be answered: a dead letter
        └── TeacherRefused      4   this key, quota, model, policy or address: the run stops

Control flow: raised by one part of a pass and handled by another; these never reach the operator.

Exception
├── NotSent                         the pass is draining: the request stays open for the next run
├── Parked                          the teacher asks for a longer wait than `patience_s`: the pass ends
├── EndpointDown                    the endpoint went down while a request waited for it; another is up
└── RequestFailed                   no answer for this request: it becomes a dead letter

`is_permanent` says whether a retry can help; nothing ever parses messages. `code` is a stable short name
(`harvester explain CODE`), also stored as the reason of a dead letter.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from enum import StrEnum

EXIT_COMPLETE = 0

# Latest time `Parked.message` can print, in Unix seconds: the last day `datetime` knows.
_LAST_DAY = datetime(9999, 12, 31, tzinfo=UTC).timestamp()


class HarvesterError(Exception):
    """Something failed that has no error of its own. Base of all errors.

    Args:
        message: what happened, one plain line.
        place: where: `file:line`, a key of a config file, a URL's host and path. Never a secret.
        remedy: what the reader can do about it.
    """

    code = "failed"
    exit_code = 1
    is_permanent = True

    def __init__(self, message: str, *, place: str = "", remedy: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.place = place
        self.remedy = remedy

    def __str__(self) -> str:
        where = f"{self.place}: " if self.place else ""
        then = f" ({self.remedy})" if self.remedy else ""
        return f"{where}{self.message}{then}"


class UsageError(HarvesterError):
    """The operator must change something before anything starts."""

    code = "usage"
    exit_code = 2


class ConfigError(UsageError):
    """A configuration value is missing, unknown or impossible."""

    code = "config"


class MissingPackage(UsageError):
    """A command needs a package that is not installed; it belongs to an extra of this program."""

    code = "missing_package"


class PromptError(UsageError):
    """A prompt file, or a line of it, can't be used."""

    code = "prompt_file"


class NoPrompts(PromptError):
    """A name or glob matches no file, or the files hold no prompt. A watching run waits for them."""

    code = "no_prompts"


class TermsRefused(HarvesterError):
    """The recorded terms do not permit this use. There is no override flag."""

    code = "terms"
    exit_code = 77


class StoreError(HarvesterError):
    """The disk of the store fails, or its files are not usable."""

    code = "store"
    exit_code = 5


class StoreFull(StoreError):
    """The disk is full (ENOSPC, EDQUOT, or less than the reserve is free)."""

    code = "store_full"


class StoreCorrupt(StoreError):
    """The bytes on disk are not those that were written."""

    code = "store_corrupt"


class StoreFormatError(StoreError):
    """The store was written by another version of the format."""

    code = "store_format"


class RemoteStoreError(StoreError):
    """The object storage can't be reached, refuses, or does not hold what it should."""

    code = "remote_store"


class StoreLocked(HarvesterError):
    """Another process holds the store."""

    code = "locked"
    exit_code = 75


class ShardsInUse(StoreLocked):
    """Another process reads the shards, so they can't be replaced now. Nothing has changed."""

    def __init__(self, folder: object) -> None:
        super().__init__(
            "another process is reading these shards",
            place=str(folder),
            remedy="wait for its end (a training, an export), then run this again",
        )


class StoppedAtLimit(HarvesterError):
    """A limit that the user set was reached: money, tokens, rows or time. The run can be resumed."""

    code = "limit"
    exit_code = 10


class Interrupted(HarvesterError):
    """A signal ended the run; paid answers are stored. The run can be resumed."""

    code = "interrupted"
    exit_code = 130

    def __init__(self, message: str, *, signal_number: int, place: str = "", remedy: str = "") -> None:
        super().__init__(message, place=place, remedy=remedy)
        self.exit_code = 128 + signal_number


class FindingsError(HarvesterError):
    """`verify` or `--check` found a problem."""

    code = "findings"
    exit_code = 1


class TooManyFailures(HarvesterError):
    """The run is complete, but too many rows failed (`max_failed`) or are unusable (`max_unusable`)."""

    code = "too_many_failures"
    exit_code = 3


class TeacherChanged(HarvesterError):
    """A canary found another model, another build or other answers than before; the run goes on or pauses."""

    code = "drift"


class TeacherError(HarvesterError):
    """One attempt at a teacher brought no answer.

    Args:
        status: HTTP status, None when no status line arrived.
        error_code: the teacher's own code (`error.code` or `error.type`), unchanged.
        retry_after_s: seconds the teacher asked us to wait, None when it named no time.
        raw: body bytes as received (capped), kept for the record.
        maybe_billed: the teacher may have generated, and charged for, an answer we don't have.
        headers: of the reply, with lower-case names; they may state rate limits.

    Attributes:
        endpoint: base URL of the attempt, "" where it was not noted.
    """

    code = "teacher"
    exit_code = 4

    def __init__(  # noqa: PLR0913 - one value per fact of the attempt; all keyword-only
        self,
        message: str,
        *,
        status: int | None = None,
        error_code: str = "",
        retry_after_s: float | None = None,
        raw: bytes = b"",
        maybe_billed: bool = False,
        headers: Mapping[str, str] | None = None,
        place: str = "",
        remedy: str = "",
    ) -> None:
        super().__init__(message, place=place, remedy=remedy)
        self.status = status
        self.error_code = error_code
        self.retry_after_s = retry_after_s
        self.raw = raw
        self.maybe_billed = maybe_billed
        self.headers: Mapping[str, str] = headers or {}
        self.endpoint = ""

    def note_endpoint(self, base_url: str) -> None:
        """Note where the attempt was sent; only the sender knows it."""
        self.endpoint = base_url

    def note_possibly_billed(self) -> None:
        """Note that the teacher may have charged for the attempt."""
        self.maybe_billed = True


class RateLimited(TeacherError):
    """The teacher asks us to slow down (429, or 503/529 as overload). Uses up no attempt."""

    code = "rate_limited"
    is_permanent = False


class TeacherUnavailable(TeacherError):
    """The teacher or the way to it fails: 5xx, 408, 409, connection refused, DNS failure."""

    code = "unavailable"
    is_permanent = False


class AttemptTimeout(TeacherError):
    """The last byte did not arrive within the attempt's deadline."""

    code = "timeout"
    is_permanent = False


class ConnectionBroken(TeacherError):
    """The connection ended before the answer did: reset, cut body, invalid status line."""

    code = "connection"
    is_permanent = False


class ResultsDeleted(TeacherError):
    """A batch was worked on, and the provider no longer has its results or the batch."""

    code = "results_deleted"
    is_permanent = False


class BrokenAnswer(TeacherError):
    """A 200 whose body has no completion: invalid JSON, HTML, no choices, an error inside."""

    code = "broken_answer"
    is_permanent = False


class PromptRejected(TeacherError):
    """The teacher never answers this prompt: the row has failed (a dead letter)."""

    code = "prompt_rejected"


class PossiblyBilled(TeacherError):
    """An attempt may have been billed without bringing an answer, and the run must not send it again."""

    code = "possibly_billed"


class TeacherRefused(TeacherError):
    """The teacher refuses this key, account, model or address: the run stops."""

    code = "teacher_refused"


class NotSent(Exception):
    """The pass is draining: this request was not sent and stays open for the next run."""


class Parked(Exception):
    """The teacher asks for a longer wait than `patience_s`: the pass ends, and a later one continues.

    Args:
        wait_s: seconds until it makes sense to continue, 0 when that is not a matter of time.
        reason: one plain line for the operator.
    """

    def __init__(self, wait_s: float, reason: str) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        self.reason = reason

    def message(self, wall: float) -> str:
        """Say why the pass ended and when to continue; `wall` is now in Unix seconds."""
        at = datetime.fromtimestamp(min(_LAST_DAY, wall + self.wait_s), UTC)
        return f"{self.reason}; go on after {at:%Y-%m-%d %H:%M:%S} UTC"


class EndpointDown(Exception):
    """This endpoint went down while the request waited for it, and another endpoint is up."""


class RequestFailed(Exception):
    """This prompt gets no answer: its last error and the number of attempts. It becomes a dead letter."""

    def __init__(self, error: TeacherError, attempts: int) -> None:
        super().__init__(str(error))
        self.error = error
        self.attempts = attempts


class Ending(StrEnum):
    """How a run ended. The value is its `state` in status.json and its `ending` in the journal.

    `exit_code` is the code of the ending itself. Two things change it: a signal (128 + its number), and more
    failed rows than `max_failed`, or unusable answers than `max_unusable`, in a complete run (3).
    """

    exit_code: int

    COMPLETE = "complete", EXIT_COMPLETE
    # As many rows are accepted as `[accept] until` asks for.
    ACCEPTED = "accepted", EXIT_COMPLETE
    # A signal: the run drained, or a second signal cut it short. 130 is that of SIGINT.
    INTERRUPTED = "interrupted", Interrupted.exit_code
    ABORTED = "aborted", Interrupted.exit_code
    # A ceiling, the operator, the schedule or a long wait. The same command continues the run.
    ROWS = "rows", StoppedAtLimit.exit_code
    BUDGET = "budget", StoppedAtLimit.exit_code
    RUNTIME = "runtime", StoppedAtLimit.exit_code
    PARKED = "parked", StoppedAtLimit.exit_code
    STOPPED = "stopped", StoppedAtLimit.exit_code
    HOURS = "hours", StoppedAtLimit.exit_code
    DEADLINE = "deadline", StoppedAtLimit.exit_code
    # An error: the value is the error's `code`.
    TERMS = TermsRefused.code, TermsRefused.exit_code
    TEACHER_REFUSED = TeacherRefused.code, TeacherRefused.exit_code
    TEACHER = TeacherError.code, TeacherError.exit_code
    STORE = StoreError.code, StoreError.exit_code
    STORE_FULL = StoreFull.code, StoreFull.exit_code
    STORE_CORRUPT = StoreCorrupt.code, StoreCorrupt.exit_code
    STORE_FORMAT = StoreFormatError.code, StoreFormatError.exit_code
    USAGE = UsageError.code, UsageError.exit_code
    CONFIG = ConfigError.code, ConfigError.exit_code
    PROMPT_FILE = PromptError.code, PromptError.exit_code
    NO_PROMPTS = NoPrompts.code, NoPrompts.exit_code
    FAILED = HarvesterError.code, HarvesterError.exit_code

    def __new__(cls, value: str, exit_code: int) -> Ending:
        """Make a member of a value and its exit code."""
        member = str.__new__(cls, value)
        member._value_ = value
        member.exit_code = exit_code
        return member

    @classmethod
    def of(cls, error: HarvesterError) -> Ending:
        """Return the ending of a run that this error ended: that of its class, or of the nearest base."""
        codes = (base.code for base in type(error).__mro__ if issubclass(base, HarvesterError))
        return next(ending for code in codes for ending in cls if ending == code)


# Endings after which nothing is left to do.
COMPLETE_ENDINGS = frozenset(ending for ending in Ending if ending.exit_code == EXIT_COMPLETE)


class RunState(StrEnum):
    """What a living run does: its `state` in status.json until an `Ending` takes its place."""

    RUNNING = "running"
    ON_HOLD = "on hold"  # something holds it: the operator, the schedule, a changed teacher
    DRAINING = "draining"  # nothing new is sent; requests in flight are awaited
    SEALING = "sealing"  # the pass is over; journal rows become shards
