"""Augmented rows: each example in a fixed number of random versions, so that their features can be stored.

A version depends on the seed, the view and the number of the example, and on nothing else: a device that starts again, or
computes features that it could not store, gets the same bits.
"""

from math import prod

import numpy as np

from edge_client.engines.base import Array
from edge_client.job import Augmentation
from edge_client.rows.row_files import Indices, RowSource


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
    if augmentation.crop < 1:
        row = _cropped(row, augmentation, random)
    for axis in augmentation.axes if augmentation.shift else ():
        steps = int(random.integers(-augmentation.shift, augmentation.shift + 1))
        row = _shifted(row, steps, axis)
    if augmentation.gain:
        factor, offset = augmentation.gain * random.uniform(-1, 1, 2)
        row = row * np.float32(1 + factor) + np.float32(offset / 2)
    if augmentation.noise:
        row = row + np.float32(augmentation.noise) * random.standard_normal(row.shape, np.float32)
    # Last, so that it draws nothing before the changes that plans without it have.
    return _erased(row, augmentation, random) if augmentation.erase else row


def _cropped(row: Array, augmentation: Augmentation, random: "np.random.Generator") -> Array:
    """A piece of at least the share `crop`, at a random place, stretched to the whole size by linear interpolation."""
    side = random.uniform(augmentation.crop, 1) ** (1 / len(augmentation.axes))
    for axis in augmentation.axes:
        size = row.shape[axis]
        first = random.uniform(0, size * (1 - side))
        places = np.clip(first + side * (np.arange(size) + 0.5) - 0.5, 0, size - 1)  # of the new values' centres
        below = np.minimum(places.astype(np.intp), size - 2)
        shape = [1] * row.ndim
        shape[axis] = size
        weight = (places - below).astype(np.float32).reshape(shape)
        row = row.take(below, axis) * (1 - weight) + row.take(below + 1, axis) * weight
    return row


def _erased(row: Array, augmentation: Augmentation, random: "np.random.Generator") -> Array:
    """Zeros in one block along the axes, which covers at most the share `erase` of them; its size and place are random.

    Of token ids, the block is one of the text itself, from its first to its last token that is not padding: so it never covers
    a whole text, however short, and never spends itself on the padding.
    """
    spans = [_text(row)] if row.dtype.kind == "i" else [(0, row.shape[axis]) for axis in augmentation.axes]
    left = int(augmentation.erase * prod(stop - start for start, stop in spans))
    if not left:
        return row
    block: list[slice] = [slice(None)] * row.ndim
    for axis, (start, stop) in zip(augmentation.axes, spans, strict=True):
        size = int(random.integers(1, min(stop - start, left) + 1))
        first = int(random.integers(start, stop - size + 1))
        block[axis] = slice(first, first + size)
        left //= size
    row = row.copy()
    row[tuple(block)] = 0
    return row


def _text(row: Array) -> tuple[int, int]:
    """Where a text starts, and where it ends; (0, 0) if it is padding alone."""
    (places,) = row.nonzero()
    return (int(places[0]), int(places[-1]) + 1) if places.size else (0, 0)


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
