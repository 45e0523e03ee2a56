"""Blobs on the device: a folder of files named by their sha256. What is here is never downloaded again.

A program is executable content, so a file is verified when it arrives and once more before this process first uses it.

A blob may be fetched as another one that holds the same file compressed: that one is downloaded, resumed and verified like
any blob, then decompressed and verified again. Only the decompressed file stays.
"""

from collections.abc import Iterable
from pathlib import Path

from edge_client.progress import Say
from edge_client.talk.transport import Transport
from lamina.bundles.bundle import hash_file
from lamina.encoding.compression import Compression, decompress_file
from lamina.errors import HashMismatchError, TensorFileError, TooLargeError
from lamina.files import raise_if_full

_FRESH_TRIES = 3


class BlobCache:
    def __init__(self, folder: Path, transport: Transport, say: Say) -> None:
        self._folder, self._transport, self._say = folder, transport, say
        self._verified: set[str] = set()
        folder.mkdir(parents=True, exist_ok=True)

    def get(
        self, digest: str, max_bytes: int | None = None, compressed: str | None = None, compression: Compression = "none"
    ) -> Path:
        """The file of a blob, downloaded if it is missing. Raises HashMismatchError if it comes wrong three times.

        `compressed`, if given, is the blob that holds the same file compressed with `compression`; it needs `max_bytes`,
        which bounds both. If it does not give the file, the file itself is downloaded.
        """
        path = self._folder / digest
        if digest in self._verified and path.is_file():
            return path
        if path.is_file():
            if hash_file(path) == digest:
                self._verified.add(digest)
                return path
            self._say(f"blob {digest[:12]} was altered on this disk; downloading it again")
            path.unlink()
        if compressed is None or compressed == digest:
            return self._download(digest, path, max_bytes)
        if max_bytes is None:
            raise ValueError("a compressed blob needs a bound for what comes out of it")
        source = self._download(compressed, self._folder / compressed, max_bytes)
        try:
            return self._decompress(source, digest, path, compression, max_bytes)
        except (HashMismatchError, TensorFileError, TooLargeError) as error:
            self._say(f"compressed blob {compressed[:12]}: {error.message}; downloading {digest[:12]} as it is")
            return self._download(digest, path, max_bytes)
        finally:
            source.unlink(missing_ok=True)

    def keep_only(self, digests: Iterable[str]) -> None:
        """Deletes all other blobs and unfinished downloads."""
        keep = set(digests)
        for path in self._folder.iterdir():
            if path.name not in keep:
                path.unlink()
                self._verified.discard(path.name)

    def _decompress(self, source: Path, digest: str, path: Path, compression: Compression, max_bytes: int) -> Path:
        partial = path.with_suffix(".decompressed")
        try:
            decompress_file(source, partial, compression, max_bytes)
            if (actual := hash_file(partial)) != digest:
                raise HashMismatchError(f"it holds sha256 {actual}, not {digest}")
            partial.replace(path)
        except OSError as error:
            raise_if_full(error, path)
            raise
        finally:
            partial.unlink(missing_ok=True)
        self._verified.add(digest)
        return path

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
