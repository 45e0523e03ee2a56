"""The compilers and runtimes write lines about themselves to stderr that no user can act on; here they are kept off it.

Missing optional GPU libraries of torchao, torchvision operators that are not registered, the processor's name. What fails
still fails: as an exception, not as a line.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock

_one_at_a_time = RLock()  # or a second thread would keep, and put back, the null device of the first


@contextmanager
def quiet() -> Iterator[None]:
    """Sends file descriptor 2 to the null device within the block: part of the noise is written by C++ code."""
    with _one_at_a_time, open(os.devnull, "wb") as nowhere:  # noqa: PTH123 (a device, not a path of ours)
        kept = os.dup(2)
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
