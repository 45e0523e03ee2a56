"""How this process uses the heap: what is freed goes back to the system.

glibc gives each thread a heap of its own, and keeps what was freed for later: forty threads that each read one large message
leave a process that is larger for good. Two heaps, and blocks above 128 KiB mapped one by one, keep it as small as its content.
"""

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # malloc.h
_LARGE_BYTES = 128 << 10


def keep_small() -> None:
    """To be called before threads start. Does nothing where the C library is another one."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_ARENA_MAX, 2), (_MMAP_THRESHOLD, _LARGE_BYTES), (_TRIM_THRESHOLD, _LARGE_BYTES)):
            mallopt(option, value)
