"""The means of a round. They are plain, without weights by examples, and summed in float64 in the order of the users' names."""

from collections.abc import Mapping, Sequence

import numpy as np

from lamina.encoding.tensors import Float32
from lamina.split.plan import MIDDLE

Tensors = Mapping[str, Float32]
"""Tensor name -> value, of one part."""


def mean(values: Sequence[Float32]) -> Float32:
    total = np.zeros(values[0].shape, np.float64)
    for value in values:
        total += value
    return (total / len(values)).astype(np.float32)


def mean_over_users(start: Tensors, differences: Sequence[Tensors]) -> dict[str, Float32]:
    """Intra-modality: start + mean of the users' differences, for each tensor of a part."""
    return {
        name: (value.astype(np.float64) + mean([given[name] for given in differences])).astype(np.float32)
        for name, value in start.items()
    }


def share_middle(adapters: Mapping[str, Tensors]) -> dict[str, dict[str, Float32]]:
    """Inter-modality: task adapters by modality, their middle layers replaced by the mean over modalities; the outer layers
    stay those of the modality."""
    first = next(iter(adapters.values()))
    shared = {name: mean([given[name] for given in adapters.values()]) for name in first if name.startswith(MIDDLE)}
    return {
        modality: {**given, **{name: value.copy() for name, value in shared.items()}} for modality, given in adapters.items()
    }
