"""Which examples become test examples: decided once all are known, the same for the same seed."""

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def choose_test(labels: Sequence[int], groups: Sequence[str | None], share: float, seed: int) -> NDArray[np.bool_]:
    """(examples,) whether each one is a test example: of every label, the count nearest to `share` of its examples.

    A label's last example is never taken from the training examples. Examples of one group stay together; a group goes to the
    test examples if that brings its labels nearer to their share. So with groups the share is met only about.
    """
    members: dict[object, list[int]] = defaultdict(list)
    for index, group in enumerate(groups):
        members[index if group is None else group].append(index)
    units = list(members.values())
    left = Counter(labels)
    wanted = {label: share * count for label, count in left.items()}
    is_test = np.zeros(len(labels), bool)
    for place in np.random.default_rng(seed).permutation(len(units)):
        unit = units[place]
        counts = Counter(labels[index] for index in unit)
        gain = sum(abs(wanted[label]) - abs(wanted[label] - count) for label, count in counts.items())
        if gain > 0 and all(left[label] > count for label, count in counts.items()):
            is_test[unit] = True
            left.subtract(counts)
            for label, count in counts.items():
                wanted[label] -= count
    return is_test
