"""Blobs: immutable files, each named by the sha256 of its bytes. What is there is whole, because it came by rename."""

import re
from collections.abc import Iterator
from pathlib import Path

from coordinator.store.incoming import Incoming, remove_partial_files
from lamina.encoding.tensors import hash_bytes
from lamina.errors import HashMismatchError, UnknownNameError
from lamina.files import write_durably

_PIECE_BYTES = 1 << 20
_ADDRESS = re.compile(r"[0-9a-f]{64}")


class Blobs:
    """A folder of blobs."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(0o700, parents=True, exist_ok=True)
        remove_partial_files(folder)

    def find(self, digest: str) -> Path | None:
        """The blob's file, or None. A text that is no sha256 names no blob, and never a path outside the folder."""
        path = self._folder / digest
        return path if _ADDRESS.fullmatch(digest) and path.is_file() else None

    def path(self, digest: str) -> Path:
        """Raises UnknownNameError if there is no such blob."""
        found = self.find(digest)
        if found is None:
            raise UnknownNameError(f"there is no blob {digest[:80]!r} here; publish the bundle again if it should be")
        return found

    def size_bytes(self, digest: str) -> int | None:
        """The blob's size, or None if there is no such blob."""
        found = self.find(digest)
        return found.stat().st_size if found else None

    def put(self, data: bytes) -> str:
        """Stores bytes durably and returns their sha256. Raises DiskFullError."""
        digest = hash_bytes(data)
        if self.find(digest) is None:
            write_durably(self._folder / digest, data)
        return digest

    def remove(self, digest: str) -> None:
        """Deletes a blob that nobody will be sent for any more."""
        self.path(digest).unlink(missing_ok=True)

    def receive(self) -> Incoming:
        """A file for a body that is to become a blob; `keep` makes it one."""
        return Incoming(self._folder)

    def keep(self, incoming: Incoming, digest: str) -> None:
        """Raises HashMismatchError, and keeps nothing, if the body is not the one that `digest` names."""
        if not _ADDRESS.fullmatch(digest):
            raise UnknownNameError(f"{digest[:80]!r} is no sha256 of 64 hex digits, so no blob can have it as its address")
        if incoming.sha256 != digest:
            raise HashMismatchError(
                f"the body of {incoming.size_bytes} bytes has sha256 {incoming.sha256}, "
                f"the address says {digest}; send it again"
            )
        incoming.seal()
        incoming.keep_as(self._folder / digest)

    def pieces(self, digest: str, first: int, length: int) -> Iterator[bytes]:
        """`length` bytes from offset `first`, in pieces of at most 1 MiB."""
        with self.path(digest).open("rb") as file:
            file.seek(first)
            while length > 0 and (piece := file.read(min(_PIECE_BYTES, length))):
                length -= len(piece)
                yield piece
