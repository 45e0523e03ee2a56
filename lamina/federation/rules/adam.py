"""FedAdam (Reddi et al. 2021, arXiv 2003.00295, algorithm 2), without bias correction, as published:

    m' = beta1 m + (1 - beta1) d        v' = beta2 v + (1 - beta2) d^2        w' = w + eta m' / (sqrt(v') + tau)

d is the weighted mean of the differences. m begins at 0 and v at tau^2.
"""

from abc import abstractmethod
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from lamina.federation.rules.base import Float64, MeanRule

Decay = Annotated[float, Field(ge=0, lt=1)]


class Adaptive(MeanRule):
    """What the adaptive rules share."""

    beta1: Decay = 0.9
    tau: Annotated[float, Field(ge=1e-9, le=1)] = 1e-3
    slots = ("m", "v")

    def fresh(self, slot: str) -> float:
        return self.tau**2 if slot == "v" else 0.0

    def fault(self, rate: float) -> str | None:
        if rate < 1:
            return None
        return (
            f"{self.rule!r} moves every value by about server_learning_rate a round, however small the differences are, and "
            f"that is {rate:g}: give one below 1, such as server_learning_rate = 0.01"
        )

    def direction(self, mean: Float64, slots: dict[str, Float64]) -> Float64:
        slots["m"] = self.beta1 * slots["m"] + (1 - self.beta1) * mean
        slots["v"] = self.second_moment(slots["v"], mean**2)
        return slots["m"] / (np.sqrt(slots["v"]) + self.tau)

    @abstractmethod
    def second_moment(self, v: Float64, square: Float64) -> Float64:
        """v of the next round, from the square of the mean."""


class Adam(Adaptive):
    rule: Literal["adam"] = "adam"
    beta2: Decay = 0.99

    def second_moment(self, v: Float64, square: Float64) -> Float64:
        return self.beta2 * v + (1 - self.beta2) * square
