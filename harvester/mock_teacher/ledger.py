"""Keep the billing ledger: what the mock teacher generated and charged.

An answer is charged when its generation ends, before the first byte of the reply leaves, so a reply
that is then cut, reset or never read is charged as well. Refused requests are not charged.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from harvester.errors import ConfigError


@dataclass(frozen=True, slots=True)
class LedgerCharge:
    """One generated reply.

    Attributes:
        ordinal: number of the admitted request, from 1, since the server started.
        body_sha256: of the request body in canonical form (keys sorted, transport-only fields left out).
        prompt_sha256: of the text of the last user message.
        choices: how many answers the reply holds (`n`).
        task, right: the rule task and how many choices are right; None if the prompt is no rule task.
        at: Unix time.
        cut: the reply was not delivered whole (because of a fault, or because the caller hung up).
        fault: name of the fault rule that fired, if any.
    """

    ordinal: int
    response_id: str
    body_sha256: bytes
    prompt_sha256: bytes
    choices: int
    prompt_tokens: int
    completion_tokens: int
    at: float
    task: str | None = None
    right: int | None = None
    cut: bool = False
    fault: str | None = None

    def as_row(self) -> dict[str, Any]:
        """Return the charge as JSON values, digests in hex."""
        row = {name: getattr(self, name) for name in LedgerCharge.__slots__}
        row["body_sha256"] = self.body_sha256.hex()
        row["prompt_sha256"] = self.prompt_sha256.hex()
        return row


class Ledger:
    """The charges, in memory and, if a file is given, appended to it as one JSON line each."""

    def __init__(self, file: Path | None = None) -> None:
        self._charges: list[LedgerCharge] = []
        self._bodies: set[bytes] = set()
        self._cut = 0
        self._answers = 0
        self._prompt_tokens = 0
        self._completion_tokens = 0
        self._file: BinaryIO | None = None
        if file is not None:
            try:
                # Unbuffered: one write per line, so that a killed server leaves whole lines.
                self._file = file.open("ab", buffering=0)
            except OSError as error:
                raise ConfigError(
                    f"can't write the ledger: {error.strerror}",
                    place=str(file),
                    remedy="name a file in a folder that exists and may be written",
                ) from error

    def charge(self, charge: LedgerCharge) -> None:
        """Record one reply; it is in the file when this method returns."""
        self._charges.append(charge)
        self._bodies.add(charge.body_sha256)
        self._cut += charge.cut
        self._answers += charge.choices
        self._prompt_tokens += charge.prompt_tokens
        self._completion_tokens += charge.completion_tokens
        if self._file is not None:
            self._file.write(orjson.dumps(charge.as_row()) + b"\n")

    def totals(self) -> dict[str, int]:
        """Return sums over all charges. `bodies` counts distinct request bodies."""
        return {
            "requests": len(self._charges),
            "bodies": len(self._bodies),
            "answers": self._answers,
            "cut": self._cut,
            "prompt_tokens": self._prompt_tokens,
            "completion_tokens": self._completion_tokens,
            "total_tokens": self._prompt_tokens + self._completion_tokens,
        }

    def rows(self, since: int = 0) -> Iterable[dict[str, Any]]:
        """Return the charges from position `since` on, oldest first."""
        return (charge.as_row() for charge in self._charges[since:])

    def close(self) -> None:
        """Close the file; charges in memory stay readable."""
        if self._file is not None:
            self._file.close()
            self._file = None
