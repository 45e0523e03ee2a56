"""The data sets of the comparison, each with its model, and how they are dealt to clients.

The models are those of the demo: 6 layers of width 64 for each modality, projections of 64 and 32.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import emoji_images, fashion, seglearn
from benchmarks.data.av_digits import Level, load_av_digits
from benchmarks.data.partition import dirichlet_rows, even_rows, natural_rows
from benchmarks.demo_plan import HEADS, LAYERS, WIDTH
from benchmarks.demo_plan import MODEL as AV_DIGITS
from lamina.errors import ConfigError
from lamina.model import (
    Contrastive,
    Encoder,
    FamilyInput,
    ImagePatches,
    ModelDescription,
    Projection,
    SensorWindows,
    Supervised,
    TextTokens,
)
from lamina.names import LABEL

Arrays = Mapping[str, NDArray[Any]]
"""Rows by modality, and the label where there is one."""


@dataclass(frozen=True)
class Loaded:
    """Both splits. `owner` has the natural client of each training row, `test_groups` what counts as the same answer in
    retrieval; None where the data have no such thing."""

    train: Arrays
    test: Arrays
    owner: NDArray[np.int64] | None = None
    test_groups: NDArray[np.int64] | None = None


@dataclass(frozen=True)
class DataSet:
    """`load(seed)` gives the same rows for the same seed."""

    model: ModelDescription
    load: Callable[[int], Loaded]


def load_digits(level: Level, seed: int) -> Loaded:
    train, test = load_av_digits(level, seed)
    return Loaded(*({"image": part.image, "audio": part.audio, LABEL: part.label} for part in (train, test)))


def load_watch(seed: int) -> Loaded:
    """Two of the ten subjects are held out, drawn by the seed; the others are the clients."""
    windows = seglearn.load_seglearn()
    held_out = np.random.default_rng([seed, 7]).choice(seglearn.SUBJECTS, 2, replace=False)
    train, test = seglearn.split_by_subject(windows, held_out.tolist())
    arrays = ({"accelerometer": p.accelerometer, "gyroscope": p.gyroscope, LABEL: p.label} for p in (train, test))
    return Loaded(*arrays, owner=train.subject)


def load_clothes(seed: int) -> Loaded:
    """5,000 and 1,000 of the images, so that a run takes minutes."""
    train, test = fashion.load_fashion(seed, 5_000, 1_000)
    return Loaded(*({"image": part.image, LABEL: part.label} for part in (train, test)))


def load_emoji_pairs(seed: int) -> Loaded:
    """A style is a client; captions of the test subgroups may have words that the vocabulary lacks."""
    train, test = emoji_images.split_by_subgroup(emoji_images.load_emoji_images(), seed)
    vocabulary = emoji_images.make_vocabulary(train.captions)
    parts = (
        {"image": part.image, "text": emoji_images.tokenise(part.captions, vocabulary, TEXT_TOKENS)} for part in (train, test)
    )
    return Loaded(*parts, owner=train.style, test_groups=test.concept)


def describe(name: str, inputs: Mapping[str, FamilyInput], classes: int | None) -> ModelDescription:
    encoders = tuple(
        Encoder(modality=modality, input=each, width=WIDTH, heads=HEADS, layers=LAYERS) for modality, each in inputs.items()
    )
    objective = Contrastive() if classes is None else Supervised(classes=classes)
    return ModelDescription(name=name, encoders=encoders, projection=Projection(hidden=64, output=32), objective=objective)


TEXT_TOKENS, VOCABULARY = 12, 4096
_WINDOWS = SensorWindows(channels=seglearn.CHANNELS, samples=seglearn.SAMPLES, patch=10)
_CLOTHES = ImagePatches(channels=1, height=fashion.SIDE, width=fashion.SIDE, patch=7)
_ICONS = ImagePatches(channels=3, height=emoji_images.SIDE, width=emoji_images.SIDE, patch=8)

DATA_SETS: dict[str, DataSet] = {
    "av_digits_medium": DataSet(AV_DIGITS, lambda seed: load_digits("medium", seed)),
    "av_digits_hard": DataSet(AV_DIGITS, lambda seed: load_digits("hard", seed)),
    "seglearn": DataSet(describe("seglearn", {"accelerometer": _WINDOWS, "gyroscope": _WINDOWS}, seglearn.CLASSES), load_watch),
    "fashion": DataSet(describe("fashion", {"image": _CLOTHES}, fashion.CLASSES), load_clothes),
    "emoji": DataSet(
        describe("emoji", {"image": _ICONS, "text": TextTokens(vocabulary=VOCABULARY, length=TEXT_TOKENS)}, None),
        load_emoji_pairs,
    ),
}


def client_rows(loaded: Loaded, split: str, clients: int, seed: int) -> list[NDArray[np.intp]]:
    """Training rows of each client. `split` is one of

        beta=B    shares of each class drawn from Dirichlet(B): label skew, the more the smaller B
        natural   one client for each owner; `clients` is not used
        even      equal shares at random
        pooled    one client with all rows

    Raises ConfigError for another split, or one that these data do not allow.
    """
    some = next(iter(loaded.train.values()))
    kind, _, number = split.partition("=")
    if kind == "beta" and number:
        if LABEL not in loaded.train:
            raise ConfigError(f"split {split!r} deals classes, and these data have no labels; use natural or even")
        return dirichlet_rows(loaded.train[LABEL], clients, float(number), seed)
    if split == "natural":
        if loaded.owner is None:
            raise ConfigError("split 'natural' needs data with owners, such as subjects; these have none: use beta=B or even")
        return natural_rows(loaded.owner)
    if split == "even":
        return even_rows(len(some), clients, seed)
    if split == "pooled":
        return [np.arange(len(some))]
    raise ConfigError(f"there is no split {split!r}; known: beta=B, natural, even, pooled")


def deal(loaded: Loaded, split: str, clients: int, seed: int, folder: Path) -> list[Path]:
    """One .npz for each client: its training rows, and an equal share of the test rows."""
    folder.mkdir(parents=True, exist_ok=True)
    parts = client_rows(loaded, split, clients, seed)
    held_out = even_rows(len(next(iter(loaded.test.values()))), len(parts), seed)
    files = []
    for index, (mine, others) in enumerate(zip(parts, held_out, strict=True)):
        arrays = {f"train_{name}": values[mine] for name, values in loaded.train.items()}
        arrays |= {f"test_{name}": values[others] for name, values in loaded.test.items()}
        files.append(folder / f"client-{index}.npz")
        np.savez(files[-1], **arrays)
    return files
