"""A body on its way to disk: counted and hashed while it arrives, and gone without a trace unless it is kept."""

import os
from hashlib import sha256
from pathlib import Path
from types import TracebackType
from typing import Self
from uuid import uuid4

from lamina.errors import TooLargeError
from lamina.files import move_durably, raise_if_full

PARTIAL = ".partial"


class Incoming:
    """A temporary file in `folder`.

        with Incoming(folder, limit_bytes=...) as incoming:
            incoming.write(piece)            as often as needed
            incoming.seal()                  synced; now incoming.sha256 is final
            incoming.keep_as(target)         renamed, and the folder synced

    Raises TooLargeError above `limit_bytes`, and DiskFullError. Leaving the block without `keep_as` deletes the file.
    """

    def __init__(self, folder: Path, limit_bytes: int | None = None) -> None:
        self.path = folder / f".{uuid4().hex}{PARTIAL}"
        self.size_bytes = 0
        self._limit_bytes = limit_bytes
        self._hash = sha256()
        # Unbuffered: a full disk must be noticed by write(), not by a later close().
        self._file = self.path.open("wb", buffering=0)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def write(self, piece: bytes) -> None:
        self.size_bytes += len(piece)
        if self._limit_bytes is not None and self.size_bytes > self._limit_bytes:
            raise TooLargeError(f"the body is larger than the {self._limit_bytes} bytes that are legal here")
        self._hash.update(piece)
        view = memoryview(piece)
        try:
            while view:
                view = view[os.write(self._file.fileno(), view) :]
        except OSError as error:
            raise_if_full(error, self.path)
            raise

    def seal(self) -> None:
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise_if_full(error, self.path)
            raise
        self._file.close()

    def keep_as(self, target: Path) -> None:
        move_durably(self.path, target)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()
        self.path.unlink(missing_ok=True)


def remove_partial_files(folder: Path) -> None:
    """Deletes what a crash left half-written."""
    for path in folder.glob(f".*{PARTIAL}"):
        path.unlink()
