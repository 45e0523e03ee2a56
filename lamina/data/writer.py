"""Writes the device's .npz file without ever holding it: rows go to scratch files, and from there into an uncompressed zip.

Which rows are test rows is known only at the end, and a zip file takes one member after the other; hence the scratch files.
They lie in `.<name>.partial` beside the target, which takes as much disk as the target until it is done. The target appears
by a rename and is never seen half.
"""

import fcntl
import os
import shutil
import zipfile
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from lamina.data.card import DataCard, as_comment
from lamina.data.items import Array
from lamina.errors import ConfigError
from lamina.files import move_durably, raise_if_full
from lamina.names import LABEL

_CHUNK_BYTES = 1 << 20
_ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same rows give the same bytes, and so the same fingerprint on the device


class Writer:
    """A context: `append` rows, then `finish`. Leaving it without `finish` leaves nothing behind.

    What a killed process left is cleared away by the next one. Raises ConfigError while another process writes the same file,
    DiskFullError where the disk is full.
    """

    def __init__(self, target: Path, dtypes: dict[str, np.dtype[Any]], shapes: dict[str, tuple[int, ...]]) -> None:
        self._target, self._dtypes, self._shapes = target, dtypes, shapes
        self._scratch = target.with_name(f".{target.name}.partial")
        self._files: dict[str, BinaryIO] = {}

    def __enter__(self) -> Self:
        self._scratch.mkdir(parents=True, exist_ok=True)
        self._lock = (self._scratch / "lock").open("wb")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise ConfigError(f"another process is writing {self._target}; wait for it, or choose another --out") from error
        for name in self._dtypes:
            self._files[name] = (self._scratch / f"{name}.rows").open("w+b")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for file in self._files.values():
            file.close()
        shutil.rmtree(self._scratch, ignore_errors=True)
        self._lock.close()

    def append(self, rows: dict[str, Array]) -> None:
        """One example: a row for each modality, of the shape and dtype that were promised."""
        try:
            for name, file in self._files.items():
                file.write(rows[name].tobytes())
        except OSError as error:
            raise_if_full(error, self._target)
            raise

    def finish(self, is_test: NDArray[np.bool_], labels: NDArray[np.int64] | None, card: DataCard | None = None) -> None:
        """Makes the target of the rows, in their order. `is_test` and `labels` have one entry for each row."""
        partial = self._scratch / "archive"
        try:
            with zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
                splits = [("train", ~is_test), ("test", is_test)]
                for name, file in self._files.items():
                    for split, mask in splits:
                        if mask.any():
                            self._copy(archive, f"{split}_{name}", name, file, mask)
                    file.truncate(0)
                if labels is not None:
                    for split, mask in splits:
                        if mask.any():
                            with _member(archive, f"{split}_{LABEL}", labels.dtype, (int(mask.sum()),)) as member:
                                member.write(labels[mask].tobytes())
                if card is not None:
                    archive.comment = as_comment(card)
            with partial.open("rb") as written:
                os.fsync(written.fileno())
            move_durably(partial, self._target)
        except OSError as error:
            raise_if_full(error, self._target)
            raise

    def _copy(self, archive: zipfile.ZipFile, array: str, name: str, file: BinaryIO, mask: NDArray[np.bool_]) -> None:
        shape, dtype = self._shapes[name], self._dtypes[name]
        row_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        step = max(1, _CHUNK_BYTES // row_bytes)
        file.seek(0)
        with _member(archive, array, dtype, (int(mask.sum()), *shape)) as member:
            for first in range(0, len(mask), step):
                wanted = mask[first : first + step]
                rows = np.frombuffer(file.read(len(wanted) * row_bytes), np.uint8).reshape(len(wanted), row_bytes)
                member.write(rows[wanted].tobytes())


def _member(archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...]) -> Any:
    """An open .npy member with its header written."""
    member = archive.open(zipfile.ZipInfo(f"{name}.npy", _ZIP_EPOCH), "w", force_zip64=True)
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    npy.write_array_header_1_0(member, header)  # type: ignore[no-untyped-call]
    return member
