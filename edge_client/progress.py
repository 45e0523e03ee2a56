"""What a device says: one line per event on stderr, and a line every few seconds while something takes long."""

import sys
import time
from collections.abc import Callable

from lamina.printable import printable

Say = Callable[[str], None]
_EVERY_SECONDS = 5.0
_LINE_CHARACTERS = 1000


def say(line: str) -> None:
    """One line; what another machine put into it is shown as text and steers nothing."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {printable(line, _LINE_CHARACTERS)}\n")
    sys.stderr.flush()


class Progress:
    """Says how far a long piece of work is, at most once every five seconds and never for a short one."""

    def __init__(self, say: Say, what: str, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._what, self._total, self._clock = say, what, total, clock
        self._next = clock() + _EVERY_SECONDS

    def at(self, done: int) -> None:
        now = self._clock()
        if now >= self._next:
            self._next = now + _EVERY_SECONDS
            self._say(f"{self._what}: {done} of {self._total}")
