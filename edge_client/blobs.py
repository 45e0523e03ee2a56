"""Blobs on the device: a folder of files named by their sha256. What is here is never downloaded again.

A program is executable content, so a file is verified when it arrives and once more before this process first uses it.
"""

from collections.abc import Iterable
from pathlib import Path

from edge_client.progress import Say
from edge_client.transport import Transport
from lamina.bundle import hash_file
from lamina.errors import HashMismatchError

_FRESH_TRIES = 3


class BlobCache:
    def __init__(self, folder: Path, transport: Transport, say: Say) -> None:
        self._folder, self._transport, self._say = folder, transport, say
        self._verified: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, digest: str, max_bytes: int | None = None) -> Path:
        """The file of a blob, downloaded if it is missing. Raises HashMismatchError if it comes wrong three times."""
        path = self._folder / digest
        if digest in self._verified and path.is_file():
            return path
        if path.is_file():
            if hash_file(path) == digest:
                self._verified.add(digest)
                return path
            self._say(f"blob {digest[:12]} was altered on this disk; downloading it again")
            path.unlink()
        return self._download(digest, path, max_bytes)

    def keep_only(self, digests: Iterable[str]) -> None:
        """Deletes all other blobs and unfinished downloads."""
        keep = set(digests)
        for path in self._folder.iterdir():
            if path.name not in keep:
                path.unlink()
                self._verified.discard(path.name)

    def _download(self, digest: str, path: Path, max_bytes: int | None) -> Path:
        partial = path.with_suffix(".partial")
        for _ in range(_FRESH_TRIES):
            try:
                self._transport.download(digest, partial, max_bytes)
                actual = hash_file(partial)
            except HashMismatchError:
                partial.unlink(missing_ok=True)
                raise
            if actual == digest:
                partial.replace(path)
                self._verified.add(digest)
                return path
            self._say(f"blob {digest[:12]} arrived with sha256 {actual[:12]}; downloading it anew")
            partial.unlink()
        raise HashMismatchError(
            f"blob {digest} arrived {_FRESH_TRIES} times with other content, the last time with sha256 {actual}; "
            f"something between this device and {self._transport.url} alters it, or the coordinator's copy is damaged: "
            f"publish the bundle anew"
        )
