"""Optimisers on the flat parameter vector: one update rule for all engines, exactly as torch.optim defines it.

A step changes the parameters in place and leaves the gradient alone. It works through the vector in pieces, so that its
temporary values take some hundred KiB and stay in the processor's cache, however large the model is.

Parameter groups are neighbouring parts of the vector, each with a factor of the learning rate, as `lr` of a group in torch.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
from typing import Any, Protocol

import numpy as np

from lamina.encoding.tensors import Float32

_PIECE = 1 << 15


Groups = Sequence[tuple[int, float]]
"""(how many parameters, factor of the learning rate), in the order of the vector; empty: all of them, factor 1."""


class Optimizer(Protocol):
    """`steps` were taken so far. It and what `moments` gives are the whole state: set both to go on from another optimiser."""

    steps: int

    def step(self, parameters: Float32, gradient: Float32) -> None: ...

    def moments(self) -> dict[str, Float32]:
        """The state vectors themselves, no copies."""
        ...


def make_optimizer(settings: Mapping[str, Any], count: int, learning_rate: float, groups: Groups = ()) -> Optimizer:
    """A fresh optimiser for `count` parameters; the settings are those of `lamina.plans.plan.SGD` or
    `lamina.plans.plan.AdamW`."""
    if groups and sum(size for size, _ in groups) != count:
        raise ValueError(f"groups of {[size for size, _ in groups]} do not make up {count} parameters")
    values = {name: value for name, value in settings.items() if name != "kind"}
    rates = [(size, learning_rate * factor) for size, factor in groups or ((count, 1.0),)]
    if settings["kind"] == "adamw":
        return AdamWOptimizer(rates, **values)
    return SGDOptimizer(rates, **values)


class SGDOptimizer:
    """torch.optim.SGD without dampening: d = g + decay p;  b = momentum b + d;  p -= rate b."""

    def __init__(self, rates: Sequence[tuple[int, float]], momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        """`rates`: (how many parameters, learning rate), in the order of the vector."""
        self._rates, self._momentum, self._decay = rates, momentum, weight_decay
        # A buffer of zeros gives b = d in the first step, as torch has it.
        self._buffer = np.zeros(sum(size for size, _ in rates) if momentum else 0, np.float32)
        self.steps = 0

    def moments(self) -> dict[str, Float32]:
        return {"buffer": self._buffer} if self._momentum else {}

    def step(self, parameters: Float32, gradient: Float32) -> None:
        self.steps += 1
        for piece, rate in _pieces(self._rates):
            p = parameters[piece]
            d = p * np.float32(self._decay)
            d += gradient[piece]
            if self._momentum:
                b = self._buffer[piece]
                b *= np.float32(self._momentum)
                b += d
                np.copyto(d, b)
            d *= np.float32(rate)
            p -= d


class AdamWOptimizer:
    """torch.optim.AdamW: decay first, then the step with bias-corrected moments; eps is added outside of the root."""

    def __init__(
        self,
        rates: Sequence[tuple[int, float]],
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        """`rates`: (how many parameters, learning rate), in the order of the vector."""
        self._rates, self._beta1, self._beta2, self._eps, self._decay = rates, beta1, beta2, eps, weight_decay
        count = sum(size for size, _ in rates)
        self._mean = np.zeros(count, np.float32)
        self._square = np.zeros(count, np.float32)
        self.steps = 0

    def moments(self) -> dict[str, Float32]:
        return {"mean": self._mean, "square": self._square}

    def step(self, parameters: Float32, gradient: Float32) -> None:
        self.steps += 1
        correction = 1 - self._beta1**self.steps
        root = np.float32(sqrt(1 - self._beta2**self.steps))
        for piece, rate in _pieces(self._rates):
            p, g, mean, square = parameters[piece], gradient[piece], self._mean[piece], self._square[piece]
            p *= np.float32(1 - rate * self._decay)
            t = g - mean
            t *= np.float32(1 - self._beta1)
            mean += t
            np.multiply(g, g, out=t)
            t *= np.float32(1 - self._beta2)
            square *= np.float32(self._beta2)
            square += t
            np.sqrt(square, out=t)
            t /= root
            t += np.float32(self._eps)
            np.divide(mean, t, out=t)
            t *= np.float32(rate / correction)
            p -= t


def _pieces(rates: Sequence[tuple[int, float]]) -> Iterator[tuple[slice, float]]:
    """Pieces of the vector, each with its learning rate."""
    first = 0
    for size, rate in rates:
        for start in range(first, first + size, _PIECE):
            yield slice(start, min(start + _PIECE, first + size)), rate
        first += size
