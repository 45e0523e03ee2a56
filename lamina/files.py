"""Writing files so that a reader or a crash never sees half of one."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lamina.errors import DiskFullError, StoreError

PRIVATE = 0o600
"""Mode of a file that holds a secret: from its first moment on, nobody else can read it."""


def write_durably(path: Path, data: bytes, mode: int = 0o644) -> None:
    """Write, fsync and rename into place, then fsync the folder: after return the file survives power loss.

    Raises DiskFullError, and leaves nothing behind, if the disk is full.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.urandom(16).hex()}.partial")
    try:
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        move_durably(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise_if_full(error, path)
        raise


def move_durably(source: Path, target: Path) -> None:
    """Rename a file that is already synced, and sync the folder that now holds it."""
    source.replace(target)
    folder = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def raise_if_full(error: OSError, path: Path) -> None:
    """Raises DiskFullError if that is what the operating system said."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        raise DiskFullError(f"no space left on the disk of {path.parent}: free some and try again; nothing was lost") from error


_OF_THE_DISK = (errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES, errno.EPERM)


@contextmanager
def disk_errors_named(folder: Path) -> Iterator[None]:
    """For a whole process that writes below a folder: no write of it ends in a traceback.

    Raises DiskFullError where the disk is full, StoreError where it fails or may not be written.
    """
    try:
        yield
    except OSError as error:
        path = Path(error.filename) if isinstance(error.filename, str) else folder / "any"
        raise_if_full(error, path)
        if error.errno in _OF_THE_DISK:
            raise StoreError(
                f"{error.filename or folder} cannot be written or read: {error.strerror}; nothing was lost"
            ) from error
        raise
