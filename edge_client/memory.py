"""What this process holds in memory, as the kernel counts it."""

import ctypes
import resource
import sys
from pathlib import Path

_STATUS = Path("/proc/self/status")


def peak_bytes(status: Path = _STATUS) -> int:
    """Peak resident set of this process: VmHWM, or ru_maxrss where there is no /proc.

    VmHWM comes first because ru_maxrss also counts the process that started this one, until it called exec.
    """
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def give_back_free_memory() -> None:
    """Asks the allocator to return what a closed program held, so that the next one does not come on top of it."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it, musl does not
        if trim is not None:
            trim(0)
