"""The data sets of the comparison, each with its model, and how they are dealt to clients.

The models are those of the demo: 6 layers of width 64 for each modality, projections of 64 and 32. A name that ends in `_12`
or `_16` is the same data with so many layers, `_shallow` with one. `minilm` is MiniLM with its pretrained weights, 6 layers of
width 384.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.data import emoji, emoji_images, fashion, minilm, seglearn
from benchmarks.data.av_digits import Level, load_av_digits
from benchmarks.data.partition import dirichlet_rows, even_rows, natural_rows
from benchmarks.demo.plan import HEADS, LAYERS, WIDTH
from benchmarks.demo.plan import MODEL as AV_DIGITS
from lamina.errors import ConfigError
from lamina.names import LABEL
from lamina.plans.model import (
    Contrastive,
    Encoder,
    FamilyInput,
    ImagePatches,
    ModelDescription,
    ModuleEncoder,
    Projection,
    SensorWindows,
    Supervised,
    TextTokens,
)

Arrays = Mapping[str, NDArray[Any]]
"""Rows by modality, and the label where there is one."""


@dataclass(frozen=True)
class Loaded:
    """Both splits. `owner` has the natural client of each training row, `test_groups` what counts as the same answer in
    retrieval, `server` rows that no client has, for calibration, `public` such rows from which encoders are trained before the
    run, and `held_out` such rows with labels, to choose settings by; None where the data have no such thing."""

    train: Arrays
    test: Arrays
    owner: NDArray[np.int64] | None = None
    test_groups: NDArray[np.int64] | None = None
    server: Arrays | None = None
    public: Arrays | None = None
    held_out: Arrays | None = None


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


def load_six_subjects(seed: int) -> Loaded:
    """Two more subjects are nobody's clients."""
    return replace(load_with_public(seed), public=None)


def load_with_public(seed: int) -> Loaded:
    """As `load_six_subjects`; the windows of these two are public."""
    loaded = load_watch(seed)
    owner = loaded.owner
    assert owner is not None
    is_public = np.isin(owner, np.random.default_rng([seed, 9]).choice(np.unique(owner), 2, replace=False))
    clients, public = ({name: rows[mask] for name, rows in loaded.train.items()} for mask in (~is_public, is_public))
    return Loaded(clients, loaded.test, owner=owner[~is_public], public=public)


def load_one_sensor(seed: int) -> Loaded:
    """The accelerometer alone."""
    return _choose(load_watch(seed), ("accelerometer",))


def load_spectra(seed: int) -> Loaded:
    """Four modalities: both sensors, and the amplitudes of the frequencies of each channel (`amplitudes`)."""
    loaded = load_watch(seed)
    parts = [dict(part) for part in (loaded.train, loaded.test)]
    for name in ("accelerometer", "gyroscope"):
        train, test = (amplitudes(part[name]) for part in parts)
        mean, deviation = train.mean(axis=(0, 2), keepdims=True), train.std(axis=(0, 2), keepdims=True)
        for part, values in zip(parts, (train, test), strict=True):
            part[f"{name}_spectrum"] = (values - mean) / deviation
    return Loaded(*parts, owner=loaded.owner)


def load_spectrum_and_sensors(seed: int) -> Loaded:
    """Three modalities: both sensors, and the amplitudes of the accelerometer."""
    return _choose(load_spectra(seed), ("accelerometer", "gyroscope", "accelerometer_spectrum"))


def amplitudes(windows: NDArray[np.float32]) -> NDArray[np.float32]:
    """(n, channels, samples) -> log(1 + |FFT|) of the frequencies above 0, (n, channels, samples // 2)."""
    return np.log1p(np.abs(np.fft.rfft(windows, axis=-1)[..., 1:])).astype(np.float32)


def _choose(loaded: Loaded, modalities: Sequence[str]) -> Loaded:
    parts = ({name: part[name] for name in (*modalities, LABEL)} for part in (loaded.train, loaded.test))
    return Loaded(*parts, owner=loaded.owner)


def load_clothes(seed: int) -> Loaded:
    """2,500 and 1,000 of the images, so that a run takes minutes; the server has 500 others, without labels, and 4,000 others
    of the training part are held out."""
    train, test = fashion.load_fashion(seed, 3_000, 1_000)
    clients, server = {"image": train.image[:2_500], LABEL: train.label[:2_500]}, {"image": train.image[2_500:]}
    others = fashion.load_held_out(seed, 3_000, 4_000)
    held_out = {"image": others.image, LABEL: others.label}
    return Loaded(clients, {"image": test.image, LABEL: test.label}, server=server, held_out=held_out)


def load_emoji_pairs(seed: int) -> Loaded:
    """A style is a client; captions of the test may have words that the vocabulary lacks.

    Three fifths of the words occur in one caption only. Families of the test are not in the training data, so such words say
    nothing about them, and their rows of the table would be most of what a device holds: the frequent words are kept.
    """
    train, test = emoji_images.split_by_family(emoji_images.load_emoji_images(), seed)
    vocabulary = emoji_images.make_vocabulary(train.captions, VOCABULARY)
    parts = (
        {"image": part.image, "text": emoji_images.tokenise(part.captions, vocabulary, TEXT_TOKENS)} for part in (train, test)
    )
    return Loaded(*parts, owner=train.style, test_groups=test.concept)


def load_captions(seed: int) -> Loaded:
    """Captions of emoji in 8 groups, as MiniLM's tokenizer reads them."""
    tokenize = minilm.load_tokenizer(CAPTION_TOKENS)
    parts = emoji.split(emoji.load_emoji(), seed)
    return Loaded(*({"text": tokenize(part.texts), LABEL: part.label} for part in parts))


def with_layers(model: ModelDescription, layers: int) -> ModelDescription:
    encoders = tuple(encoder.model_copy(update={"layers": layers}) for encoder in model.encoders)
    return model.model_copy(update={"encoders": encoders})


def describe(name: str, inputs: Mapping[str, FamilyInput], classes: int | None) -> ModelDescription:
    encoders = tuple(
        Encoder(modality=modality, input=each, width=WIDTH, heads=HEADS, layers=LAYERS) for modality, each in inputs.items()
    )
    objective = Contrastive() if classes is None else Supervised(classes=classes)
    return ModelDescription(name=name, encoders=encoders, projection=Projection(hidden=64, output=32), objective=objective)


TEXT_TOKENS, VOCABULARY, CAPTION_TOKENS = 12, 1024, 24
_WINDOWS = SensorWindows(channels=seglearn.CHANNELS, samples=seglearn.SAMPLES, patch=10)
_CLOTHES = ImagePatches(channels=1, height=fashion.SIDE, width=fashion.SIDE, patch=7)
_ICONS = ImagePatches(channels=3, height=emoji_images.SIDE, width=emoji_images.SIDE, patch=8)

_SPECTRUM = SensorWindows(channels=seglearn.CHANNELS, samples=seglearn.SAMPLES // 2, patch=10)
_SENSORS = {"accelerometer": _WINDOWS, "gyroscope": _WINDOWS}
_SPECTRA = {f"{name}_spectrum": _SPECTRUM for name in _SENSORS}
_THREE = _SENSORS | {"accelerometer_spectrum": _SPECTRUM}

_MINILM = ModuleEncoder(
    modality="text",
    factory="benchmarks.data.minilm:load_minilm",
    options={"tokens": CAPTION_TOKENS, "pool": "mean"},
    input=TextTokens(vocabulary=minilm.VOCABULARY, length=CAPTION_TOKENS),
    features=((CAPTION_TOKENS, minilm.WIDTH + 1),) * (minilm.LAYERS + 1),  # a column more marks padding
    width=minilm.WIDTH,
)


def _watch(inputs: Mapping[str, FamilyInput]) -> ModelDescription:
    return describe("seglearn", inputs, seglearn.CLASSES)


DATA_SETS: dict[str, DataSet] = {
    "av_digits_medium": DataSet(AV_DIGITS, lambda seed: load_digits("medium", seed)),
    "av_digits_hard": DataSet(AV_DIGITS, lambda seed: load_digits("hard", seed)),
    "av_digits_pairs": DataSet(
        AV_DIGITS.model_copy(update={"objective": Contrastive()}), lambda seed: load_digits("medium", seed)
    ),
    "seglearn": DataSet(_watch(_SENSORS), load_watch),
    "seglearn_six": DataSet(_watch(_SENSORS), load_six_subjects),
    "seglearn_pretrained": DataSet(_watch(_SENSORS), load_with_public),
    "seglearn_1": DataSet(_watch({"accelerometer": _WINDOWS}), load_one_sensor),
    "seglearn_3": DataSet(_watch(_THREE), load_spectrum_and_sensors),
    "seglearn_4": DataSet(_watch(_SENSORS | _SPECTRA), load_spectra),
    "fashion": DataSet(describe("fashion", {"image": _CLOTHES}, fashion.CLASSES), load_clothes),
    "minilm": DataSet(
        ModelDescription(
            name="minilm",
            encoders=(_MINILM,),
            projection=Projection(hidden=None, output=64),
            objective=Supervised(classes=emoji.CLASSES),
        ),
        load_captions,
    ),
    "emoji": DataSet(
        describe("emoji", {"image": _ICONS, "text": TextTokens(vocabulary=VOCABULARY, length=TEXT_TOKENS)}, None),
        load_emoji_pairs,
    ),
}
_DEEP = {12: ("av_digits_medium", "av_digits_hard", "seglearn", "fashion", "emoji"), 16: ("fashion", "emoji")}
DATA_SETS["fashion_shallow"] = DataSet(with_layers(DATA_SETS["fashion"].model, 1), load_clothes)
DATA_SETS |= {
    f"{name}_{layers}": DataSet(with_layers(DATA_SETS[name].model, layers), DATA_SETS[name].load)
    for layers, names in _DEEP.items()
    for name in names
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


def deal(
    loaded: Loaded, split: str, clients: int, seed: int, folder: Path, limited: float = 0.0, are_whole: bool = True
) -> list[Path]:
    """One .npz for each client: its training rows, and an equal share of the test rows.

    The last clients, the share `limited` of them, get no test rows, so that a run with and one without them are asked the same.
    Unless they `are_whole`, each of these has one modality only, in turn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    parts = client_rows(loaded, split, clients, seed)
    able = len(parts) - round(limited * len(parts))
    nothing = [np.arange(0)] * (len(parts) - able)
    held_out = [*even_rows(len(next(iter(loaded.test.values()))), able, seed), *nothing]
    modalities = [name for name in loaded.train if name != LABEL]
    files = []
    for index, (mine, others) in enumerate(zip(parts, held_out, strict=True)):
        one = modalities[(index - able) % len(modalities)]
        lacks = {*modalities} - {one} if index >= able and not are_whole else set()
        arrays = {f"train_{name}": values[mine] for name, values in loaded.train.items() if name not in lacks}
        arrays |= {f"test_{name}": values[others] for name, values in loaded.test.items() if name not in lacks}
        files.append(folder / f"client-{index}.npz")
        np.savez(files[-1], **arrays)
    return files


def deal_server(loaded: Loaded, folder: Path) -> Path:
    """The server's rows as an .npz for a calibrator. Raises ConfigError if these data have none."""
    if loaded.server is None:
        raise ConfigError("calibration needs rows that no client has; these data keep none for the server")
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(folder / "server.npz", **{f"train_{name}": values for name, values in loaded.server.items()})
    return folder / "server.npz"
