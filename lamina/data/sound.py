"""WAV files as waveforms or log-mel frames, with the standard library and numpy alone.

    resampled    y[j] = sum_n x[n] c sinc(c (t - n)) hann(t - n),  t = j from/to,  c = min(1, to/from);
                 16 zero crossings on each side; the weights of each y[j] are divided by their sum
    frames       power[i, b] = |FFT(hann(window) * y[i hop : i hop + window])|^2 / sum(hann^2)
    log-mel      m[i, k] = log(1e-6 + sum_b filter[k, b] power[i, b])

The filters are triangles of height 1 whose corners are equally spaced in mel(f) = 2595 log10(1 + f/700) from 0 to half the
sampling rate. The FFT is zero-padded so far that every filter holds a bin. These are not the features of torchaudio, Kaldi or
any pretrained model; for those, compute them yourself and bring arrays.
"""

import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lamina.errors import ConfigError, DataError

FLOOR = 1e-6
_CROSSINGS = 16
_BLOCK = 4096
_LONGEST_PADDING = 8192
MOST_RATE = 768_000
_LEAST_RATE = 1000


@dataclass(frozen=True)
class SoundSettings:
    """`rate` in samples a second: every file is brought to it. Window and hop in milliseconds."""

    rate: int = 16000
    window_ms: float = 25.0
    hop_ms: float = 10.0

    @property
    def window(self) -> int:
        return max(1, round(self.rate * self.window_ms / 1000))

    @property
    def hop(self) -> int:
        return max(1, round(self.rate * self.hop_ms / 1000))


def read_wav(path: Path, rate: int, samples: int) -> tuple[NDArray[np.float32], int]:
    """The first `samples` of a 16-bit PCM file at `rate`, in [-1, 1], channels averaged; fewer if the file is shorter.

    The second value is how many there would be without the cut. Only what is needed is read. Raises DataError.
    """
    try:
        with wave.open(str(path), "rb") as file:
            channels, width, own_rate, frames = file.getnchannels(), file.getsampwidth(), file.getframerate(), file.getnframes()
            if width != 2:
                raise DataError(
                    f"has {8 * width} bits for each sample, 16 are expected: ffmpeg -i {path.name} -sample_fmt s16 new.wav"
                )
            if not _LEAST_RATE <= own_rate <= MOST_RATE:
                raise DataError(f"says that it has {own_rate} samples a second; {_LEAST_RATE} to {MOST_RATE} are possible")
            wanted = min(frames, -(-samples * own_rate // rate) + _CROSSINGS * max(1, -(-own_rate // rate)) + 1)
            data = file.readframes(wanted)
    except (wave.Error, EOFError) as error:
        raise DataError(f"is no readable PCM WAV file ({error}): ffmpeg -i {path.name} -sample_fmt s16 new.wav") from error
    if len(data) != wanted * channels * width:
        raise DataError(f"is cut off: it has {len(data) // (channels * width)} of at least {wanted} samples")
    if not frames:
        raise DataError("holds no samples")
    mono = np.frombuffer(data, "<i2").reshape(-1, channels).mean(axis=1, dtype=np.float32) / np.float32(32768)
    return resample(mono, own_rate, rate)[:samples], -(-frames * rate // own_rate)


def resample(samples: NDArray[np.float32], source: int, target: int) -> NDArray[np.float32]:
    """Band-limited resampling from `source` to `target` samples a second; ceil(n target/source) samples."""
    if source == target:
        return samples
    cut = min(1.0, target / source)
    reach = int(np.ceil(_CROSSINGS / cut))
    offsets = np.arange(-reach + 1, reach + 1)
    padded = np.pad(samples.astype(np.float64), reach)
    result = np.empty(-(-len(samples) * target // source), np.float32)
    for first in range(0, len(result), _BLOCK):
        place = np.arange(first, min(first + _BLOCK, len(result))) * (source / target)
        base = np.floor(place).astype(np.int64)
        distance = place[:, None] - (base[:, None] + offsets)
        kernel = np.sinc(cut * distance) * np.cos(0.5 * np.pi * np.clip(distance / reach, -1, 1)) ** 2
        kernel /= kernel.sum(axis=1, keepdims=True)
        result[first : first + len(place)] = (kernel * padded[base[:, None] + offsets + reach]).sum(axis=1)
    return result


class LogMel:
    """Frames x coefficients of a waveform. Frame i begins at sample i hop; what lies past the end counts as zeros."""

    def __init__(self, settings: SoundSettings, frames: int, coefficients: int) -> None:
        self.settings, self.frames = settings, frames
        window = settings.window
        self._hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(window) / window) if window > 1 else np.ones(1)
        corners = _corners(settings.rate, coefficients)
        # The lowest filter is the narrowest; one that is wider than the distance of two bins holds a bin.
        needed = int(settings.rate / corners[2]) + 1
        if needed > max(window, _LONGEST_PADDING):
            raise ConfigError(f"{coefficients} mel coefficients are too many for a sampling rate of {settings.rate} Hz")
        self.length = 1 << (max(window, needed) - 1).bit_length()
        self.filters = _filters(corners, settings.rate, self.length)

    @property
    def samples(self) -> int:
        """Samples that the frames reach over."""
        return (self.frames - 1) * self.settings.hop + self.settings.window

    def __call__(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """(frames, coefficients) float32."""
        padded = np.zeros(self.samples)
        padded[: len(samples)] = samples[: self.samples]
        result = np.empty((self.frames, len(self.filters)), np.float32)
        for first in range(0, self.frames, 64):
            starts = np.arange(first, min(first + 64, self.frames)) * self.settings.hop
            pieces = padded[starts[:, None] + np.arange(self.settings.window)] * self._hann
            power = np.abs(np.fft.rfft(pieces, self.length, axis=1)) ** 2 / (self._hann**2).sum()
            result[first : first + len(starts)] = np.log(FLOOR + power @ self.filters.T)
        return result


def _corners(rate: int, count: int) -> NDArray[np.float64]:
    """(count + 2,) Hz."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    corners: NDArray[np.float64] = 700 * (10 ** (np.linspace(0, top, count + 2) / 2595) - 1)
    return corners


def _filters(corners: NDArray[np.float64], rate: int, length: int) -> NDArray[np.float64]:
    """(coefficients, length // 2 + 1) triangles."""
    bins = np.arange(length // 2 + 1) * rate / length
    rising = (bins - corners[:-2, None]) / (corners[1:-1] - corners[:-2])[:, None]
    falling = (corners[2:, None] - bins) / (corners[2:] - corners[1:-1])[:, None]
    triangles: NDArray[np.float64] = np.clip(np.minimum(rising, falling), 0, None)
    return triangles
