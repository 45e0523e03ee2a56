"""What the kernel says about the memory of a process."""

from pathlib import Path


def peak_rss_bytes(pid: int | str = "self") -> int | None:
    """VmHWM, the peak resident set, exact; None if the process is gone."""
    return _kilobytes(Path(f"/proc/{pid}/status"), "VmHWM:")


def rss_bytes(pid: int | str = "self") -> int | None:
    """VmRSS, the resident set now."""
    return _kilobytes(Path(f"/proc/{pid}/status"), "VmRSS:")


def pss_bytes(pid: int) -> int | None:
    """The proportional set now: a page that n processes share counts 1/n. None if it cannot be read.

    Kernels before 4.14 (a Jetson Nano has 4.9) have no `smaps_rollup`, so there the mappings are added up.
    """
    rollup = Path(f"/proc/{pid}/smaps_rollup")
    return _kilobytes(rollup if rollup.exists() else Path(f"/proc/{pid}/smaps"), "Pss:")


def oom_kills() -> int:
    """How many processes the out-of-memory killer has ended since the machine started."""
    try:
        words = Path("/proc/vmstat").read_text().split()
        return int(words[words.index("oom_kill") + 1])
    except (OSError, ValueError):
        return 0


def _kilobytes(path: Path, field: str) -> int | None:
    """The sum of all lines `field  123 kB`; None if there is no such line, as in a process that has just ended."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    values = [int(line.split()[1]) * 1024 for line in lines if line.startswith(field)]
    return sum(values) if values else None
