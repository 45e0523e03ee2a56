"""The switch and the means, as formulas."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coordinator.split.aggregate import mean_over_users, share_middle
from coordinator.split.switch import is_steady
from lamina.split.plan import Switch

FULL = Switch(window=10, threshold=0.3)


@given(st.lists(st.floats(0, 10), max_size=10))
def test_the_switch_waits_for_the_full_window(losses: list[float]) -> None:
    assert not is_steady(losses, FULL)


@pytest.mark.parametrize(
    ("losses", "fires"),
    [
        ([2 - 0.1 * i for i in range(11)], True),  # equal steps: std 0
        ([2.0**-i for i in range(11)], False),  # steps that halve: std / mean is about 1.4
        ([1.0] * 11, True),  # no change at all: the quotient would be 0 / 0
        ([100.0, 0.0, *(1 - 0.01 * i for i in range(11))], True),  # what is older than the window does not count
        ([*(1 - 0.01 * i for i in range(10)), 5.0], False),
    ],
)
def test_the_switch_fires_when_the_changes_are_steady(losses: list[float], fires: bool) -> None:
    assert is_steady(losses, FULL) == fires


def test_users_are_averaged_without_weights() -> None:
    start = {"weight": np.array([1.0, 2.0], np.float32)}
    given_ = [{"weight": np.array([d, -d], np.float32)} for d in (1.0, 2.0, 6.0)]
    assert mean_over_users(start, given_)["weight"].tolist() == [4.0, -1.0]


@given(st.integers(2, 4), st.integers(0, 2**31))
def test_modalities_share_the_mean_of_the_middle_and_keep_their_outer_layers(count: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    shapes = {"down.weight": (3, 5), "middle.weight": (3, 3), "middle.bias": (3,), "up.weight": (5, 3)}
    adapters = {
        f"m{i}": {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()} for i in range(count)
    }
    shared = share_middle(adapters)
    for modality, tensors in shared.items():
        for name in ("down.weight", "up.weight"):
            assert np.array_equal(tensors[name], adapters[modality][name])
        for name in ("middle.weight", "middle.bias"):
            expected = np.mean([adapters[m][name] for m in adapters], axis=0)
            assert np.allclose(tensors[name], expected, atol=1e-6)
