"""The two-phase switch: when the fused loss has become steady, the fusion net is frozen and transfer begins."""

from collections.abc import Sequence

import numpy as np

from lamina.split.plan import Switch


def is_steady(fused_losses: Sequence[float], settings: Switch) -> bool:
    """Whether std(d) / mean(d) < threshold over the last `window` values d of |v_i - v_(i-1)|.

    False before the window is full. A loss that does not change at all is steady; the quotient would be 0 / 0.
    """
    if len(fused_losses) < settings.window + 1:
        return False
    changes = np.abs(np.diff(np.asarray(fused_losses[-(settings.window + 1) :], np.float64)))
    mean = float(changes.mean())
    return mean == 0.0 or float(changes.std()) / mean < settings.threshold
