"""Which blobs the split runs of a coordinator still need, and the deletion of the others.

Runs that came to the same weights have the same blobs, so what one run is done with may be another's.
"""

from collections.abc import Callable, Iterable
from threading import Lock

from coordinator.store.blobs import Blobs


class Keeping:
    """`needed()` are the blobs of all runs. Who stores blobs and notes that they are needed holds `lock` meanwhile."""

    def __init__(self, blobs: Blobs, needed: Callable[[], set[str]]) -> None:
        self._blobs, self._needed = blobs, needed
        self.lock = Lock()

    def remove(self, superseded: Iterable[str]) -> None:
        """Deletes those of these blobs that no run needs."""
        with self.lock:
            for blob in set(superseded) - self._needed():
                if self._blobs.find(blob) is not None:
                    self._blobs.remove(blob)
