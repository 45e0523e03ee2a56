"""A linear model on raw values, trained centrally in closed form: the bound from below.

Ridge regression, each raw value standardised by the training rows: on one-hot labels, from all modalities side by side; or, for
pairs, from images to the words of their captions, weighted by how rare they are. The penalty is the one of `PENALTIES` that is
best on a fifth of the training data, drawn by the seed; the model is then fitted to all of it. No test row is looked at before
that.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.methods.data_sets import Arrays, Loaded
from benchmarks.methods.retrieval import both_ways, mean_recall
from lamina.errors import ConfigError
from lamina.names import LABEL

PENALTIES = (1.0, 10.0, 100.0, 1_000.0, 10_000.0, 100_000.0)
Rows = NDArray[np.float64]


def linear_accuracy(loaded: Loaded, seed: int) -> tuple[float, float]:
    """(test accuracy, the penalty that was chosen). Raises ConfigError for data without labels."""
    if LABEL not in loaded.train:
        raise ConfigError("the linear bound needs labels, and these data have none")
    train, test, label = _raw(loaded.train), _raw(loaded.test), loaded.train[LABEL]
    targets = np.eye(int(label.max()) + 1)[label]
    held_out = _a_fifth(len(label), seed)

    def score(penalty: float) -> float:
        model = _fit(train[~held_out], targets[~held_out], penalty)
        return _accuracy(model, train[held_out], label[held_out])

    best = max(PENALTIES, key=score)
    return _accuracy(_fit(train, targets, best), test, loaded.test[LABEL]), best


def linear_recalls(loaded: Loaded, seed: int) -> tuple[dict[str, float], float]:
    """(recalls of `retrieval.both_ways`, the penalty that was chosen) of images and token ids, 0 for padding. A caption is held
    out with all of its images. Raises ConfigError for data that do not say which answers are right."""
    if loaded.test_groups is None:
        raise ConfigError("the linear bound of pairs needs data that say what counts as the same answer (Loaded.test_groups)")
    words = 1 + max(int(part["text"].max()) for part in (loaded.train, loaded.test))
    images, texts = _raw({"image": loaded.train["image"]}), _bags(loaded.train["text"], words)
    rarity = np.log(len(texts) / (1 + (texts > 0).sum(axis=0)))
    _, caption = np.unique(loaded.train["text"], axis=0, return_inverse=True)
    held_out = _a_fifth(int(caption.max()) + 1, seed)[caption]

    def recalls(model: _Ridge, images: Rows, texts: Rows, group: NDArray[np.int64]) -> dict[str, float]:
        return both_ways(model(images), texts * rarity - model.offset, group)

    def score(penalty: float) -> float:
        model = _fit(images[~held_out], texts[~held_out] * rarity, penalty)
        return mean_recall(recalls(model, images[held_out], texts[held_out], caption[held_out]), 5)

    best = max(PENALTIES, key=score)
    model = _fit(images, texts * rarity, best)
    test = _raw({"image": loaded.test["image"]}), _bags(loaded.test["text"], words)
    return recalls(model, *test, loaded.test_groups), best


@dataclass(frozen=True)
class _Ridge:
    """(n, d) -> (n, targets), what is above or below the mean of each target."""

    mean: Rows
    deviation: Rows
    weights: Rows
    offset: Rows

    def __call__(self, x: Rows) -> Rows:
        predicted: Rows = (x - self.mean) / self.deviation @ self.weights
        return predicted


def _fit(x: Rows, targets: Rows, penalty: float) -> _Ridge:
    mean, deviation = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-8)
    scaled = (x - mean) / deviation
    offset = targets.mean(axis=0)
    weights = np.linalg.solve(scaled.T @ scaled + penalty * np.eye(x.shape[1]), scaled.T @ (targets - offset))
    return _Ridge(mean, deviation, weights, offset)


def _raw(arrays: Arrays) -> Rows:
    flat = [values.reshape(len(values), -1) for name, values in arrays.items() if name != LABEL]
    return np.concatenate(flat, axis=1).astype(np.float64)


def _bags(tokens: NDArray[np.int64], words: int) -> Rows:
    """(n, length) token ids -> (n, words), 1 for each word that is there."""
    bags = np.zeros((len(tokens), words))
    np.put_along_axis(bags, tokens, 1.0, axis=1)
    bags[:, 0] = 0
    return bags


def _a_fifth(count: int, seed: int) -> NDArray[np.bool_]:
    chosen = np.zeros(count, bool)
    chosen[np.random.default_rng([seed, 8]).permutation(count)[: count // 5]] = True
    return chosen


def _accuracy(model: _Ridge, x: Rows, label: NDArray[np.int64]) -> float:
    return float(((model(x) + model.offset).argmax(axis=1) == label).mean())
