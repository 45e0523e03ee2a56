"""The weighted mean of a round (FedAvg): w_new = float32(float64(w_start) + sum_k n_k * d_k / sum_k n_k).

Deterministic: the sum is taken in float64 in an order that only the updates' values and example counts decide, so the
same set of updates gives the same bytes whatever the order of arrival, the encoding or the number of restarts. One
tensor of one update is resident at a time, beside the float64 sum of the exchange vector.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lamina.segments import TensorSpec
from lamina.tensors import Float32, decode_one_by_one


@dataclass(frozen=True, order=True)
class Contribution:
    """An update as the mean sees it. The order of the fields is the order of summation."""

    content_sha256: str
    num_examples: int
    path: Path


def weighted_mean(
    start: Mapping[str, Float32], contributions: Iterable[Contribution], specs: list[TensorSpec]
) -> dict[str, Float32]:
    """The new exchange vector, by tensor name, from the start weights and at least one contribution.

    Raises TensorFileError if a file is not what was accepted.
    """
    ordered = sorted(contributions)
    total_examples = sum(contribution.num_examples for contribution in ordered)
    sums: dict[str, NDArray[np.float64]] = {spec.name: np.zeros(spec.shape, np.float64) for spec in specs}
    for contribution in ordered:
        for name, difference in decode_one_by_one(str(contribution.path), specs):
            sums[name] += difference.astype(np.float64) * contribution.num_examples
    return {name: (start[name].astype(np.float64) + total / total_examples).astype(np.float32) for name, total in sums.items()}
