"""Federated Depth Dropout: what a device uses of the frozen prefix."""

from hypothesis import given
from hypothesis import strategies as st

from lamina.plans.depth import drawn_prefix
from lamina.plans.plan import DepthDropout

CHAIN = ["m.stem", *(f"m.layers.{index}" for index in range(11))]


@given(st.integers(1, 11), st.integers(1, 3), st.integers(2, 8), st.integers(0, 50), st.text(min_size=1, max_size=5))
def test_stem_and_first_layer_stay_in_order_within_the_budget(
    frozen: int, active: int, budget: int, number: int, device: str
) -> None:
    budget = max(budget, active + 1)
    chain = CHAIN[: frozen + 1]
    drawn = drawn_prefix(chain, active, DepthDropout(budget=budget), 0, 3, number, device)
    assert drawn[:2] == chain[:2]
    assert drawn == [name for name in chain if name in drawn]
    assert len(drawn) - 1 == min(frozen, budget - active)


def test_the_example_of_the_paper_keeps_one_and_draws_one() -> None:
    """5 layers, budget 3: phase 4 uses layer 1, one of {2, 3}, and layer 4."""
    seen = {tuple(drawn_prefix(CHAIN[:4], 1, DepthDropout(budget=3), 0, 3, number, "d")) for number in range(40)}
    assert seen == {(*CHAIN[:2], other) for other in CHAIN[2:4]}


def test_devices_and_rounds_draw_differently_and_repeatably() -> None:
    def draw(number: int, device: str) -> list[str]:
        return drawn_prefix(CHAIN, 1, DepthDropout(budget=6), 0, 11, number, device)

    assert draw(0, "a") == draw(0, "a")
    assert len({tuple(draw(number, device)) for number in range(10) for device in "ab"}) > 10


def test_a_pool_limits_a_device_to_so_many_prefixes() -> None:
    dropout = DepthDropout(budget=6, pool=2)
    assert len({tuple(drawn_prefix(CHAIN, 1, dropout, 0, 11, number, "a")) for number in range(60)}) == 2
