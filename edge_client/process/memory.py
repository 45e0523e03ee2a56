"""What this process holds in memory, as the kernel counts it."""

import ctypes
import os
import resource
import signal
import sys
from pathlib import Path

from edge_client.process.supervisor import PARENT

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


def die_with_parent() -> None:
    """This process is killed when the one that started it ends, however that ends; Linux alone can do this.

    The parent may be gone before this is called: then somebody else has become the parent, which its number tells.
    """
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    if os.environ.get(PARENT, str(os.getppid())) != str(os.getppid()):
        os.kill(os.getpid(), signal.SIGKILL)


def offer_to_the_memory_killer() -> None:
    """When the machine runs out of memory, the kernel shall end this process first: its loss is one failed attempt."""
    score = Path("/proc/self/oom_score_adj")
    if score.exists():
        score.write_text("500")
