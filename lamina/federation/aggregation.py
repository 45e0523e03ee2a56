"""From the updates of a round to its new weights, by the plan's rule.

Deterministic: differences are added in an order that only the updates' values and example counts decide, so the same set of
updates gives the same bytes whatever the order of arrival, the encoding or the number of restarts. Of rules that stream, one
tensor of one update is resident at a time, beside their sums; of others, one tensor of all updates.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lamina.encoding.tensors import Float32, decode_one_by_one
from lamina.federation.rules import Mean, Rule
from lamina.federation.rules.base import State
from lamina.plans.segments import TensorSpec


@dataclass(frozen=True, order=True)
class Contribution:
    """An update as the rule sees it. The order of the compared fields is the order of summation.

    `specs` are the tensors that it has; None: all of the round. Their names are part of the content, so they decide no order.
    Its difference counts times `scale`, which follows from the content and the other updates. `norm` is the L2 norm of the
    whole difference.
    """

    content_sha256: str
    num_examples: int
    path: Path
    specs: Sequence[TensorSpec] | None = field(default=None, compare=False)
    scale: float = field(default=1.0, compare=False)
    norm: float = field(default=0.0, compare=False)


def aggregate(
    start: Mapping[str, Float32],
    contributions: Iterable[Contribution],
    specs: Sequence[TensorSpec],
    rule: Rule | None = None,
    rate: float = 1.0,
    state: Mapping[str, Float32] | None = None,
) -> tuple[dict[str, Float32], State]:
    """The new exchange vector, by tensor name, and the rule's state; without a rule, the weighted mean.

    Raises TensorFileError if a file is not what was accepted.
    """
    rule = rule or Mean()
    accumulator = rule.begin(specs, state or {}, rate)
    ordered = sorted(contributions)
    walk = _by_update(ordered, specs) if rule.access == "stream" else _by_tensor(ordered, specs)
    for contribution, name, difference in walk:
        scale = contribution.scale * rule.factor(contribution.norm * contribution.scale)
        accumulator.add(name, difference, rule.weight(contribution.num_examples), scale)
    return accumulator.result(start)


Walk = Iterator[tuple[Contribution, str, Float32]]


def _by_update(contributions: Sequence[Contribution], specs: Sequence[TensorSpec]) -> Walk:
    for contribution in contributions:
        for name, difference in decode_one_by_one(str(contribution.path), contribution.specs or specs):
            yield contribution, name, difference


def _by_tensor(contributions: Sequence[Contribution], specs: Sequence[TensorSpec]) -> Walk:
    """All updates are read side by side: the tensors of each come in the order of the round's."""
    readers = [
        (contribution, decode_one_by_one(str(contribution.path), own), {spec.name for spec in own})
        for contribution in contributions
        for own in [contribution.specs or specs]
    ]
    for spec in specs:
        for contribution, reader, names in readers:
            if spec.name in names:
                name, difference = next(reader)
                yield contribution, name, difference
