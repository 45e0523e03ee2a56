"""The weighted mean of a round (FedAvg): w_new = float32(float64(w_start) + rate * sum_k n_k * d_k / sum_k n_k).

The sums of a tensor run over the updates that have it: a device with some of the modalities sends only their tensors. One
that no update has stays as it is, bit for bit. `rate` is the plan's `server_learning_rate`; 1 is plain FedAvg. The bounds of
the plan decide what n_k is, and whether d_k is scaled down first (`coordinator.rounds.influence`).

Deterministic: the sum is taken in float64 in an order that only the updates' values and example counts decide, so the
same set of updates gives the same bytes whatever the order of arrival, the encoding or the number of restarts. One
tensor of one update is resident at a time, beside the float64 sum of the exchange vector.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lamina.encoding.tensors import Float32, decode_one_by_one
from lamina.plans.segments import TensorSpec


@dataclass(frozen=True, order=True)
class Contribution:
    """An update as the mean sees it. The order of the compared fields is the order of summation.

    `specs` are the tensors that it has; None: all of the round. Their names are part of the content, so they decide no order.
    Its difference counts times `scale`, which follows from the content and the other updates.
    """

    content_sha256: str
    num_examples: int
    path: Path
    specs: Sequence[TensorSpec] | None = field(default=None, compare=False)
    scale: float = field(default=1.0, compare=False)


def weighted_mean(
    start: Mapping[str, Float32], contributions: Iterable[Contribution], specs: Sequence[TensorSpec], rate: float = 1.0
) -> dict[str, Float32]:
    """The new exchange vector, by tensor name, from the start weights and the updates.

    Raises TensorFileError if a file is not what was accepted.
    """
    sums: dict[str, NDArray[np.float64]] = {spec.name: np.zeros(spec.shape, np.float64) for spec in specs}
    examples = dict.fromkeys(sums, 0)
    for contribution in sorted(contributions):
        for name, difference in decode_one_by_one(str(contribution.path), contribution.specs or specs):
            sums[name] += difference.astype(np.float64) * (contribution.scale * contribution.num_examples)
            examples[name] += contribution.num_examples
    return {
        name: (start[name].astype(np.float64) + rate * (total / examples[name])).astype(np.float32)
        if examples[name]
        else start[name]
        for name, total in sums.items()
    }
