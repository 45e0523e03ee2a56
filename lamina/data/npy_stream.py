"""The rows of .npy arrays in order, from plain files and from .npz members, compressed or not, a few at a time.

A mapped file would count as resident, and a member of a zip file cannot be mapped; a device has memory for neither.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from lamina.data.items import Array
from lamina.errors import DataError

_CHUNK_BYTES = 1 << 18


class NpyStream:
    """One array, read from its first row to its last. `name` is its name in the archive, or the file's without .npy."""

    def __init__(self, file: Path, member: str | None = None) -> None:
        """Reads the header. Raises DataError for anything but a plain C-ordered array with rows."""
        self._file, self._member = file, member
        self.name = (member or file.name).removesuffix(".npy")
        self.source = f"{file.name}, array {self.name!r}" if member else file.name
        with self._open() as stream:
            self.shape, self.dtype = self._header(stream)

    def __len__(self) -> int:
        return self.shape[0]

    def rows(self) -> Iterator[Array]:
        """Each row as an array of its own memory. Raises DataError where the file ends early or is damaged."""
        row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        chunk = max(1, _CHUNK_BYTES // max(1, row_bytes))
        with self._open() as stream:
            self._header(stream)
            for first in range(0, len(self), chunk):
                count = min(chunk, len(self) - first)
                try:
                    data = stream.read(count * row_bytes)
                except (zipfile.BadZipFile, EOFError) as error:
                    raise DataError(f"{self.source} is damaged near row {first}: {error}") from error
                if len(data) < count * row_bytes:
                    raise DataError(f"{self.source} is cut off in row {first + len(data) // max(1, row_bytes)} of {len(self)}")
                yield from np.frombuffer(data, self.dtype).reshape(count, *self.shape[1:])

    def _open(self) -> IO[bytes]:
        if self._member is None:
            return self._file.open("rb")
        # The archive's own handle may close: the open member keeps the file.
        with zipfile.ZipFile(self._file) as archive:
            return archive.open(self._member)

    def _header(self, stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
        try:
            version = npy.read_magic(stream)  # type: ignore[no-untyped-call]
            read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
            shape, fortran, dtype = read(stream)  # type: ignore[no-untyped-call]
        except ValueError as error:
            raise DataError(f"{self.source} is no readable .npy array: {error}") from error
        if dtype.hasobject:
            raise DataError(f"{self.source} holds Python objects (dtype {dtype}); store plain numbers")
        if fortran and len(shape) > 1:
            raise DataError(f"{self.source} is in Fortran order; store numpy.ascontiguousarray of it")
        if not shape:
            raise DataError(f"{self.source} is a single value; an array with one row per example is needed")
        return tuple(shape), dtype


def open_npz(file: Path) -> dict[str, NpyStream]:
    """Every array of an .npz file by name. Raises DataError."""
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.namelist()
    except FileNotFoundError as error:
        raise DataError(f"{file} does not exist") from error
    except zipfile.BadZipFile as error:
        raise DataError(f"{file} is no .npz file ({error}); write it with numpy.savez") from error
    streams = (NpyStream(file, member) for member in members)
    return {stream.name: stream for stream in streams}
