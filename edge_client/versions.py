"""Which versions of the augmented examples a job takes, counted over the epochs of its stage."""

from collections.abc import Iterable


def of_epoch(epoch: int, count: int, in_pairs: bool) -> tuple[int, ...]:
    """Version e of `count` in epoch e; where two views are compared, versions 2e and 2e + 1; each modulo `count`."""
    return (2 * epoch % count, (2 * epoch + 1) % count) if in_pairs else (epoch % count,)


def of_epochs(epochs: Iterable[int], count: int, in_pairs: bool) -> set[int]:
    return {version for epoch in epochs for version in of_epoch(epoch, count, in_pairs)}


def epochs_of(round_number: int, local_epochs: int) -> range:
    """The epochs of a round, counted over all rounds of its stage."""
    return range(round_number * local_epochs, (round_number + 1) * local_epochs)


EVALUATED = range(1)
"""An evaluation takes what the first epoch takes."""
