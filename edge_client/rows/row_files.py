"""Arrays on disk, read and written row by row.

Rows are read into the caller's memory and not mapped: a mapped page counts as resident once it was touched, so that one
epoch over a mapped feature cache would hold the whole cache in memory, by the kernel's count and on a small machine by
its pressure.
"""

import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from edge_client.engines.base import Array
from lamina.errors import DataError
from lamina.files import raise_if_full

Indices = Sequence[int] | NDArray[np.int64]


class RowSource(Protocol):
    """Rows by number, from wherever they come."""

    def __len__(self) -> int: ...

    def take(self, indices: Indices) -> Array:
        """A new array of these rows, in this order."""
        ...


@dataclass(frozen=True)
class NpyHeader:
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    bytes: int
    """Length of the header itself; the values follow."""


def read_header(file: FileIO, source: str) -> NpyHeader:
    """The header of an .npy file at the reader's position. Raises DataError for anything but a plain C-ordered array."""
    start = file.tell()
    try:
        version = npy.read_magic(file)  # type: ignore[no-untyped-call]
        read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran, dtype = read(file)  # type: ignore[no-untyped-call]
    except ValueError as error:
        raise DataError(f"{source} is no readable .npy array: {error}") from error
    if dtype.hasobject:
        raise DataError(f"{source} holds Python objects (dtype {dtype}); store plain numbers")
    if fortran and len(shape) > 1:
        raise DataError(f"{source} is in Fortran order; store numpy.ascontiguousarray of it")
    return NpyHeader(tuple(shape), dtype, file.tell() - start)


class RowFile:
    """The rows (first axis) of one array in a file. `offset` is where the .npy header starts.

    The file is opened for each call, so there is nothing to close; that it is still the same file is checked each time.
    """

    def __init__(self, path: Path, offset: int = 0, source: str = "", identity: tuple[int, int, int] | None = None) -> None:
        """Raises DataError for an array that is not readable, or if the file is not the one of the given identity."""
        self.source = source or str(path)
        self.path, self.offset = path, offset
        with path.open("rb", buffering=0) as file:
            self.identity = _identity(file)
            if identity not in (None, self.identity):
                raise DataError(f"{self.source}: {path} was changed while it was in use; start again")
            file.seek(offset)
            header = read_header(file, self.source)
            size = os.fstat(file.fileno()).st_size
        self.shape, self.dtype = header.shape, header.dtype
        if not self.shape:
            raise DataError(f"{self.source} is a single value; an array with one row per example is needed")
        self._start = offset + header.bytes
        self._row_bytes = int(np.prod(self.shape[1:], dtype=np.int64)) * self.dtype.itemsize
        end = self._start + len(self) * self._row_bytes
        if size < end:
            raise DataError(f"{self.source} is cut off: it should reach byte {end}, {path} has {size}")

    def __len__(self) -> int:
        return self.shape[0]

    def take(self, indices: Indices) -> Array:
        """A new array of these rows, in this order."""
        rows = np.empty((len(indices), *self.shape[1:]), self.dtype)
        with self._open() as file:
            for place, index in enumerate(indices):
                self._read(file, rows[place : place + 1], int(index))
        return rows

    def chunks(self, size: int) -> Iterator[tuple[int, Array]]:
        """(index of the first row, up to `size` rows) over the whole file."""
        for start in range(0, len(self), size):
            rows = np.empty((min(size, len(self) - start), *self.shape[1:]), self.dtype)
            with self._open() as file:
                self._read(file, rows, start)
            yield start, rows

    def _open(self) -> FileIO:
        file = self.path.open("rb", buffering=0)
        if _identity(file) != self.identity:
            file.close()
            raise DataError(f"{self.source}: {self.path} was changed while it was in use; start again")
        return file

    def _read(self, file: FileIO, rows: Array, first: int) -> None:
        # preadv, because it fills our memory directly and may start anywhere.
        view = rows.reshape(-1).view(np.uint8).data
        position = self._start + first * self._row_bytes
        while view:
            count = os.preadv(file.fileno(), [view], position)
            if count == 0:
                raise DataError(f"{self.source} ends in row {first}; {self.path} was changed while it was in use")
            view, position = view[count:], position + count


def _identity(file: FileIO) -> tuple[int, int, int]:
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


class RowWriter:
    """Writes an .npy file of `count` rows in order, and knows its CRC-32 at the end."""

    def __init__(self, path: Path, count: int) -> None:
        self.path, self._count, self._written = path, count, 0
        self._crc = 0
        self._file = self._open()

    def _open(self) -> BinaryIO:
        return self.path.open("wb")

    def append(self, rows: Array) -> None:
        try:
            if not self._written:
                header = {"descr": npy.dtype_to_descr(rows.dtype), "fortran_order": False}
                npy.write_array_header_1_0(self._file, {**header, "shape": (self._count, *rows.shape[1:])})  # type: ignore[no-untyped-call]
                self._file.flush()
                self._crc = zlib.crc32(self.path.read_bytes())
            data = np.ascontiguousarray(rows).reshape(-1).view(np.uint8).data
            self._file.write(data)
        except OSError as error:
            raise_if_full(error, self.path)
            raise
        self._crc = zlib.crc32(data, self._crc)
        self._written += len(rows)

    def finish(self) -> int:
        """Closes the file and gives its CRC-32."""
        if self._written != self._count:
            raise ValueError(f"{self.path} was promised {self._count} rows and got {self._written}")
        try:
            self._file.close()
        except OSError as error:
            raise_if_full(error, self.path)
            raise
        return self._crc

    def abandon(self) -> None:
        with suppress(OSError):  # closing writes what is left, and on a full disk that fails once more
            self._file.close()
        self.path.unlink(missing_ok=True)


def file_crc(path: Path) -> int:
    """CRC-32 of a file. It shows damage, not malice: what it guards was made on this device."""
    crc = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 18):
            crc = zlib.crc32(piece, crc)
    return crc
