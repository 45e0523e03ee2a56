"""The machine itself: Python, folders, disk and memory. Whatever is read can be given, so that a test can give it."""

import errno
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from lamina.doctor.diagnosis import ROLES, Check, RoleName
from lamina.doctor.requirements import Requirement

MEMINFO = Path("/proc/meminfo")
LITTLE_DISK_BYTES = 1 << 30
NO_DISK_BYTES = 100 << 20
LITTLE_MEMORY_BYTES = 256 << 20
"""A device's processes hold about 100 MiB before any model (docs/memory.md)."""


def check_python(wanted: Requirement, version: str | None = None) -> Check:
    """Whether lamina's own metadata allows this Python."""
    version = version or platform.python_version()
    allowed = str(wanted.versions)
    if wanted.is_met_by(version):
        return Check(name="Python", state="ok", found=f"{version} ({platform.machine()}); {allowed} is needed")
    return Check(
        name="Python",
        state="fault",
        found=f"{version}, and lamina needs {allowed}: runtimes have no packages for it",
        remedy="make an environment with such a Python: python3.11 -m venv lamina-env",
        roles=ROLES,
    )


def check_compiler(command: Sequence[str] | None, is_needed: bool) -> Check:
    """`is_needed`: ExecuTorch is here and its shim is not built yet."""
    if command:
        return Check(name="C++ compiler", state="ok", found=" ".join(command))
    return Check(
        name="C++ compiler",
        state="fault" if is_needed else "absent",
        found="none, and ExecuTorch's shim has to be built" if is_needed else "none; only ExecuTorch's shim needs one, once",
        remedy="install one (Debian: apt install g++) or set $CXX",
        roles=("device",) if is_needed else (),
    )


def check_folder(
    name: str,
    folder: Path,
    variable: str,
    roles: tuple[RoleName, ...],
    free_bytes: Callable[[Path], int] = lambda path: shutil.disk_usage(path).free,
) -> Check:
    """Whether a folder can be written, by writing to it or to the nearest one above that exists, and what is free there.

    `variable` is the environment variable, or the option, that chooses another folder. Nothing is left behind.
    """
    label = f"{name} folder"
    there = folder
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    other = f"choose another with {variable}"
    try:
        with tempfile.NamedTemporaryFile(dir=there, prefix=".lamina-doctor-"):
            pass
        free = free_bytes(there)
    except OSError as error:
        reason = error.strerror or str(error)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        remedy = f"free some space on its disk, or {other}" if full else f"chown it to you, or {other}"
        return Check(name=label, state="fault", found=f"{folder} cannot be written: {reason}", remedy=remedy, roles=roles)
    found = f"{folder}" + ("" if there == folder else " (not made yet)") + f", {amount(free)} free"
    if free < NO_DISK_BYTES:
        return Check(name=label, state="fault", found=found, remedy=f"free some space, or {other}", roles=roles)
    if free < LITTLE_DISK_BYTES:
        return Check(name=label, state="warning", found=found, remedy=f"free some space, or {other}", roles=roles)
    return Check(name=label, state="ok", found=found)


def check_cache(folder: Path) -> Check:
    """What the lowered programs take."""
    sizes = [path.stat().st_size for path in folder.glob("*") if path.is_file()] if folder.is_dir() else []
    programs = len(list(folder.glob("*.program"))) if folder.is_dir() else 0
    return Check(
        name="program cache",
        state="ok",
        found=f"{programs} programs, {amount(sum(sizes))}",
        remedy=f"to empty it: rm -r {folder}" if programs else "",
    )


def check_memory(meminfo: Path = MEMINFO) -> Check:
    """Total and available memory, as the kernel counts them."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        total, available = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return Check(name="memory", state="ok", found=f"unknown: {meminfo} cannot be read here")
    found = f"{amount(total)}, {amount(available)} available"
    if available < LITTLE_MEMORY_BYTES:
        remedy = "end other programs; `lamina fit PLAN --memory-mb` finds settings for a small device"
        return Check(name="memory", state="warning", found=found, remedy=remedy)
    return Check(name="memory", state="ok", found=found)


def amount(size: int) -> str:
    """Bytes for people: `1.5 GiB`."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
