"""A linear model on raw values, trained centrally in closed form: the bound from below.

Ridge regression on one-hot labels over all modalities' raw values side by side, each standardised by the training rows. The
penalty is the one of `PENALTIES` that is best on a fifth of the training rows, drawn by the seed; the model is then fitted to
all of them. No test row is looked at before that.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.methods.data_sets import Arrays, Loaded
from lamina.errors import ConfigError
from lamina.names import LABEL

PENALTIES = (1.0, 10.0, 100.0, 1_000.0, 10_000.0)


def linear_accuracy(loaded: Loaded, seed: int) -> tuple[float, float]:
    """(test accuracy, the penalty that was chosen). Raises ConfigError for data without labels."""
    if LABEL not in loaded.train:
        raise ConfigError("the linear bound needs labels, and these data have none")
    train, test = _raw(loaded.train), _raw(loaded.test)
    label, classes = loaded.train[LABEL], int(loaded.train[LABEL].max()) + 1
    order = np.random.default_rng([seed, 8]).permutation(len(label))
    held_out, rest = np.split(order, [len(order) // 5])
    scores = [
        _accuracy(_fit(train[rest], label[rest], classes, penalty), train[held_out], label[held_out]) for penalty in PENALTIES
    ]
    best = PENALTIES[int(np.argmax(scores))]
    return _accuracy(_fit(train, label, classes, best), test, loaded.test[LABEL]), best


def _raw(arrays: Arrays) -> NDArray[np.float64]:
    flat = [values.reshape(len(values), -1) for name, values in arrays.items() if name != LABEL]
    return np.concatenate(flat, axis=1).astype(np.float64)


def _fit(x: NDArray[np.float64], label: NDArray[np.int64], classes: int, penalty: float) -> dict[str, Any]:
    mean, deviation = x.mean(axis=0), np.maximum(x.std(axis=0), 1e-8)
    scaled = (x - mean) / deviation
    targets = np.eye(classes)[label]
    offset = targets.mean(axis=0)
    weights = np.linalg.solve(scaled.T @ scaled + penalty * np.eye(x.shape[1]), scaled.T @ (targets - offset))
    return {"mean": mean, "deviation": deviation, "weights": weights, "offset": offset}


def _accuracy(model: dict[str, Any], x: NDArray[np.float64], label: NDArray[np.int64]) -> float:
    logits = (x - model["mean"]) / model["deviation"] @ model["weights"] + model["offset"]
    return float((logits.argmax(axis=1) == label).mean())
