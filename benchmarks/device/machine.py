"""What this machine is: the facts that a number needs beside it."""

import os
import platform
from pathlib import Path

MODEL = Path("/proc/device-tree/model")
CPUINFO = Path("/proc/cpuinfo")
MEMINFO = Path("/proc/meminfo")
TEGRA_RELEASE = Path("/etc/nv_tegra_release")


def machine() -> dict[str, str | int]:
    """Model, processor, cores, RAM, kernel and page size; on a Jetson also the release of its Linux."""
    cpu = _field(CPUINFO, "model name") or platform.processor() or platform.machine()
    facts: dict[str, str | int] = {
        "model": _text(MODEL) or cpu,
        "cpu": cpu,
        "architecture": platform.machine(),
        "cores": os.cpu_count() or 1,
        "ram_bytes": int((_field(MEMINFO, "MemTotal") or "0 kB").split()[0]) * 1024,
        "kernel": platform.release(),
        "system": platform.platform(),
        "page_bytes": os.sysconf("SC_PAGE_SIZE"),
    }
    release = _text(TEGRA_RELEASE)
    return facts | ({"tegra_release": release.splitlines()[0]} if release else {})


def _text(path: Path) -> str:
    """A file's text; the device tree ends its strings with a zero byte."""
    try:
        return path.read_text(errors="replace").strip("\0 \n")
    except OSError:
        return ""


def _field(path: Path, name: str) -> str:
    """The first `name : value` of a file in /proc."""
    for line in _text(path).splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
