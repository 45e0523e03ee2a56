"""The one worker: it makes the weights of rounds that are complete, and lets deadlines pass when they are over.

Whoever makes work due calls `wake`. No wake-up can be lost: the flag is lowered before the worker looks, so what became due
while it looked raises it again. And no deadline waits for somebody to ask: the worker sleeps until the next one.
"""

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from coordinator.aggregation.aggregator import Aggregator
from coordinator.house import House
from coordinator.rounds.rounds import advance_all, moments

log = logging.getLogger("lamina.coordinator")

_LONGEST_SLEEP_SECONDS = 60.0
_PAUSE_SECONDS = 1.0
"""After a failure that nobody foresaw, such as a database that cannot be read."""


class Worker:
    """Works in a thread of its own between `start` and `stop`; a test calls `work` instead."""

    def __init__(self, house: House) -> None:
        self._house = house
        self._aggregator = Aggregator(house)
        self._busy = threading.Lock()
        self._awake = threading.Event()
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="worker", daemon=True)
        self._looked_at = float("-inf")
        """The moment up to which time has been taken into account."""

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Returns when what is under way is done."""
        self._is_stopping = True
        self._awake.set()
        if self._thread.is_alive():
            self._thread.join()

    def wake(self) -> None:
        """Something may be due; returns at once."""
        self._awake.set()

    def work(self) -> None:
        """Does all that is due. A failure is logged, told in the status, and tried again at the next call."""
        with self._busy:
            now = self._house.clock()
            if any(self._looked_at < moment <= now for moment in moments(self._house)):
                advance_all(self._house)
            self._looked_at = now
            self._aggregator.run_due()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Nothing is aggregated within the block; it begins when what is under way is done."""
        with self._busy:
            yield

    def _run(self) -> None:
        while True:
            self._awake.clear()
            if self._is_stopping:  # after the flag is lowered: `stop` says so before it raises it
                return
            try:
                self.work()
                seconds = self._seconds_until_next()
            except Exception:
                log.exception("the worker failed; it tries again in %g s", _PAUSE_SECONDS)
                seconds = _PAUSE_SECONDS
            self._awake.wait(seconds)

    def _seconds_until_next(self) -> float:
        coming = [moment for moment in moments(self._house) if moment > self._looked_at]
        return max(0.0, min([_LONGEST_SLEEP_SECONDS, *(moment - self._house.clock() for moment in coming)]))
