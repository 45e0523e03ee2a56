"""FedAdagrad (Reddi et al. 2021, arXiv 2003.00295, algorithm 2): FedAdam with v' = v + d^2, which never forgets."""

from typing import Literal

from lamina.federation.rules.adam import Adaptive, Decay
from lamina.federation.rules.base import Float64


class Adagrad(Adaptive):
    """Without momentum: m is the mean of the round."""

    rule: Literal["adagrad"] = "adagrad"
    beta1: Decay = 0.0

    def second_moment(self, v: Float64, square: Float64) -> Float64:
        return v + square
