"""Splitting a data set over devices."""

import numpy as np
from numpy.typing import NDArray

from lamina.errors import ConfigError


def dirichlet_rows(label: NDArray[np.int64], devices: int, beta: float, seed: int, min_rows: int = 8) -> list[NDArray[np.intp]]:
    """Rows of each device: per class, shares p ~ Dirichlet(beta) over the devices (label skew; smaller beta, more skew).

    Every row goes to exactly one device. A draw that leaves a device with fewer than `min_rows` rows is drawn again.
    Raises ConfigError if 100 draws do not give every device that many.
    """
    if devices < 1 or beta <= 0:
        raise ConfigError(f"devices must be at least 1 and beta above 0, given {devices} and {beta}")
    rng = np.random.default_rng([seed, 2])
    for _ in range(100):
        parts: list[list[NDArray[np.intp]]] = [[] for _ in range(devices)]
        for value in np.unique(label):
            rows = rng.permutation(np.flatnonzero(label == value))
            cuts = (np.cumsum(rng.dirichlet([beta] * devices))[:-1] * len(rows)).astype(int)
            for part, piece in zip(parts, np.split(rows, cuts), strict=True):
                part.append(piece)
        joined = [np.sort(np.concatenate(part)) for part in parts]
        if min(len(rows) for rows in joined) >= min_rows:
            return joined
    raise ConfigError(f"{len(label)} rows over {devices} devices with beta {beta}: some device stays below {min_rows} rows")


def even_rows(count: int, devices: int, seed: int) -> list[NDArray[np.intp]]:
    """Rows of each device, drawn at random, sizes differing by at most one."""
    rows = np.random.default_rng([seed, 3]).permutation(count)
    return [np.sort(part) for part in np.array_split(rows, devices)]


def natural_rows(owner: NDArray[np.int64]) -> list[NDArray[np.intp]]:
    """Rows of each device where the data have owners, such as a subject or a style: one device for each, by their numbers."""
    return [np.flatnonzero(owner == each) for each in np.unique(owner)]
