"""The coordinate-wise trimmed mean (Yin et al. 2018, arXiv 1803.01498, definition 2).

Of the K values of a coordinate the floor(trim * K) smallest and as many of the largest are left out; w' = w + eta * mean of the
rest. Updates count alike, whatever number of examples they tell of.
"""

from typing import Annotated, Literal

from pydantic import Field

from lamina.federation.rules.base import Float64, OrderRule


class TrimmedMean(OrderRule):
    """Fewer than `trim` * K updates of any content cannot move a coordinate beyond what the others hold."""

    rule: Literal["trimmed_mean"] = "trimmed_mean"
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.1

    def middle(self, values: Float64) -> Float64:
        left_out = int(self.trim * len(values))
        mean: Float64 = values[left_out : len(values) - left_out].mean(axis=0)
        return mean
