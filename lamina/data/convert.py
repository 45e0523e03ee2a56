"""From a file, a text, an image or an array to the row that one input of the model takes."""

from abc import ABC, abstractmethod
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from lamina.data.card import MAX_NUMBERS, MOST_SCALE, ModalityCard, numbers_field
from lamina.data.classes import listed
from lamina.data.image import Fit, image_values, is_image, read_image
from lamina.data.items import Array
from lamina.data.sound import LogMel, SoundSettings, read_wav
from lamina.data.tables import SUFFIXES, read_numbers, read_text
from lamina.data.text import Tokenizer, open_tokenizer
from lamina.errors import ConfigError, DataError
from lamina.names import MOST_INPUT
from lamina.plans.model import AnyEncoder, Input, TextTokens
from lamina.printable import printable

IMAGES = ("image_patches", "image")
_COLOURS = {1: ("grey",), 3: ("red", "green", "blue"), 4: ("red", "green", "blue", "alpha")}
_PIXELS = ((0.0, 1.0), (0.0, 255.0), (-1.0, 1.0))
"""Ranges of pixels in arrays, the first that holds them."""


@dataclass(frozen=True)
class Settings:
    """How values become rows. `mean` and `std` belong to a modality: one number, or one for each channel."""

    mean: dict[str, tuple[float, ...]] = field(default_factory=dict)
    std: dict[str, tuple[float, ...]] = field(default_factory=dict)
    fit: Fit = "stretch"
    sound: SoundSettings = field(default_factory=SoundSettings)
    tokenizer: str = "words"


class Converter(ABC):
    """Calling it gives a row of `shape` and `dtype`; raises DataError that says what is wrong with the value.

    `seen` counts what was cut, padded or resized on the way, because a user may not have meant it.
    """

    def __init__(self, shape: tuple[int, ...], dtype: type[np.generic]) -> None:
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.seen: Counter[str] = Counter()

    @abstractmethod
    def __call__(self, value: Any) -> Array: ...

    @abstractmethod
    def card(self) -> ModalityCard:
        """How the rows were made so far, as far as it is known."""


def make_converter(encoder: AnyEncoder, settings: Settings) -> Converter:
    """The converter of a modality. Raises ConfigError for settings that do not fit it."""
    if isinstance(encoder.input, TextTokens):
        return _Text(encoder.input, settings)
    return _Numbers(encoder.modality, encoder.input, settings)


class _Text(Converter):
    """Token ids (length,) int64, cut or padded with 0."""

    def __init__(self, form: TextTokens, settings: Settings) -> None:
        super().__init__(form.shape, np.int64)
        self._length, self._vocabulary = form.length, form.vocabulary
        self._name = settings.tokenizer
        self._tokenizer: Tokenizer | None = None

    def __call__(self, value: Any) -> Array:
        if isinstance(value, Path):
            _expect_file(value)
            value = read_text(value)
        if isinstance(value, str):
            if not value.strip():
                raise DataError("the text is empty")
            # Opened with the first text: arrays of token ids need none, and no vocabulary that fits one.
            self._tokenizer = self._tokenizer or open_tokenizer(self._name, self._vocabulary)
            ids = np.asarray(self._tokenizer(value), np.int64)
            if not len(ids):
                raise DataError(f"the text {value[:40]!r} has no tokens")
            self.seen[f"texts made into tokens by {self._name!r}"] += 1
        else:
            ids = _integers(value)
        bad = np.flatnonzero((ids < 0) | (ids >= self._vocabulary))
        if len(bad):
            raise DataError(f"token {ids[bad[0]]} at place {bad[0]} is outside of 0..{self._vocabulary - 1}")
        if len(ids) > self._length:
            self.seen[f"texts longer than {self._length} tokens, cut"] += 1
        row = np.zeros(self._length, np.int64)
        row[: len(ids)] = ids[: self._length]
        return row

    def card(self) -> ModalityCard:
        if self._tokenizer is None:
            return ModalityCard(shape=self.shape)
        known = self._tokenizer
        return ModalityCard(shape=self.shape, tokenizer=known.name, vocabulary=known.size, tokens=known.first or None)


class _Numbers(Converter):
    """float32 rows of images, sounds, sensor windows and arrays."""

    def __init__(self, modality: str, form: Input, settings: Settings) -> None:
        super().__init__(form.shape, np.float32)
        self._modality, self._kind, self._settings = modality, form.kind, settings
        self._is_image = form.kind in IMAGES or (form.kind == "values" and len(form.shape) == 3)
        self._mel: LogMel | None = None
        axis = -1 if form.kind == "audio_frames" else 0
        self._mean = _per_channel("--mean", modality, settings.mean.get(modality, (0.0,)), form.shape, axis)
        self._std = _per_channel("--std", modality, settings.std.get(modality, (1.0,)), form.shape, axis)
        if not (self._std > 0).all():
            raise ConfigError(f"--std of {modality} must be above 0, given {settings.std[modality]}")
        self._is_scaled = modality in settings.mean or modality in settings.std
        self._forms: set[Literal["image", "sound", "array"]] = set()
        self._low, self._high = np.inf, -np.inf
        self._columns: tuple[str, ...] = ()

    def __call__(self, value: Any) -> Array:
        if isinstance(value, str | Path):
            row = self._read(Path(value))
        elif is_image(value):
            row = image_values(value, self._image_shape("an image"), self._settings.fit)
            self._forms.add("image")
        else:
            row = self._array(value)
        if not np.isfinite(row).all():
            place = tuple(int(i) for i in np.argwhere(~np.isfinite(row))[0])
            raise DataError(f"value {row[place]} at index {list(place)} is not finite")
        self._low, self._high = min(self._low, float(row.min())), max(self._high, float(row.max()))
        if self._is_scaled:
            row = (row - self._mean) / self._std
        if not (np.abs(row) <= MOST_INPUT).all():
            place = tuple(int(i) for i in np.argwhere(~(np.abs(row) <= MOST_INPUT))[0])
            raise DataError(
                f"value {row[place]:g} at index {list(place)} is beyond +-{MOST_INPUT:,.0f}; if it is real, scale all of them: "
                f"--mean {self._modality}=M --std {self._modality}=S"
            )
        return row

    def _read(self, path: Path) -> NDArray[np.float32]:
        _expect_file(path)
        suffix = path.suffix.lower()
        if suffix == ".npy":
            try:
                return self._array(np.load(path, allow_pickle=False))
            except (ValueError, EOFError) as error:
                raise DataError(f"is no readable .npy array of plain numbers: {error}") from error
        if suffix == ".wav":
            return self._sound(path)
        if suffix in SUFFIXES:
            return self._table(path)
        row = read_image(path, self._image_shape(f"the file {path.name}"), self._settings.fit)
        self._forms.add("image")
        return row

    def _image_shape(self, what: str) -> tuple[int, ...]:
        if not self._is_image:
            raise DataError(f"{what} is read as an image, but the model takes {self._kind} of shape {self.shape}")
        return self.shape

    def _sound(self, path: Path) -> NDArray[np.float32]:
        sound = self._settings.sound
        is_frames = self._kind == "audio_frames" or (self._kind == "values" and len(self.shape) == 2)
        if is_frames:
            self._mel = self._mel or LogMel(sound, *self.shape)
        elif not (self._kind == "values" and len(self.shape) == 1):
            raise DataError(f"is a sound, but the model takes {self._kind} of shape {self.shape}")
        wanted = self._mel.samples if self._mel else self.shape[0]
        samples, there = read_wav(path, sound.rate, wanted)
        self._forms.add("sound")
        seconds = wanted / sound.rate
        if there > wanted:
            self.seen[f"sounds longer than {seconds:.3g} s, cut"] += 1
        elif there < wanted:
            self.seen[f"sounds shorter than {seconds:.3g} s, filled with silence"] += 1
        return self._mel(samples) if self._mel else np.pad(samples, (0, wanted - len(samples)))

    def _table(self, path: Path) -> NDArray[np.float32]:
        """A row for each sample and a column for each channel, turned for sensor windows."""
        rows, names = read_numbers(path)
        if self._columns and names and names != self._columns:
            raise DataError(f"has the columns {listed(names)}, the tables before it {listed(self._columns)}")
        self._columns = self._columns or names
        return self._array(rows.T if self._kind == "sensor_windows" else rows.reshape(-1) if len(self.shape) == 1 else rows)

    def _array(self, value: Any) -> NDArray[np.float32]:
        array = _plain(value)
        if array.shape != self.shape:
            # An axis of size 1 may be missing or one too many: 28x28 is 1x28x28.
            if [n for n in array.shape if n != 1] != [n for n in self.shape if n != 1]:
                raise DataError(f"has shape {array.shape}, the model takes {self.shape}{self._hint(array.shape)}")
            array = array.reshape(self.shape)
        if array.dtype != np.uint8:
            self._forms.add("array")
        scale = np.float32(255) if array.dtype == np.uint8 and self._is_image else np.float32(1)
        with np.errstate(over="ignore"):  # what float32 cannot hold becomes infinite, and is reported as such
            return array.astype(np.float32) / scale

    def card(self) -> ModalityCard:
        is_image, is_sound, sound = "image" in self._forms, "sound" in self._forms, self._settings.sound
        values_range = self._range()
        # Pixels in no range that pixels have were scaled before they came here, nobody knows how.
        is_raw = not self._is_image or self._is_scaled or values_range is not None
        channels = _COLOURS.get(self.shape[0]) if is_image else tuple(printable(name, 100).strip() for name in self._columns)
        return ModalityCard(
            shape=self.shape,
            range=values_range,
            mean=numbers_field(_given(self._mean)) if is_raw else None,
            std=numbers_field(_given(self._std)) if is_raw else None,
            channels=channels if channels and all(channels) and len(channels) <= MAX_NUMBERS else None,
            fit=self._settings.fit if is_image else None,
            rate=sound.rate if is_sound else None,
            window_ms=sound.window_ms if self._mel else None,
            hop_ms=sound.hop_ms if self._mel else None,
        )

    def _range(self) -> tuple[float, float] | None:
        """What pixels and samples lie within before they are scaled; None for values of any other kind."""
        if not self._is_image:
            return (-1.0, 1.0) if self._forms == {"sound"} and not self._mel else None
        if "array" not in self._forms:
            return (0.0, 1.0)
        return next((r for r in _PIXELS if r[0] <= self._low and self._high <= r[1]), None)

    def _hint(self, shape: tuple[int, ...]) -> str:
        if self._kind in IMAGES and len(shape) == 3 and (shape[2], *shape[:2]) == self.shape:
            return ": it is height, width, channels; use .transpose(2, 0, 1)"
        if len(shape) == 2 and shape[::-1] == self.shape:
            return ": it is turned; use .T"
        return ""


def _given(numbers: NDArray[np.float32]) -> list[float]:
    """As the option had them: the shortest decimals of the float32 numbers."""
    return [float(str(number)) for number in numbers.reshape(-1)]


def _per_channel(option: str, name: str, given: tuple[float, ...], shape: tuple[int, ...], axis: int) -> NDArray[np.float32]:
    """Broadcasts one number, or one for each channel, over the shape."""
    if len(given) not in (1, shape[axis]):
        raise ConfigError(f"{option} of {name} takes 1 or {shape[axis]} numbers, given {len(given)}")
    wrong = [number for number in given if not abs(number) <= MOST_SCALE]
    if wrong:
        raise ConfigError(f"{option} of {name} takes numbers within +-{MOST_SCALE:g}, given {wrong[0]}")
    places = [1] * len(shape)
    places[axis] = len(given)
    return np.asarray(given, np.float32).reshape(places)


def _expect_file(path: Path) -> None:
    try:
        if not path.is_file():
            raise DataError("the file is missing")
        if not path.stat().st_size:
            raise DataError("the file has 0 bytes")
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}") from error


def _plain(value: Any) -> Array:
    """As an array of numbers. Raises DataError for what is none."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise DataError(f"{type(value).__name__} is no array: {error}") from error
    if array.dtype.kind not in "biuf":
        raise DataError(f"{type(value).__name__} of dtype {array.dtype} is no array of numbers")
    return array


def _integers(value: Any) -> NDArray[np.int64]:
    """(tokens,) int64."""
    array = _plain(value)
    if array.ndim != 1:
        raise DataError(f"has shape {array.shape}; token ids are one list")
    if array.dtype.kind == "f":
        bad = np.flatnonzero(~np.isfinite(array) | (array != np.floor(array)))
        if len(bad):
            raise DataError(f"token {array[bad[0]]} at place {bad[0]} is no integer")
    return array.astype(np.int64)
