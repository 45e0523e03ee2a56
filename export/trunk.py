"""A user's encoder as lamina trains it: `stem -> layers -> norm -> pool`, each one tensor to one tensor.

    stem      raw input -> features
    layers    features -> features; their shape may change from layer to layer
    norm      the last layer's features -> the same shape; `nn.Identity()` if there is none
    pool      those -> (batch, width); it has no parameters

`export.models.adapters` makes trunks of the common libraries' models. Any other module becomes one by having these attributes:

    class Mine(nn.Module):
        input = lamina.plans.model.Image(channels=3, height=32, width=32)     # or Values(shape=...), TextTokens(...)
        stem: nn.Module
        layers: nn.ModuleList
        norm: nn.Module      # optional
        pool: nn.Module      # optional: the mean over tokens of (batch, tokens, width)
"""

from dataclasses import dataclass

from torch import Tensor, nn

from export.faults.faults import Fault
from lamina.bundles.manifest import Rewrite
from lamina.plans.model import Input


@dataclass(frozen=True)
class Trunk:
    """The parts of one encoder. `projection`, where the library has one, goes from (batch, width) to the embedding.

    `notes` say what was changed or left out, one sentence each; `rewrites` what was replaced, with its proof. The export shows
    both. For the first of `faults` it refuses the model.
    """

    stem: nn.Module
    layers: tuple[nn.Module, ...]
    norm: nn.Module
    pool: nn.Module
    input: Input
    projection: nn.Module | None = None
    notes: tuple[str, ...] = ()
    rewrites: tuple[Rewrite, ...] = ()
    faults: tuple[Fault, ...] = ()


class MeanTokens(nn.Module):
    """(batch, tokens, width) -> (batch, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=1)


class FirstToken(nn.Module):
    """(batch, tokens, width) -> (batch, width): the class token."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0]
