"""int8 matrices with one scale for each row: value = scale * int8, symmetric, 127 steps to each side.

The one quantiser of lamina: for the weights of a frozen prefix, stored features (a row is a token) and transfers. Needs
numpy alone.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

STEPS = 127


def quantize_rows(
    values: NDArray[np.float32], random: "np.random.Generator | None" = None
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """(int8 of the same shape, float32 scales of shape `values.shape[:-1]`); the scale of a row is its largest |value| / 127.

    Each value is off by at most half a step. With `random`, values are rounded up or down so that the expectation is the
    value itself; each is then off by less than one step.
    """
    scales = (np.abs(values).max(axis=-1, initial=0.0) / np.float32(STEPS)).astype(np.float32)
    steps = values / np.where(scales > 0, scales, np.float32(1))[..., None]
    if random is None:
        np.rint(steps, out=steps)
    else:
        steps += random.random(steps.shape, np.float32)
        np.floor(steps, out=steps)
    np.clip(steps, -STEPS, STEPS, out=steps)
    return steps.astype(np.int8), scales


def dequantize_rows(steps: NDArray[np.int8], scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """The float32 values of `quantize_rows`."""
    values = steps.astype(np.float32)
    values *= scales[..., None]
    return values


def frozen_weights(weights: list[NDArray[np.float32]], precision: str) -> list[NDArray[Any]]:
    """A frozen segment's tensors as its program takes them (`lamina.bundles.manifest.Program`)."""
    if precision == "fp32":
        return list(weights)
    taken: list[NDArray[Any]] = []
    for weight in weights:
        taken += quantize_rows(weight) if weight.ndim == 2 else [weight]
    return taken
