"""Augmented rows: each example in a fixed number of random versions, so that their features can be stored.

A version depends on the seed, the view and the number of the example, and on nothing else: a device that starts again, or
computes features that it could not store, gets the same bits.
"""

import numpy as np

from edge_client.engines.base import Array
from edge_client.job import Augmentation
from edge_client.rows import Indices, RowSource


class AugmentedRows:
    """The rows of another source, each in its version number `view`."""

    def __init__(self, rows: RowSource, augmentation: Augmentation, view: int) -> None:
        self._rows, self._augmentation, self._view = rows, augmentation, view

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, indices: Indices) -> Array:
        rows = self._rows.take(indices)
        for place, index in enumerate(indices):
            key = np.array([self._augmentation.seed, (self._view << 40) + int(index)], np.uint64)
            rows[place] = _changed(rows[place], self._augmentation, np.random.Generator(np.random.Philox(key=key)))
        return rows


def _changed(row: Array, augmentation: Augmentation, random: "np.random.Generator") -> Array:
    if augmentation.flip and random.random() < 0.5:
        row = row[..., ::-1]
    for axis in augmentation.axes if augmentation.shift else ():
        steps = int(random.integers(-augmentation.shift, augmentation.shift + 1))
        row = _shifted(row, steps, axis)
    if augmentation.noise:
        row = row + np.float32(augmentation.noise) * random.standard_normal(row.shape, np.float32)
    return row


def _shifted(row: Array, steps: int, axis: int) -> Array:
    """Moved by `steps` along an axis, zeros where nothing moved in."""
    size = row.shape[axis]
    steps = max(-size, min(size, steps))
    moved = np.zeros_like(row)
    to, origin = [slice(None)] * row.ndim, [slice(None)] * row.ndim
    to[axis] = slice(max(steps, 0), size + min(steps, 0))
    origin[axis] = slice(max(-steps, 0), size + min(-steps, 0))
    moved[tuple(to)] = row[tuple(origin)]
    return moved
