"""Which versions of the augmented examples a job takes, counted over the epochs of its stage."""


def of_epoch(epoch: int, count: int, in_pairs: bool) -> tuple[int, ...]:
    """Version e of `count` in epoch e; where two views are compared, versions 2e and 2e + 1; each modulo `count`."""
    return (2 * epoch % count, (2 * epoch + 1) % count) if in_pairs else (epoch % count,)


def of_job(round_number: int, epochs: int, count: int, in_pairs: bool) -> set[int]:
    """Those of a round of so many epochs."""
    first = round_number * epochs
    return {version for epoch in range(first, first + epochs) for version in of_epoch(epoch, count, in_pairs)}
