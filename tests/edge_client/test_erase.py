"""`erase`: one block of zeros, never more than its share, nowhere else a change, and for a text never all of it."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_client.job import Augmentation
from edge_client.rows.augment import AugmentedRows

SHARES = st.floats(0.0, 0.99)


class Rows:
    """Rows in memory."""

    def __init__(self, values):
        self._values = np.array(values)

    def __len__(self):
        return len(self._values)

    def take(self, indices):
        return self._values[np.asarray(indices)]


def changed(values, axes, erase, view=0, seed=5, **more):
    settings = {"shift": 0, "noise": 0.0, "flip": False} | more
    return AugmentedRows(Rows(values), Augmentation(axes, seed=seed, erase=erase, **settings), view).take(range(len(values)))


def ones(*shape):
    return np.ones(shape, np.float32)


@given(erase=SHARES, channels=st.integers(1, 3), height=st.integers(1, 12), width=st.integers(1, 12), seed=st.integers(0, 99))
def test_a_rectangle_of_an_image_is_zero_in_all_channels(erase, channels, height, width, seed):
    for image in changed(ones(4, channels, height, width), (-2, -1), erase, seed=seed):
        gone = image == 0
        assert (gone == gone[0]).all()
        rows, columns = gone[0].any(axis=1), gone[0].any(axis=0)
        assert (gone[0] == np.outer(rows, columns)).all()
        for side in (rows, columns):  # without a gap
            places = np.flatnonzero(side)
            assert not places.size or places[-1] - places[0] + 1 == places.size
        assert gone[0].sum() <= erase * height * width
        assert gone.any() == (int(erase * height * width) > 0)


@pytest.mark.parametrize(("shape", "axis"), [((9, 4), 0), ((2, 9), -1)])
def test_a_span_of_time_is_zero_in_all_coefficients_and_channels(shape, axis):
    seen = set()
    for row in changed(ones(200, *shape), (axis,), 0.5):
        gone = (row == 0).all(axis=1 - axis % 2)
        assert (row == 0).sum() == gone.sum() * row.size / 9
        places = np.flatnonzero(gone)
        assert places[-1] - places[0] + 1 == places.size <= 4
        seen.add((int(places[0]), int(places.size)))
    assert seen == {(first, size) for size in range(1, 5) for first in range(10 - size)}


texts = st.lists(st.integers(0, 5), min_size=1, max_size=12)


@given(text=texts, erase=SHARES, view=st.integers(0, 9))
def test_a_span_of_a_text_becomes_padding_and_the_text_is_never_gone(text, erase, view):
    before = np.array([text], np.int64)
    (after,) = changed(before, (0,), erase, view)
    assert after.dtype == np.int64
    real = np.flatnonzero(before[0])
    kept = np.flatnonzero(after != before[0])
    assert (after[kept] == 0).all()
    assert after.any() == before.any()
    if real.size:
        length = int(real[-1] - real[0]) + 1
        assert not kept.size or kept[-1] - kept[0] + 1 <= erase * length
        assert kept.size or int(erase * length) == 0 or 0 in before[0][real[0] : real[-1]]


def test_a_short_text_loses_some_of_its_own_tokens_and_not_its_padding():
    before = np.tile(np.array([3, 1, 4, 1, 0, 0, 0, 0, 0, 0, 0, 0], np.int64), (50, 1))
    after = changed(before, (0,), 0.5)
    assert {int((row != 0).sum()) for row in after} == {2, 3}


def test_outside_of_the_block_an_example_is_as_it_is_without_erase():
    """Also to the bit: what is drawn for the other changes does not depend on it."""
    values = np.random.default_rng(0).normal(size=(30, 2, 8)).astype(np.float32)
    others = {"shift": 2, "noise": 0.1, "flip": True}
    plain, erased = (changed(values, (-1,), share, **others) for share in (0.0, 0.5))
    for one, other in zip(plain, erased, strict=True):
        gone = (other == 0).all(axis=0)
        assert gone.sum() >= 1
        np.testing.assert_array_equal(one[:, ~gone], other[:, ~gone])


def test_plans_without_erase_change_an_example_as_they_did():
    """The draws of a shift and of noise, written out a second time."""
    values = np.random.default_rng(0).normal(size=(3, 2, 8)).astype(np.float32)
    given = changed(values, (-1,), 0.0, view=2, seed=9, shift=2, noise=0.1)
    for index, row in enumerate(values):
        random = np.random.Generator(np.random.Philox(key=np.array([9, (2 << 40) + index], np.uint64)))
        steps = int(random.integers(-2, 3))
        moved = np.pad(row, ((0, 0), (2, 2)))[:, 2 - steps : 10 - steps]
        expected = moved + np.float32(0.1) * random.standard_normal(row.shape, np.float32)
        np.testing.assert_array_equal(given[index], expected)


def test_views_and_examples_lose_other_blocks_and_always_the_same():
    values = ones(10, 1, 8, 8)
    first, again, second = (changed(values, (-2, -1), 0.3, view) for view in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert any((one != other).any() for one, other in zip(first, second, strict=True))
    assert len({row.tobytes() for row in first}) > 1
