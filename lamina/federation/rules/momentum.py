"""Server momentum, FedAvgM (Hsu et al. 2019, arXiv 1909.06335): m' = beta m + d; w' = w + eta m'; d is the weighted mean."""

from typing import Annotated, Literal

from pydantic import Field

from lamina.federation.rules.base import Float64, MeanRule


class Momentum(MeanRule):
    """m begins at 0."""

    rule: Literal["momentum"] = "momentum"
    beta: Annotated[float, Field(ge=0, le=0.999)] = 0.9
    slots = ("m",)

    @property
    def gain(self) -> float:
        return 1 / (1 - self.beta)

    def direction(self, mean: Float64, slots: dict[str, Float64]) -> Float64:
        slots["m"] = self.beta * slots["m"] + mean
        return slots["m"]
