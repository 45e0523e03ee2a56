"""Federated Depth Dropout: which frozen layers a device uses in a round (methods: FLL, section 3.1)."""

from collections.abc import Sequence

import numpy as np

from lamina.encoding.rng import Stream
from lamina.plans.plan import DepthDropout


def drawn_prefix(
    chain: Sequence[str], active_layers: int, dropout: DepthDropout, seed: int, stage: int, round_number: int, device: str
) -> list[str]:
    """The part of a modality's frozen chain (stem, first layer, ...) that a device uses in a round, in the same order.

    Stem and first layer always stay, and others are drawn uniformly without replacement, so that they are at most `budget`
    layers together with the active ones. The draw depends on the arguments alone. With a pool, a device has that many fixed
    draws in a stage, and the round chooses among them.
    """
    layers = list(chain[1:])
    room = dropout.budget - active_layers
    if len(layers) <= room:
        return list(chain)
    which: str | int = round_number
    if dropout.pool is not None:
        number = Stream(f"{seed}/{stage}/{round_number}/{device}/which").below(np.array([dropout.pool]))[0]
        which = f"pool {number}"
    drawn = Stream(f"{seed}/{stage}/{which}/{device}/depth").shuffled(len(layers) - 1)[: room - 1]
    return [chain[0], layers[0], *(layers[1 + place] for place in sorted(drawn))]
