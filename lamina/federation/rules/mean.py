"""The weighted mean, FedAvg (McMahan et al. 2017, arXiv 1602.05629): w' = w + eta * sum_k n_k d_k / sum_k n_k."""

from typing import Literal

from lamina.federation.rules.base import Float64, MeanRule


class Mean(MeanRule):
    """n_k are the examples of update k, d_k its difference."""

    rule: Literal["mean"] = "mean"

    def direction(self, mean: Float64, slots: dict[str, Float64]) -> Float64:
        return mean
