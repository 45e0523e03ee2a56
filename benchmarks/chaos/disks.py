"""Small file systems for state folders, so that a disk can be full without the machine's being so."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BALLAST = "ballast"
_PIECE = bytes(1 << 16)


@contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[str]:
    """Mounts a tmpfs there and takes it away again. Yields why it could not be, which is empty where it could."""
    folder.mkdir(parents=True, exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        fault = done.stderr.strip() if done.returncode else ""
    except FileNotFoundError:
        fault = "this machine has no command mount"
    try:
        yield fault
    finally:
        if not fault:
            subprocess.run(["umount", "-l", str(folder)], check=True)


def fill(folder: Path, left_bytes: int) -> None:
    """Leaves so much room and no more."""
    path = folder / BALLAST
    try:
        with path.open("ab", buffering=0) as file:
            while file.write(_PIECE):
                pass
    except OSError:
        pass
    with path.open("r+b") as file:
        file.truncate(max(0, path.stat().st_size - left_bytes))


def free(folder: Path) -> None:
    (folder / BALLAST).unlink(missing_ok=True)
