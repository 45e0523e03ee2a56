"""Rewrites that make a model trainable on every engine, each proved on real inputs.

    plain_operations    while a module is traced or run: fused and special calls become equal plain ones
    prove_rewrites      what that changes in a module, with the largest difference it makes
    fold_batch_norm     batch norm with frozen statistics becomes a trainable scale and shift for each channel
    untie               segments that share a parameter get one each

Nothing here changes the user's module.
"""

from export.ops.rewrites.plain import plain_operations, prove_rewrites
from export.ops.rewrites.structure import ChannelAffine, fold_batch_norm, untie

__all__ = ["ChannelAffine", "fold_batch_norm", "plain_operations", "prove_rewrites", "untie"]
