"""A layer that joins the model gradually: how weights from elsewhere are attached without a shock.

A pretrained layer computes something else than the one below it, and heads that were trained on the layers below have never
seen its features: where these layers hardly trained, MiniLM's last one costs 9 points when it is attached (docs/findings.md).
"""

import torch
from torch import Tensor, nn

from lamina.errors import CutError


class Gated(nn.Module):
    """x + gate * (layer(x) - x), with a learned gate (1,) that starts at 0: the identity first, the layer at 1.

    ReZero (arXiv 2003.04887) for layers that have a residual connection, or a norm, of their own.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.gate = nn.Parameter(torch.zeros(1))
        self.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """Raises CutError for a layer that changes the shape: there is nothing to begin with."""
        y = self.layer(x)
        if y.shape[1:] != x.shape[1:]:
            raise CutError(
                f"gated: a {type(self.layer).__name__} makes features {tuple(y.shape[1:])} of {tuple(x.shape[1:])}, and a "
                "layer that begins as the identity has to keep their shape; leave the option out"
            )
        return x + self.gate * (y - x)
