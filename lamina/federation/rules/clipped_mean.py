"""The mean of updates clipped to a norm (McMahan et al. 2018, arXiv 1710.06963, flat clipping; as a defence Sun et al. 2019,
arXiv 1911.07963): w' = w + eta * sum_k n_k d_k min(1, clip / |d_k|) / sum_k n_k.
"""

from typing import Annotated, Literal

from pydantic import Field

from lamina.bounds import MAX_FACTOR
from lamina.federation.rules.base import Float64, MeanRule


class ClippedMean(MeanRule):
    """|d_k| is the L2 norm of the whole update, over all tensors that it has."""

    rule: Literal["clipped_mean"] = "clipped_mean"
    clip: Annotated[float, Field(gt=0, le=MAX_FACTOR)] = 1.0

    def factor(self, norm: float) -> float:
        return min(1.0, self.clip / norm) if norm else 1.0

    def direction(self, mean: Float64, slots: dict[str, Float64]) -> Float64:
        return mean
