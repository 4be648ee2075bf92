"""Let the launchers of several nodes end together: each tells the others how its workers ended.

The store of the nodes has a key for each that changes every half second, and one for how it ended. A node
whose key does not change for `LOST_AFTER_S`, and one that can't reach the store, is lost. All end alike.
"""

from __future__ import annotations

import json
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from harvester.system.free_port import free_port
from trainer.errors import ProcessLost
from trainer.training.rendezvous import Meeting

# Seconds between two signs of life, and without one until a node counts as lost: a machine that is short of
# memory may stand still for a while.
BEAT_S = 0.5
LOST_AFTER_S = 30.0

# Seconds that a node which has read all endings waits until the others have, too: one holds the store.
FAREWELL_S = 10.0


@dataclass(frozen=True, slots=True)
class Ending:
    """How the workers of a node ended.

    Attributes:
        code: exit code of the node alone.
        by_itself: whether a worker failed, and not only because another one had.
        received: number of the signal that its launcher got, 0 for none.
        message: what there is to say, empty for nothing.
    """

    code: int
    by_itself: bool = False
    received: int = 0
    message: str = ""


@dataclass(frozen=True, slots=True)
class RankShare:
    """The processes of this node among all.

    Attributes:
        first: rank of its first process; count: its processes; total: those of all nodes.
        address, port: where the processes find each other.
    """

    first: int
    count: int
    total: int
    address: str
    port: int


class Nodes:
    """Watch the other nodes of a training from this node's launcher.

    Args:
        meeting: of the launchers.
    """

    def __init__(self, meeting: Meeting) -> None:
        self.node, self.count = meeting.node, meeting.nodes
        self._meeting = meeting
        self._endings: dict[int, Ending] = {}
        self._lost = ""
        self._own: Ending | None = None
        self._left = self._all_left = False
        self._round_at = time.monotonic()
        self._thread = threading.Thread(target=self._watch, name="nodes", daemon=True)

    def share(self, processes: int) -> RankShare:
        """Agree which ranks each node's processes have, and begin to watch.

        Raises:
            ProcessLost: another node did not say how many it has.
        """
        store, node = self._meeting.store, self.node
        try:
            store.set(f"trainer/processes/{node}", str(processes))
            # All have met: one that says nothing now is lost, and signals wait as long as this does.
            patience = timedelta(seconds=2 * LOST_AFTER_S)
            store.wait([f"trainer/processes/{number}" for number in range(self.count)], patience)
            counts = [int(store.get(f"trainer/processes/{number}")) for number in range(self.count)]
            if node == 0:
                store.set("trainer/master", json.dumps([self._meeting.address, free_port("")]))
            store.wait(["trainer/master"], patience)
            address, port = json.loads(store.get("trainer/master"))
        except (RuntimeError, ValueError) as error:
            raise ProcessLost(
                f"the nodes lost each other before they began: {str(error).splitlines()[0][:300]}",
                remedy="the same commands try again",
            ) from None
        self._round_at = time.monotonic()
        self._thread.start()
        return RankShare(sum(counts[:node]), processes, sum(counts), str(address), int(port))

    @property
    def has_failure(self) -> bool:
        """Whether another node's workers failed, or a node is lost, so that ours must end."""
        if self._stands_still:
            self._lost = self._lost or "the store of the nodes does not answer"
        return bool(self._lost) or any(ending.code for ending in list(self._endings.values()))

    @property
    def _stands_still(self) -> bool:
        return time.monotonic() - self._round_at > LOST_AFTER_S

    def agree(self, own: Ending) -> int:
        """Tell the others how our workers ended, wait for theirs, and return the exit code of all.

        Raises:
            ProcessLost: a process was killed, or a node is lost.
        """
        self._own = own
        while self._thread.is_alive() and not self._stands_still and not self._lost:
            if len(self._endings) == self.count:
                break
            time.sleep(BEAT_S / 5)
        endings = {**self._endings, self.node: own}
        lost = self._lost or ("the store of the nodes does not answer" if len(endings) < self.count else "")
        self._say_goodbye()
        return verdict(endings, self.count, lost)

    def _say_goodbye(self) -> None:
        """Wait until the others have read our ending, since this launcher may hold the store."""
        self._left = True
        deadline = time.monotonic() + FAREWELL_S
        while self._thread.is_alive() and not self._all_left and time.monotonic() < deadline:
            time.sleep(BEAT_S / 10)

    def _watch(self) -> None:
        store, beat = self._meeting.store, 0
        others = [number for number in range(self.count) if number != self.node]
        seen: dict[int, tuple[bytes, float]] = {}
        try:
            while not self._all_left:
                beat += 1
                store.set(f"trainer/alive/{self.node}", str(beat))
                if self._own is not None and self.node not in self._endings:
                    store.set(f"trainer/ended/{self.node}", json.dumps(asdict(self._own)))
                    self._endings[self.node] = self._own
                for number in others:
                    self._look_at(store, number, seen)
                if self._left:
                    store.set(f"trainer/left/{self.node}", "1")
                    said = [number for number in others if number in self._endings]  # the lost say nothing
                    self._all_left = store.check([f"trainer/left/{number}" for number in said])
                self._round_at = time.monotonic()
                time.sleep(BEAT_S if self._own is None else BEAT_S / 10)
        except Exception as error:  # noqa: BLE001 - torch raises several kinds, some plain RuntimeErrors
            if not self._left:
                self._lost = self._lost or (
                    "the node that holds their store is out of reach: "
                    f"{(str(error).splitlines() or [type(error).__name__])[0][:200]}"
                )

    def _look_at(self, store: Any, number: int, seen: dict[int, tuple[bytes, float]]) -> None:
        """Read how another node ended, or that it lives."""
        if number in self._endings:
            return
        if store.check([f"trainer/ended/{number}"]):
            self._endings[number] = Ending(**json.loads(store.get(f"trainer/ended/{number}")))
            return
        beat = store.get(f"trainer/alive/{number}") if store.check([f"trainer/alive/{number}"]) else b""
        now = time.monotonic()
        last = seen.get(number)
        if last is None or last[0] != beat:
            seen[number] = (beat, now)
        elif now - last[1] > LOST_AFTER_S:
            self._lost = self._lost or f"node {number} of {self.count} gives no sign of life"


def verdict(endings: dict[int, Ending], count: int, lost: str) -> int:
    """Return the exit code of all: of a failure by itself, then of a signal, then of a lost process.

    Args:
        endings: of each node that said how it ended; lost: why some did not, empty if all did.

    Raises:
        ProcessLost: no worker failed by itself, and a process or node was lost.
    """
    in_order = [endings[number] for number in sorted(endings)]
    if failed := next((ending for ending in in_order if ending.by_itself), None):
        return failed.code
    if received := next((ending.received for ending in in_order if ending.received), 0):
        return 128 + received
    said = next(
        ((number, endings[number].message) for number in sorted(endings) if endings[number].message), None
    )
    if lost or said:
        text = lost if said is None else f"node {said[0]} of {count}: {said[1]}"
        raise ProcessLost(text, remedy="the same commands resume from the last checkpoint")
    return next((ending.code for ending in in_order if ending.code), 0)
