"""Decide what becomes of a request without an answer: a dead letter, or the end of the pass.

A request ends in one of three ways. It is stored: its answer is in the journal. It is dead-lettered: the
journal says why it gets no answer. Or it is released: nothing is written, and the next run sends it again.

A request that fails while others are answered is dead-lettered, also with HTTP 403 or 404, or when the
teacher names the prompt as the reason (moderation). Until that is known the failure is held. After many
failures in a row the configuration or the endpoint must be wrong: the held requests are released, and the
pass ends. With `[run] retry_possibly_billed = false`, a request that may have been billed before is not sent
again.
"""

from __future__ import annotations

from collections.abc import Iterator

from harvester.api.error_body import SETUP_CODES
from harvester.api.error_fields import MODERATION_CODES
from harvester.api.request_key import request_key
from harvester.api.scoring.request_forms import endpoint_in_key
from harvester.api.types import Request
from harvester.config.config import HarvestConfig
from harvester.errors import (
    Parked,
    PossiblyBilled,
    PromptRejected,
    RequestFailed,
    TeacherError,
    TeacherRefused,
    TeacherUnavailable,
)
from harvester.store.journal.adoptions import read_adoptions
from harvester.store.journal.journal import Journal

# The pass ends after this many different prompts failed without an answer in between.
IN_A_ROW = 20

# The pass ends after this many failures in a row if all brought HTML: a wrong URL or a sign-in page.
PAGES_IN_A_ROW = 3

WHY = "possibly billed, so not sent again: [run] retry_possibly_billed is false"

# Number of different prompts refused with HTTP 403 or 404, with no answer in between, that end the pass: the
# account or the model is refused, not the prompts.
FORBIDDEN_IN_A_ROW = 3
_OF_ACCOUNT_OR_PROMPT = frozenset({403, 404})

HeldFailure = tuple[Request, RequestFailed]


class FailureStreak:
    """Requests that failed since the last answer. Whether they are dead letters is not decided yet.

    Attributes:
        has_answers: whether this pass brought any answer.
    """

    def __init__(self) -> None:
        self.has_answers = False
        self._held: list[HeldFailure] = []

    def add(self, request: Request, failure: RequestFailed) -> TeacherError | Parked | None:
        """Hold one more failure; return why the pass must stop once there are too many, else None."""
        self._held.append((request, failure))
        error = failure.error
        if self._only_pages():
            return TeacherRefused(
                f"web pages come instead of answers: {error.message}",
                status=error.status,
                place=error.place,
                remedy="is base_url right, or is a sign-in page in between?",
            )
        forbidden = [held.prompt.id for held, failure in self._held if is_forbidden(failure.error)]
        if len(set(forbidden)) >= FORBIDDEN_IN_A_ROW:
            return error
        if len({held.prompt.id for held, _ in self._held}) < IN_A_ROW:
            return None
        if not isinstance(error, PromptRejected):
            return Parked(0.0, f"{IN_A_ROW} rows in a row failed; the last: {error.message}")
        return TeacherRefused(
            f"{IN_A_ROW} prompts in a row were rejected; the last: {error.message}",
            status=error.status,
            error_code=error.error_code,
            place=error.place,
            remedy="that looks like the configuration: check [sampling], model and the size of the prompts",
        )

    def _only_pages(self) -> bool:
        pages = sum(failure.error.error_code == "html" for _, failure in self._held)
        return pages == len(self._held) >= PAGES_IN_A_ROW

    def forbidden(self) -> TeacherError | None:
        """An HTTP 403 or 404 among the held failures, if there is one."""
        return next((failure.error for _, failure in self._held if is_forbidden(failure.error)), None)

    def answered(self) -> None:
        """Note that a request was answered."""
        self.has_answers = True

    def take(self) -> list[HeldFailure]:
        """Return all held failures and forget them."""
        held, self._held = self._held, []
        return held


def names_reason_of_row(error: TeacherError) -> bool:
    """Whether the teacher says that this prompt is the reason, as moderation does.

    Such a rejection is no hint at the configuration, however many come in a row.
    """
    return isinstance(error, PromptRejected) and error.error_code.lower() in MODERATION_CODES


def is_forbidden(error: TeacherError) -> bool:
    """Whether this is an HTTP 403 or 404, which is about account or model, or about this prompt alone.

    While other prompts are answered it is the prompt's matter: some routers refuse a flagged prompt so, or
    one whose tools or images no server of the model takes.
    """
    return (
        isinstance(error, TeacherRefused)
        and error.status in _OF_ACCOUNT_OR_PROMPT
        and error.error_code not in SETUP_CODES
    )


def as_rejected_prompt(failure: RequestFailed) -> RequestFailed:
    """The failure as that of one prompt: an HTTP 403 becomes a rejected prompt.

    A 404 may pass, as while a gateway is deployed: the next run asks again.
    """
    error = failure.error
    if not is_forbidden(error):
        return failure
    error_class = PromptRejected if error.status == 403 else TeacherUnavailable
    rejected = error_class(
        error.message,
        status=error.status,
        error_code=error.error_code,
        raw=error.raw,
        place=error.place,
        remedy="other prompts are answered, so it is this prompt and not the account or model",
    )
    return RequestFailed(rejected, failure.attempts)


class PossiblyBilledRequests:
    """Requests of earlier runs that may have been billed although no answer arrived.

    The journal keeps an intent until its answer or refund comes, so those of a killed run are known too.

    Args:
        keys: request keys with an open intent from before this pass.
        addresses: of this teacher before it was adopted by its identity. Intents hold no body, so those of
            requests without an answer keep their keys.
        never_resend: `retry_possibly_billed` is false: such requests become dead letters.
    """

    def __init__(
        self,
        keys: frozenset[bytes] = frozenset(),
        addresses: tuple[str, ...] = (),
        epoch: int = 0,
        *,
        never_resend: bool = False,
    ) -> None:
        self._keys = keys
        self._addresses = addresses
        self._epoch = epoch
        self._never_resend = never_resend

    @classmethod
    def of(cls, journal: Journal, config: HarvestConfig) -> PossiblyBilledRequests:
        """Read the keys from the journal, if the configuration forbids to send them again."""
        if config.run.retry_possibly_billed:
            return cls()
        with journal.reading() as connection:
            rows = connection.execute("SELECT DISTINCT key FROM intents").fetchall()
            adoptions = read_adoptions(connection).values()
        identity = config.teacher.identity
        addresses = tuple(each.address for each in adoptions if each.identity == identity)
        keys = frozenset(key for (key,) in rows)
        return cls(keys, addresses, config.run.epoch, never_resend=True)

    def failure_of(self, request: Request) -> RequestFailed | None:
        """Return why this request must not be sent, if an earlier attempt may have been billed."""
        if not self._keys or not self._keys.intersection(self._keys_of(request)):
            return None
        return RequestFailed(
            PossiblyBilled(f"an earlier attempt brought no answer; {WHY}", maybe_billed=True), 0
        )

    def _keys_of(self, request: Request) -> Iterator[bytes]:
        yield request.key
        for address in self._addresses:
            endpoint = endpoint_in_key(address, request.body)
            yield request_key(endpoint, request.body, request.sample_index, self._epoch)

    def relabel(self, failure: RequestFailed) -> RequestFailed:
        """Return the failure as PossiblyBilled, if that is why this pass made no further attempt."""
        error = failure.error
        if not (self._never_resend and error.maybe_billed) or error.is_permanent:
            return failure
        reason = PossiblyBilled(
            f"{error.message}; {WHY}", status=error.status, maybe_billed=True, place=error.place
        )
        return RequestFailed(reason, failure.attempts)
