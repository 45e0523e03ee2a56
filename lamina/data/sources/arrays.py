"""NumPy arrays: an .npz file, a folder of .npy files, or one .npy file, with a row for each example.

Arrays are named <modality>, label, split and group, or train_<modality>, train_label, test_<modality>, test_label. They are
read row by row, so they may be larger than the memory.
"""

import difflib
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from lamina.data.faults import Faults
from lamina.data.items import Array, Item
from lamina.data.npy_stream import NpyStream, open_npz
from lamina.errors import DataError
from lamina.names import LABEL
from lamina.plans.model import ModelDescription

SPLITS = ("train", "test")
_MODALITY = re.compile(r"[a-z][a-z0-9_]{0,31}")  # as lamina.plans.model.Name


class ArraySource:
    """`is_strict` is how a device reads it: dtypes and shapes must be right as they are."""

    def __init__(self, path: Path, model: ModelDescription, names: Mapping[str, str], is_strict: bool = False) -> None:
        """Raises DataError for a file that cannot be read or lacks a modality of the model."""
        self._path, self._model, self._is_strict = path, model, is_strict
        self._names = {modality: names.get(modality, modality) for modality in model.modalities}
        self._arrays = _open_arrays(path, self._names)
        self._is_split = any(name.startswith("train_") for name in self._arrays)
        needed = [*self._names.values(), *([LABEL] if model.labels is not None else [])]
        self._prefixes: tuple[str, ...] = ("",)
        if self._is_split:
            # A device takes any test array for a promise of all of them.
            has_test = any(name.startswith("test_") and (is_strict or name[5:] in needed) for name in self._arrays)
            self._prefixes = ("train_", "test_") if has_test else ("train_",)
        for prefix in self._prefixes:
            for name in needed:
                if prefix + name not in self._arrays:
                    near = difflib.get_close_matches(prefix + name, self._arrays, 1, 0.5)
                    hint = f"; did you mean {near[0]!r}? Pass --rename {name}={near[0].removeprefix(prefix)}" if near else ""
                    raise DataError(f"{path} has no array {prefix + name!r}, it has {', '.join(self._arrays)}{hint}")

    @property
    def words(self) -> str:
        return f"arrays in {self._path}"

    @property
    def labels(self) -> Counter[str] | None:
        labels = [self._arrays[prefix + LABEL] for prefix in self._prefixes if prefix + LABEL in self._arrays]
        if not labels or all(stream.dtype.kind not in "US" for stream in labels):
            return None
        return Counter(str(_scalar(row)).strip() for stream in labels for row in stream.rows())

    def count(self) -> int | None:
        return sum(len(self._arrays[prefix + next(iter(self._names.values()))]) for prefix in self._prefixes)

    def items(self, faults: Faults) -> Iterator[Item]:
        if self._is_strict:
            self._report_strangers(faults)
        for prefix in self._prefixes:
            taken = [*self._names.values(), *(n for n in (LABEL, "split", "group") if prefix + n in self._arrays)]
            streams = {name: self._arrays[prefix + name] for name in taken}
            if self._is_strict and not self._fits_as_it_is(streams, faults):
                continue
            counted = [s for s in self._arrays.values() if s.name.startswith(prefix)] if self._is_strict else streams.values()
            lengths = {stream.name: len(stream) for stream in counted}
            if len(set(lengths.values())) > 1:
                shown = ", ".join(f"{name} {length}" for name, length in lengths.items())
                extra = max(lengths.values()) - min(lengths.values())
                faults.add(str(self._path), f"arrays of unequal length: {shown} rows", items_left_out=extra)
            # Not strict: a shorter array ends them all, which is the fault above.
            for index, rows in enumerate(zip(*(stream.rows() for stream in streams.values()), strict=False)):
                row = dict(zip(streams, rows, strict=True))
                yield Item(
                    name=f"{prefix}{next(iter(self._names.values()))}[{index}]",
                    values={modality: row[name] for modality, name in self._names.items()},
                    label=_scalar(row.get(LABEL)),
                    split=prefix.removesuffix("_") or _text(row.get("split")),
                    group=_text(row.get("group")),
                )

    def _report_strangers(self, faults: Faults) -> None:
        """Arrays that keep a device from opening the file."""
        for name, stream in self._arrays.items():
            split, _, own = name.partition("_")
            if split not in SPLITS or f"train_{own}" not in self._arrays:
                faults.add(stream.source, "names no split or has no train_ counterpart; names are train_<modality>, test_label")
            elif not _MODALITY.fullmatch(own):
                faults.add(stream.source, f"{own!r} is no modality; names are lower case, such as image or audio_frames")

    def _fits_as_it_is(self, streams: dict[str, NpyStream], faults: Faults) -> bool:
        before = faults.total
        for name, stream in streams.items():
            modality = next((m for m, own in self._names.items() if own == name), None)
            dtype, shape = "int64", tuple[int, ...]()
            if modality is not None:
                form = self._model.encoder(modality).input
                dtype, shape = "int64" if form.kind == "text_tokens" else "float32", form.shape
            elif name != LABEL or self._model.labels is None:
                continue
            if stream.dtype != np.dtype(dtype):
                faults.add(stream.source, f"has dtype {stream.dtype}, a device takes {dtype}; `lamina data pack` casts it")
            if stream.shape[1:] != shape:
                faults.add(stream.source, f"has rows of shape {stream.shape[1:]}, the model takes {shape}")
        return faults.total == before


def is_packed(path: Path) -> bool:
    """Whether an .npz file has the arrays that a device reads."""
    return path.suffix == ".npz" and path.is_file() and any(name.startswith("train_") for name in open_npz(path))


def _open_arrays(path: Path, names: Mapping[str, str]) -> dict[str, NpyStream]:
    if path.suffix == ".npz":
        return open_npz(path)
    if path.is_dir():
        return {file.stem: NpyStream(file) for file in sorted(path.glob("*.npy"))}
    # One .npy file alone is the model's one modality; anything else beside it is in its folder.
    beside = {file.stem: NpyStream(file) for file in sorted(path.parent.glob("*.npy"))}
    if len(names) == 1 and path.stem not in beside.keys() & {*names.values(), LABEL}:
        return {**beside, next(iter(names.values())): NpyStream(path)}
    return beside


def _scalar(row: Array | None) -> object:
    """A label row: a number of shape () or (1,), or a name."""
    if row is None:
        return None
    if row.size != 1:
        raise DataError(f"labels have rows of shape {row.shape}; one number for each example is expected")
    value = np.asarray(row).reshape(-1)[0]
    return value.decode() if isinstance(value, bytes) else str(value) if isinstance(value, str) else value


def _text(row: Array | None) -> str | None:
    return None if row is None else str(_scalar(row))
