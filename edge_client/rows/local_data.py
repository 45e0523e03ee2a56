"""The device's own examples: one .npz file with `train_<modality>`, `train_label`, `test_<modality>` and `test_label`.

Rows are read from the file when they are needed; the arrays are never in memory as a whole. Nothing is unpickled.
"""

import json
import re
import shutil
import zipfile
from collections.abc import Collection, Iterable
from pathlib import Path

import numpy as np

from edge_client.job import SPLITS, Rows, Split
from edge_client.rows.checks import find_fault
from edge_client.rows.row_files import RowFile
from lamina.bundles.bundle import hash_file
from lamina.data.card import read_card
from lamina.errors import DataError
from lamina.files import raise_if_full, write_durably
from lamina.names import LABEL, MOST_INPUT, second_view
from lamina.plans.model import ModelDescription

DATA_RULES = 2
"""Grows with what `LocalData.check` asks of the data: what older rules let pass is checked again."""
_CHUNK_BYTES = 1 << 20
_MODALITY = re.compile(r"[a-z][a-z0-9_]{0,31}")  # as lamina.plans.model.Name


def limits_of(model: ModelDescription) -> dict[str, int]:
    """How many values each integer input may have: the classes of the label, the vocabulary of each text modality and of its
    second view."""
    limits: dict[str, int] = {}
    for encoder in model.encoders:
        if encoder.input.kind == "text_tokens":
            limits |= dict.fromkeys((encoder.modality, second_view(encoder.modality)), encoder.input.vocabulary)
    if model.labels is not None:
        limits[LABEL] = model.labels
    return limits


class LocalData:
    """An opened data file. `fingerprint` is its sha256: other bytes are other data. `card`: how it was packed, if known."""

    def __init__(self, path: Path, scratch: Path) -> None:
        """Reads the headers only. `scratch` takes the arrays of a compressed file, which cannot be read by rows.

        Raises DataError for a file that is no such .npz, has no training examples, or arrays of unequal length.
        """
        self.path = path
        if not path.is_file():
            raise DataError(f"{path} does not exist; `--data` takes an .npz file with arrays such as train_image, train_label")
        try:
            self.card = read_card(path)
            self.fingerprint = _fingerprint(path, scratch)
            self._arrays = {name: rows for name, rows in _open_arrays(path, scratch / self.fingerprint)}
        except zipfile.BadZipFile as error:
            raise DataError(f"{path} is no .npz file ({error}); write it with numpy.savez") from error
        misnamed = [name for name in self.modalities if not _MODALITY.fullmatch(name)]
        if misnamed:
            raise DataError(f"{path}: {misnamed[0]!r} is no modality; names are lower case, such as image or audio_frames")
        known = [f"{split}_{name}" for split in SPLITS for name in (*self.modalities, LABEL)]
        unknown = sorted(set(self._arrays) - set(known))
        if unknown:
            raise DataError(
                f"{path} has the array {unknown[0]!r}, which names no split or has no train_ counterpart; "
                f"names are train_<modality>, train_label, test_<modality>, test_label"
            )
        self.train_examples = self._length("train")
        self.test_examples = self._length("test")
        if not self.train_examples or not self.modalities:
            raise DataError(f"{path} has no training examples: it needs arrays such as train_image with at least 1 row")

    @property
    def modalities(self) -> tuple[str, ...]:
        names = (name.removeprefix("train_") for name in self._arrays if name.startswith("train_"))
        return tuple(sorted(name for name in names if name != LABEL))

    def rows(self, split: Split, name: str) -> RowFile:
        """The rows of a modality, or of the label."""
        try:
            return self._arrays[f"{split}_{name}"]
        except KeyError:
            raise DataError(f"{self.path} has no array {split}_{name}; it has {sorted(self._arrays)}") from None

    def location(self, split: Split, name: str) -> Rows:
        """Where those rows are."""
        rows = self.rows(split, name)
        return Rows(str(rows.path), rows.offset, rows.source, rows.identity)

    def examples(self, split: Split) -> int:
        return self.train_examples if split == "train" else self.test_examples

    def check(self, model: ModelDescription, modalities: Collection[str] = ()) -> None:
        """Reads everything that the model uses once, or what these modalities of it use.

        Raises DataError that names file, array, index and value.
        """
        model = model.of_device(modalities)
        limits = limits_of(model)
        for split in SPLITS:
            if not self.examples(split):
                continue
            for encoder in model.encoders:
                if modalities and encoder.modality not in modalities:
                    continue
                dtype = "int64" if encoder.input.kind == "text_tokens" else "float32"
                self._check_array(split, encoder.modality, encoder.input.shape, dtype, limits)
            if LABEL in limits:
                self._check_array(split, LABEL, (), "int64", limits)

    def _check_array(self, split: Split, name: str, shape: tuple[int, ...], dtype: str, limits: dict[str, int]) -> None:
        rows = self.rows(split, name)
        if rows.dtype != np.dtype(dtype):
            raise DataError(f"{rows.source} has dtype {rows.dtype}, the model takes {dtype}: store .astype({dtype!r}) of it")
        if rows.shape[1:] != shape:
            raise DataError(f"{rows.source} has rows of shape {rows.shape[1:]}, the model takes {shape}")
        row_bytes = int(np.prod(shape, dtype=np.int64)) * rows.dtype.itemsize
        for first, chunk in rows.chunks(max(1, _CHUNK_BYTES // row_bytes)):
            fault = find_fault(chunk, limits.get(name), first, MOST_INPUT)
            if fault is not None:
                raise DataError(f"{rows.source}: {fault}")

    def _length(self, split: Split) -> int:
        """Rows of every array of a split; 0 if it has none."""
        lengths = {name: len(rows) for name, rows in self._arrays.items() if name.startswith(f"{split}_")}
        if len(set(lengths.values())) > 1:
            raise DataError(f"{self.path}: the {split} arrays must have equally many rows, they have {lengths}")
        return next(iter(lengths.values()), 0)


def _fingerprint(path: Path, scratch: Path) -> str:
    """sha256 of the file; remembered while name, size and time of change stay, because a device starts often."""
    found = path.stat()
    stamp = [str(path.resolve()), found.st_ino, found.st_size, found.st_mtime_ns]
    note = scratch / "fingerprint.json"
    if note.is_file():
        known = json.loads(note.read_bytes())
        if known[0] == stamp:
            return str(known[1])
    digest = hash_file(path)
    write_durably(note, json.dumps([stamp, digest]).encode())
    return digest


def _open_arrays(path: Path, scratch: Path) -> Iterable[tuple[str, RowFile]]:
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            source = f"{path}, array {name!r}"
            if member.compress_type == zipfile.ZIP_STORED:
                yield name, RowFile(path, _values_start(path, member), source)
            else:
                yield name, RowFile(_unpack(archive, member, scratch), source=source)


def _values_start(path: Path, member: zipfile.ZipInfo) -> int:
    """Where a stored member begins: after its local header of 30 bytes, its name and its extra field."""
    with path.open("rb") as file:
        file.seek(member.header_offset)
        local = file.read(30)
    return member.header_offset + 30 + int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")


def _unpack(archive: zipfile.ZipFile, member: zipfile.ZipInfo, scratch: Path) -> Path:
    """The member as a file of its own. The folder is named by the fingerprint, so a complete file can be used again."""
    for older in scratch.parent.glob("*"):
        if older != scratch and older.is_dir():
            shutil.rmtree(older)
    scratch.mkdir(parents=True, exist_ok=True)
    target = scratch / f"{archive.infolist().index(member)}.npy"
    if not (target.is_file() and target.stat().st_size == member.file_size):
        partial = target.with_suffix(".partial")
        try:
            with archive.open(member) as source, partial.open("wb") as file:
                shutil.copyfileobj(source, file, _CHUNK_BYTES)
        except OSError as error:
            partial.unlink(missing_ok=True)
            raise_if_full(error, target)
            raise
        partial.replace(target)
    return target
