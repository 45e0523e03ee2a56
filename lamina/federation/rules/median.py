"""The coordinate-wise median (Yin et al. 2018, arXiv 1803.01498, definition 1): w' = w + eta * median_k d_k.

Of an even number of updates it is the mean of the two in the middle. Updates count alike, whatever number of examples they tell
of.
"""

from typing import Literal

from lamina.federation.rules.base import Float64, OrderRule


class Median(OrderRule):
    rule: Literal["median"] = "median"

    def middle(self, values: Float64) -> Float64:
        last, half = len(values) - 1, len(values) // 2
        middle: Float64 = (values[last - half] + values[half]) / 2
        return middle
