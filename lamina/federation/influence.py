"""The bounds that a plan sets to what one device is in the mean of a round: `cohort.max_examples` and `cohort.max_norm`.

    max_examples    an update that tells of more examples counts with so many
    max_norm        an update that is longer than so many times the median of the round is scaled down to that length

The length of an update is the L2 norm of its difference, in float64, divided by the root of how many values it has, so that
devices with some of the modalities compare with those that have all. Of an even number of updates the median is the smaller of
the two in the middle: of two updates it is the shorter one, so that neither can make room for itself. One update alone has
nothing to compare with and counts as it is. The set of updates decides all of this, not the order in which they came.

A plan without `max_norm` has `MOST_MEDIANS`, where the median is above 0: no honest device comes near, and one with ill intent
cannot move the model so far that the others' losses are not finite.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, sqrt
from statistics import median_low

from lamina.plans.plan import Cohort
from lamina.plans.segments import TensorSpec

MOST_MEDIANS = 100.0
"""As long as a hundred others: an honest device would have to take a hundred times the steps of the median device."""


@dataclass(frozen=True)
class Size:
    """What bounds look at. `norm` is the L2 norm over the tensors `specs`; None: an older coordinator accepted it."""

    num_examples: int
    norm: float | None
    specs: Sequence[TensorSpec]

    @property
    def length(self) -> float:
        """The root of the mean square of its values."""
        return (self.norm or 0.0) / sqrt(max(1, sum(spec.count for spec in self.specs)))


@dataclass(frozen=True)
class Counted:
    """What of an update counts: so many examples, and its difference times `scale`. `ratio` is its length as a multiple of the
    round's median; infinite where that is 0 and it is not."""

    num_examples: int
    scale: float = 1.0
    ratio: float = 1.0


def count_within_bounds(cohort: Cohort, sizes: Sequence[Size]) -> list[Counted]:
    """For each update of a round, what of it counts; all of it where the plan has no bounds."""
    median = median_low(size.length for size in sizes) if sizes else 0.0
    longest = _longest(cohort, median)
    counted = []
    for size in sizes:
        examples = size.num_examples if cohort.max_examples is None else min(size.num_examples, cohort.max_examples)
        scale = 1.0
        if size.length > longest:
            scale = longest / size.length
        ratio = size.length / median if median else inf if size.length else 1.0
        counted.append(Counted(examples, scale, ratio))
    return counted


def _longest(cohort: Cohort, median: float) -> float:
    """How long an update may be to count as it is."""
    if cohort.max_norm is not None:
        return cohort.max_norm * median
    return MOST_MEDIANS * median if median else inf
