"""The mean of losses that devices told. They are only known to be finite floats: a device may tell what it likes."""

from collections.abc import Iterable
from math import fsum, isfinite, nan

MAX_EXAMPLES = 2**24
"""No device has more examples in a message: 16.8 million, beyond what a small machine trains on in a round. Sums of so many are
exact integers and fit the database. What one device may count for in a plan is `cohort.max_examples`."""


def mean_by_examples(losses: Iterable[tuple[float, int]]) -> float:
    """The mean of (loss, number of examples), weighted by examples; the same in any order.

    NaN without examples, and if the losses are so large that their sum is no finite number.
    """
    pairs = list(losses)
    examples = sum(count for _, count in pairs)
    try:
        mean = fsum(loss * count for loss, count in pairs) / examples
    except (ArithmeticError, ValueError):
        return nan
    return mean if isfinite(mean) else nan
