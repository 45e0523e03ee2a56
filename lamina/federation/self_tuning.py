"""When a stage has stopped improving (`lamina.plans.plan.SelfTuning`)."""

from collections.abc import Sequence
from math import isfinite

from lamina.plans.plan import SelfTuning


def has_stalled(losses: Sequence[float], settings: SelfTuning) -> bool:
    """Whether the last `patience` losses of a stage, all in a row, were no improvement.

    A loss is an improvement if it lies below the best one so far by at least the share `min_improvement` of that (above 0, so
    that an equal loss never is one). Only an improvement becomes the best one: many small steps down are one step in the
    end, and a stage that moves slowly is not ended for it. The first finite loss is an improvement; NaN and infinity never are.
    """
    best: float | None = None
    in_a_row = 0
    for loss in losses:
        if isfinite(loss) and (best is None or (loss < best and loss <= best - settings.min_improvement * abs(best))):
            best, in_a_row = loss, 0
        else:
            in_a_row += 1
    return in_a_row >= settings.patience
