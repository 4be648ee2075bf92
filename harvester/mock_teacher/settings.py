"""Define the settings of a mock teacher, and parse `--accuracy`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from harvester.errors import ConfigError
from harvester.mock_teacher.faults.script import Rule
from harvester.mock_teacher.tasks.judging import Preference
from harvester.mock_teacher.wire import MAX_CHOICES

EVERY_TASK = "*"
DEFAULT_ACCURACY = 0.95


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """How batches go. Seconds are those of the batch clock (`batch_jobs.BatchClock`).

    Attributes:
        validating_s, latency_s: seconds in `validating`, then from the first to the last line.
        window_s: seconds after which a batch expires.
        cancelling_s: seconds between a cancellation and its end.
        tick_s: seconds that pass at each retrieval of a batch.
        shuffle: write the output lines in another order.
        duplicate_every: write every k-th answered line twice; 0 for none.
        error_every, error_status, error_code: let every k-th line fail, unbilled.
        missing_every: leave every k-th line out of both files, although it is billed.
        model_every: let every k-th answer name another model.
        results_kept_s: seconds after its end at which result files are deleted; None keeps them.
        max_requests, max_bytes: bounds of a file; more is refused.
        max_enqueued: most lines in batches that have not ended; one more batch fails its validation.
        fails_with: error code with which every new batch fails its validation; "" for none.
        hides_list: the list of batches is empty.
    """

    validating_s: float = 0.0
    latency_s: float = 0.0
    window_s: float = 86_400.0
    cancelling_s: float = 0.0
    tick_s: float = 0.0
    shuffle: bool = False
    duplicate_every: int = 0
    error_every: int = 0
    error_status: int = 500
    error_code: str = ""
    missing_every: int = 0
    model_every: int = 0
    results_kept_s: float | None = None
    max_requests: int = 50_000
    max_bytes: int = 200_000_000
    max_enqueued: int | None = None
    fails_with: str = ""
    hides_list: bool = False


@dataclass(frozen=True, slots=True)
class MockSettings:
    """The settings of a mock teacher.

    Attributes:
        port: 0 picks a free one.
        model_folder: transformers folder that answers instead of the rules, served as `model`.
        seed: decides every answer together with the request; equal seeds give equal answers.
        accuracy: share of right answers by task name; `*` stands for every other task.
        judge_prefers: which answer of a pair wins when it is asked to judge.
        rpm, tpm: requests and tokens per minute, None = no limit.
        burst_s: how many seconds' worth of a limit are admitted at once.
        window_s: seconds of the fixed windows that the limits count in; None for a rate with a burst.
        tpm_counts: `actual` charges prompt + answer, `max` charges prompt + max_tokens up front.
        hide_limits: leave out `x-ratelimit-*`, Retry-After and the wait named in the message.
        max_concurrency: most requests at once; further ones get `concurrency_status`.
        slots: requests that are worked on at once, each for `slot_s`; all others queue, none is refused, as
            with llama.cpp, Ollama and vLLM. None = no queue.
        latency_s: mean seconds before an answer; `latency_jitter` is the half-width as a share of it.
        context_tokens: prompt + max_tokens above this is a 400 `context_length_exceeded`.
        scores: ways to score a given text that it offers, with a model (`scoring.SCORE_FORMS`); a server
            ignores the fields of the others.
        max_n: most choices of one request; `n_above` says what becomes of a request for more: `refuse` is a
            400, `fewer` answers with as many as `max_n`.
        batches: how the Batch API behaves.
        require_key_env: NAME of the variable that holds the key callers must send.
        certificate, private_key: PEM files; with them the server speaks TLS.
    """

    host: str = "127.0.0.1"
    port: int = 0
    model: str = "mock-teacher"
    model_folder: Path | None = None
    seed: int = 0
    accuracy: Mapping[str, float] = field(default_factory=lambda: {EVERY_TASK: DEFAULT_ACCURACY})
    judge_prefers: Preference = Preference.RIGHT
    rpm: float | None = None
    tpm: float | None = None
    burst_s: float = 1.0
    window_s: float | None = None
    tpm_counts: str = "actual"
    hide_limits: bool = False
    max_concurrency: int | None = None
    concurrency_status: int = 503
    slots: int | None = None
    slot_s: float = 1.0
    latency_s: float = 0.0
    latency_jitter: float = 0.0
    per_token_latency_s: float = 0.0
    context_tokens: int = 131_072
    scores: tuple[str, ...] = ("prompt_logprobs", "echo", "chat", "generate")
    max_n: int = MAX_CHOICES
    n_above: str = "refuse"
    faults: tuple[Rule, ...] = ()
    batches: BatchSettings = BatchSettings()
    ledger_file: Path | None = None
    require_key_env: str | None = None
    keep_alive_s: int = 75
    certificate: Path | None = None
    private_key: Path | None = None

    def __post_init__(self) -> None:
        checks = {
            "rpm must be above 0": self.rpm is None or self.rpm > 0,
            "tpm must be above 0": self.tpm is None or self.tpm > 0,
            "burst must be above 0 seconds": self.burst_s > 0,
            "window must be above 0 seconds": self.window_s is None or self.window_s > 0,
            "slots must be above 0": self.slots is None or self.slots > 0,
            "slot-seconds must not be negative": self.slot_s >= 0,
            "tpm-counts must be actual or max": self.tpm_counts in ("actual", "max"),
            "max-concurrency must be above 0": self.max_concurrency is None or self.max_concurrency > 0,
            "concurrency-status must be 429 or 503": self.concurrency_status in (429, 503),
            "latency must not be negative": min(self.latency_s, self.per_token_latency_s) >= 0,
            "latency-jitter must lie between 0 and 1": 0 <= self.latency_jitter <= 1,
            f"max-n must lie between 1 and {MAX_CHOICES}": 1 <= self.max_n <= MAX_CHOICES,
            "n-above must be refuse or fewer": self.n_above in ("refuse", "fewer"),
            "accuracy must lie between 0 and 1": all(0 <= share <= 1 for share in self.accuracy.values()),
            "port must lie between 0 and 65535": 0 <= self.port <= 65_535,
            "TLS needs both a certificate and its private key": (self.certificate is None)
            == (self.private_key is None),
        }
        for claim, holds in checks.items():
            if not holds:
                raise ConfigError(claim, place="mock teacher")


def parse_accuracy(text: str) -> dict[str, float]:
    """Read `0.9`, `sum=0.8,reverse=0.99` or `0.9,sum=0.8`; tasks not named keep the default.

    Raises:
        ConfigError: a part is neither a number nor `task=number`, or outside 0..1.
    """
    shares = {EVERY_TASK: DEFAULT_ACCURACY}
    for part in text.split(","):
        task, equals, number = part.strip().rpartition("=")
        try:
            share = float(number)
        except ValueError:
            share = -1.0
        if not 0 <= share <= 1 or (equals and not task):
            raise ConfigError(
                f"{part.strip()!r} is not an accuracy",
                place="--accuracy",
                remedy="write 0.9 or sum=0.8,reverse=0.99",
            )
        shares[task or EVERY_TASK] = share
    return shares
