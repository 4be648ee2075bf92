"""Count the share of requests that is refused whatever the rate. Pure."""

from __future__ import annotations

# The weight of a send halves with this many later ones. A share below the least is none.
SHARE_SENDS = 300
LEAST_UNRELATED = 0.005
MOST_UNRELATED = 0.2


class UnrelatedRefusals:
    """The share of refusals among the sends at times when the rate was not their reason.

    Attributes:
        share: 0 for none.
    """

    def __init__(self) -> None:
        self.share = 0.0
        self._sends = self._refused = 0.0

    def count(self, sends: int, refused: int) -> None:
        """Take further sends into the share, and those of them that were refused."""
        memory = 0.5 ** (sends / SHARE_SENDS)
        self._sends = memory * self._sends + sends
        self._refused = memory * self._refused + refused
        share = self._refused / max(1.0, self._sends)
        self.share = min(share, MOST_UNRELATED) if share >= LEAST_UNRELATED else 0.0
