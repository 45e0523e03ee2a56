"""How far a command is: something live in a terminal, a line every few seconds elsewhere, such as in a log."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console

EVERY_SECONDS = 5.0

Tell = Callable[[str], None]
Count = Callable[[str, int, int | None], None]
"""What is counted, how many are done, and of how many; None while nobody knows."""


@contextmanager
def telling(what: str, console: "Console | None" = None, clock: Callable[[], float] = time.monotonic) -> Iterator[Tell]:
    """Shows what the command is at, on stderr or on `console`; the block is given a function that says what it is at now."""
    console = console or _stderr()
    if console.is_terminal:
        with console.status(what) as line:
            yield line.update
        return
    lines = _Lines(console, clock)
    lines.say(what, is_due=True)
    yield lambda text: lines.say(text)


@contextmanager
def counting(
    *kinds: str, console: "Console | None" = None, is_bytes: bool = False, clock: Callable[[], float] = time.monotonic
) -> Iterator[Count]:
    """Shows how much is done of each of these kinds of work; `is_bytes`: what is counted are bytes."""
    console = console or _stderr()
    if not console.is_terminal:
        lines = _Lines(console, clock)
        yield lambda kind, done, total: lines.count(kind, done, total)
        return
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    amount = DownloadColumn() if is_bytes else MofNCompleteColumn()
    with Progress(TextColumn("{task.description}"), BarColumn(), amount, TimeElapsedColumn(), console=console) as bars:
        tasks = {kind: bars.add_task(kind, total=None) for kind in kinds}
        yield lambda kind, done, total: bars.update(tasks[kind], completed=done, total=total)


class _Lines:
    """Lines for a log: the first of a kind and the last at once, the others at most one in `EVERY_SECONDS`."""

    def __init__(self, console: "Console", clock: Callable[[], float]) -> None:
        self._console, self._clock = console, clock
        self._next, self._kinds = clock() + EVERY_SECONDS, set[str]()

    def say(self, text: str, is_due: bool = False) -> None:
        if is_due or self._clock() >= self._next:
            self._next = self._clock() + EVERY_SECONDS
            self._console.print(f"{time.strftime('%H:%M:%S')} {text}", soft_wrap=True, highlight=False, markup=False)

    def count(self, kind: str, done: int, total: int | None) -> None:
        is_due = kind not in self._kinds or done == total
        self._kinds.add(kind)
        self.say(f"{kind}: {done:,}" if total is None else f"{kind}: {done:,} of {total:,}", is_due)


def _stderr() -> "Console":
    from rich.console import Console

    return Console(stderr=True)
