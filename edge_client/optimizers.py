"""Optimisers on the flat parameter vector: one update rule for all engines, exactly as torch.optim defines it.

A step changes the parameters in place and leaves the gradient alone. It works through the vector in pieces, so that its
temporary values take some hundred KiB and stay in the processor's cache, however large the model is.
"""

from collections.abc import Iterator, Mapping
from math import sqrt
from typing import Any, Protocol

import numpy as np

from lamina.tensors import Float32

_PIECE = 1 << 15


class Optimizer(Protocol):
    def step(self, parameters: Float32, gradient: Float32) -> None: ...


def make_optimizer(settings: Mapping[str, Any], count: int, learning_rate: float) -> Optimizer:
    """A fresh optimiser for `count` parameters; the settings are those of `lamina.plan.SGD` or `lamina.plan.AdamW`."""
    values = {name: value for name, value in settings.items() if name != "kind"}
    if settings["kind"] == "adamw":
        return AdamWOptimizer(count, learning_rate, **values)
    return SGDOptimizer(count, learning_rate, **values)


class SGDOptimizer:
    """torch.optim.SGD without dampening: d = g + decay p;  b = momentum b + d;  p -= rate b."""

    def __init__(self, count: int, learning_rate: float, momentum: float = 0.0, weight_decay: float = 0.0) -> None:
        self._rate, self._momentum, self._decay = learning_rate, momentum, weight_decay
        # A buffer of zeros gives b = d in the first step, as torch has it.
        self._buffer = np.zeros(count if momentum else 0, np.float32)

    def step(self, parameters: Float32, gradient: Float32) -> None:
        for piece in _pieces(parameters.size):
            p = parameters[piece]
            d = p * np.float32(self._decay)
            d += gradient[piece]
            if self._momentum:
                b = self._buffer[piece]
                b *= np.float32(self._momentum)
                b += d
                np.copyto(d, b)
            d *= np.float32(self._rate)
            p -= d


class AdamWOptimizer:
    """torch.optim.AdamW: decay first, then the step with bias-corrected moments; eps is added outside of the root."""

    def __init__(
        self,
        count: int,
        learning_rate: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        eps: float = 1e-8,
        weight_decay: float = 0.01,
    ) -> None:
        self._rate, self._beta1, self._beta2, self._eps, self._decay = learning_rate, beta1, beta2, eps, weight_decay
        self._mean = np.zeros(count, np.float32)
        self._square = np.zeros(count, np.float32)
        self._steps = 0

    def step(self, parameters: Float32, gradient: Float32) -> None:
        self._steps += 1
        rate = np.float32(self._rate / (1 - self._beta1**self._steps))
        root = np.float32(sqrt(1 - self._beta2**self._steps))
        for piece in _pieces(parameters.size):
            p, g, mean, square = parameters[piece], gradient[piece], self._mean[piece], self._square[piece]
            p *= np.float32(1 - self._rate * self._decay)
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
            t *= rate
            p -= t


def _pieces(count: int) -> Iterator[slice]:
    return (slice(start, start + _PIECE) for start in range(0, count, _PIECE))
