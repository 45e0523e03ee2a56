"""A program that loops for ever ends with its process: the kernel sends SIGALRM when nothing was done for too long.

The time is generous. At first it is what the device was told (`--stall-minutes`), because the first batch also loads the
program; then at most that, but not less than ten minutes or 50 times the longest step so far. It stands still while the
machine sleeps.
Native code cannot hold the signal back, because nothing in Python handles it.
"""

import signal
import time
from collections.abc import Callable

_LEAST_SECONDS = 600.0
_STEPS = 50


class Watchdog:
    def __init__(self, stall_seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._stall_seconds, self._clock = stall_seconds, clock
        self._last, self._longest_seconds = clock(), 0.0
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, stall_seconds)

    def fed(self) -> None:
        """Something was done: a batch, or a chunk of feature rows."""
        now = self._clock()
        self._longest_seconds = max(self._longest_seconds, now - self._last)
        self._last = now
        signal.setitimer(signal.ITIMER_REAL, min(self._stall_seconds, max(_LEAST_SECONDS, _STEPS * self._longest_seconds)))

    def stop(self) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
