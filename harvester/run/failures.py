"""Dead letters that wait for a second opinion: is it the prompt, or is nothing answered any more?

A prompt that fails among others that are answered is a dead letter. Twenty in a row are no row's fault: the
configuration or the endpoint is wrong, and none of them is written off.
"""

from __future__ import annotations

from harvester.api.types import Request
from harvester.errors import GaveUp, Parked, PromptRejected, TeacherError, TeacherRefused

IN_A_ROW = 20
PAGES_IN_A_ROW = 3
HeldRejection = tuple[Request, GaveUp]


class RejectionStreak:
    """Rows given up since the last answer."""

    def __init__(self) -> None:
        self._held: list[HeldRejection] = []

    def add(self, request: Request, gone: GaveUp) -> TeacherError | Parked | None:
        """One more; at the twentieth, what it means."""
        self._held.append((request, gone))
        error = gone.error
        pages = [one for one, other in self._held if other.error.error_code == "html"]
        if len(pages) == len(self._held) >= PAGES_IN_A_ROW:
            return TeacherRefused(
                f"web pages come instead of answers: {error.message}",
                status=error.status,
                place=error.place,
                remedy="is base_url right, or is a sign-in page between?",
            )
        if len({one.prompt.id for one, _ in self._held}) < IN_A_ROW:
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

    def take(self) -> list[HeldRejection]:
        """All of them; none is held afterwards."""
        held, self._held = self._held, []
        return held
