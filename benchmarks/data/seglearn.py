"""Shoulder exercises worn on the wrist: accelerometer (3, 100) + gyroscope (3, 100), 7 classes, 10 subjects.

The watch data that ships in seglearn: 140 recordings of 947 to 2,618 samples at 50 Hz, 14 for each subject, of the exercises
PEN ABD FEL IR ER TRAP ROW. They are cut into windows of 100 samples (2 s), one every 50: 4,677 windows, 295 to 561 for each
subject. Windows of one recording overlap, so they are never divided at random: a subject is a client, or is held out.

The file is a pickled array. It is read by `read_object_array`, which makes arrays and nothing else, and only after its hash
was checked.
"""

import io
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from benchmarks.data.fetch import cache_folder, fetch_wheel, read_member
from lamina.errors import ConfigError, DataError

WHEEL = ("seglearn==1.2.5", "ec6b952c85c9627050102854b372d85951563d3b990df677d7c55547e87413dd")
MEMBER = "seglearn/data/watch_dataset.npy"
CLASSES, SUBJECTS, CHANNELS = 7, tuple(range(1, 11)), 3
SAMPLES, STEP = 100, 50


@dataclass(frozen=True)
class Windows:
    """accelerometer and gyroscope (n, 3, 100) float32, label (n,) int64, subject (n,) int64 from 1 to 10."""

    accelerometer: NDArray[np.float32]
    gyroscope: NDArray[np.float32]
    label: NDArray[np.int64]
    subject: NDArray[np.int64]

    def take(self, rows: NDArray[np.intp]) -> "Windows":
        return Windows(self.accelerometer[rows], self.gyroscope[rows], self.label[rows], self.subject[rows])


def load_seglearn() -> Windows:
    """All windows, in the units of the recordings. Raises DataError if the package cannot be had or is another one."""
    folder = cache_folder() / "data"
    cached = folder / "seglearn-watch-v1-1.2.5.npz"
    if not cached.exists():
        windows = cut_windows(read_object_array(read_member(fetch_wheel(*WHEEL, folder), MEMBER)))
        partial = folder / f".{cached.name}.partial.npz"
        np.savez(partial, **vars(windows))
        partial.replace(cached)
    with np.load(cached) as data:
        return Windows(**{name: data[name] for name in Windows.__dataclass_fields__})


def split_by_subject(windows: Windows, test_subjects: Sequence[int]) -> tuple[Windows, Windows]:
    """(windows of the other subjects, windows of `test_subjects`), each channel standardised by the first part.

    Raises ConfigError for a subject that is not there, or if one side would be empty.
    """
    known = set(windows.subject.tolist())
    if not test_subjects or not set(test_subjects) < known:
        raise ConfigError(f"test_subjects must be some, not all, of {sorted(known)}; given {list(test_subjects)}")
    is_test = np.isin(windows.subject, list(test_subjects))
    train, test = windows.take(np.flatnonzero(~is_test)), windows.take(np.flatnonzero(is_test))
    scales = {name: _scale(getattr(train, name)) for name in ("accelerometer", "gyroscope")}
    return _standardised(train, scales), _standardised(test, scales)


def cut_windows(recordings: dict[str, Any]) -> Windows:
    """Windows of each recording in turn; samples after the last whole window are left out.

    `recordings` has `X`, arrays (samples, 6) with the accelerometer in the first three columns, and `y` and `subject`, one
    value for each. Raises DataError for anything else.
    """
    missing = {"X", "y", "subject"} - set(recordings)
    if missing:
        raise DataError(f"{MEMBER} lacks {sorted(missing)}; it has {sorted(recordings)}")
    pieces, origin = [], []
    for number, recording in enumerate(recordings["X"]):
        samples = np.asarray(recording)
        if samples.ndim != 2 or samples.shape[1] != 2 * CHANNELS:
            raise DataError(f"{MEMBER}: recording {number} has shape {samples.shape}, not (samples, {2 * CHANNELS})")
        starts = range(0, len(samples) - SAMPLES + 1, STEP)
        pieces += [samples[start : start + SAMPLES].T for start in starts]
        origin += [number] * len(starts)
    if not pieces:
        raise DataError(f"{MEMBER} has no recording of at least {SAMPLES} samples")
    values = np.stack(pieces).astype(np.float32)
    label, subject = (np.asarray(recordings[name])[origin].astype(np.int64) for name in ("y", "subject"))
    return Windows(np.ascontiguousarray(values[:, :CHANNELS]), np.ascontiguousarray(values[:, CHANNELS:]), label, subject)


def read_object_array(data: bytes) -> Any:
    """What a .npy file with one pickled object holds, if that is made of arrays, numbers, texts, lists and dictionaries.

    Raises DataError for a pickle that asks for anything else, which is not looked up, and for a file that is no such array.
    """
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        shape, _, dtype = npy.read_array_header_1_0(file) if version == (1, 0) else npy.read_array_header_2_0(file)
    except ValueError as error:
        raise DataError(f"{MEMBER} is no .npy file: {error}") from error
    if shape != () or not dtype.hasobject:
        raise DataError(f"{MEMBER} holds an array of shape {shape} and dtype {dtype}, not one object")
    try:
        return _ArraysOnly(file).load().item()
    except (pickle.UnpicklingError, EOFError, AttributeError, ValueError, TypeError) as error:
        raise DataError(f"{MEMBER} cannot be read: {error}") from error


def _latin1(text: str, codec: str) -> bytes:
    if codec != "latin1":
        raise pickle.UnpicklingError(f"the pickle asks for the codec {codec!r}, which is not allowed")
    return text.encode("latin1")


class _ArraysOnly(pickle.Unpickler):
    """Knows four names. The last is how Python 2 and 3 agree on bytes: as a text in Latin 1."""

    _KNOWN = {  # noqa: RUF012 (never changed)
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._KNOWN[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"the pickle asks for {module}.{name}, which is not allowed") from None


def _scale(values: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Mean and standard deviation of each channel, (1, 3, 1)."""
    return values.mean(axis=(0, 2), keepdims=True), values.std(axis=(0, 2), keepdims=True)


def _standardised(windows: Windows, scales: dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]) -> Windows:
    changed = {
        name: ((getattr(windows, name) - mean) / np.maximum(deviation, 1e-8)).astype(np.float32)
        for name, (mean, deviation) in scales.items()
    }
    return Windows(**changed, label=windows.label, subject=windows.subject)
