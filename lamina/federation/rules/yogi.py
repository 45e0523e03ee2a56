"""FedYogi (Reddi et al. 2021, arXiv 2003.00295, algorithm 2): FedAdam with v' = v - (1 - beta2) d^2 sign(v - d^2)."""

from typing import Literal

import numpy as np

from lamina.federation.rules.adam import Adaptive, Decay
from lamina.federation.rules.base import Float64


class Yogi(Adaptive):
    """v moves by the same step up and down, so a single large round is forgotten slowly."""

    rule: Literal["yogi"] = "yogi"
    beta2: Decay = 0.99

    def second_moment(self, v: Float64, square: Float64) -> Float64:
        moved: Float64 = v - (1 - self.beta2) * square * np.sign(v - square)
        return moved
