"""`edge_client.rows.augment`: what a crop and a gain do to a row; shift, noise and erase are tested with the stored
features."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.job import Augmentation
from edge_client.rows.augment import AugmentedRows


class Rows:
    """Rows in memory."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def take(self, indices) -> np.ndarray:
        return self._values[np.asarray(indices)]


def changed(values: np.ndarray, axes: tuple[int, ...], **settings) -> np.ndarray:
    plain = {"shift": 0, "noise": 0.0, "flip": False, "seed": 5}
    rows = AugmentedRows(Rows(values.astype(np.float32)), Augmentation(axes, **(plain | settings)), 0)
    return rows.take(range(len(values)))


@given(crop=st.floats(0.05, 0.99), size=st.integers(1, 40))
def test_a_crop_of_a_ramp_is_a_ramp_over_at_least_its_share(crop: float, size: int) -> None:
    ramp = np.tile(np.arange(size, dtype=np.float32), (8, 3, 1))
    for row in changed(ramp, (-1,), crop=crop):
        assert row.shape == (3, size) and row.dtype == np.float32
        steps = np.diff(row, axis=-1)
        assert row.min() >= 0 and row.max() <= size - 1
        # The step is the share that was kept. Beyond the border lies nothing but its own value, so steps there are shorter.
        inside = steps[(row[:, :-1] > 0) & (row[:, 1:] < size - 1)]
        assert inside.size or crop * size <= 2
        if inside.size:
            assert crop - 1e-3 <= inside.max() <= 1 + 1e-3
            np.testing.assert_allclose(inside, inside.max(), atol=1e-3)


def test_crops_of_an_image_keep_its_ratio_and_differ_between_examples() -> None:
    y, x = np.mgrid[0:28, 0:28].astype(np.float32)
    cropped = changed(np.tile(np.stack([y, x]), (20, 1, 1, 1)), (-2, -1), crop=0.3)
    steps = [(float(np.diff(y, axis=0).max()), float(np.diff(x, axis=1).max())) for y, x in cropped]
    assert all(down == pytest.approx(across, abs=1e-3) for down, across in steps)
    sides = [down for down, _ in steps]
    assert min(sides) >= 0.3**0.5 - 1e-3 and max(sides) <= 1 and max(sides) - min(sides) > 0.2


@given(gain=st.floats(0.05, 0.9))
def test_a_gain_is_one_factor_and_one_offset_for_the_whole_example(gain: float) -> None:
    values = np.random.default_rng(0).normal(size=(12, 2, 9)).astype(np.float32)
    for before, after in zip(values, changed(values, (-1,), gain=gain), strict=True):
        factor, offset = np.polyfit(before.ravel(), after.ravel(), 1)
        np.testing.assert_allclose(factor * before + offset, after, atol=1e-4)
        assert 1 - gain - 1e-3 <= factor <= 1 + gain + 1e-3 and abs(offset) <= gain / 2 + 1e-3


def test_neither_of_them_changes_nothing() -> None:
    values = np.random.default_rng(0).normal(size=(4, 1, 6, 6)).astype(np.float32)
    np.testing.assert_array_equal(changed(values, (-2, -1)), values)
