"""M2FedSA's model (Zhang et al. 2024, ICML, zhang24az), wholly on the device: small adapters inside a frozen transformer.

    stem                 the frozen part below the modality adapter: patches, attention and MLP of the first block
    layers.0             the modality adapter (MA) behind that MLP, with a skip: base + MA(branch)
    layers.1 and on      frozen blocks; beside the MLP of the last one is the task adapter (TA)

Both adapters give zero at the start, so training starts from the frozen model. What is frozen has `requires_grad=False`: it is
distributed once, and no update holds it. The stem is in the frozen prefix, so a device computes it once for each example.
Without: the transfer loss after the switch, and the mean of the adapters' middle layers over the modalities.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.demo.plan import MODEL
from export.models.models import Layer, make_stem
from lamina.plans.model import Encoder as Description

ADAPTER_WIDTH = 64


class Adapter(nn.Module):
    """Linear, GELU, Linear, GELU, Linear; zero at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.down = nn.Linear(width, ADAPTER_WIDTH)
        self.middle = nn.Linear(ADAPTER_WIDTH, ADAPTER_WIDTH)
        self.up = nn.Linear(ADAPTER_WIDTH, width)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(F.gelu(self.middle(F.gelu(self.down(x)))))


class Below(nn.Module):
    """Raw input -> (batch, tokens, 2 * width): what the MA's output is added to, and what the MA takes."""

    def __init__(self, stem: nn.Module, block: Layer) -> None:
        super().__init__()
        self.stem, self.block = stem, block

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.block.attention(self.block.attention_norm(x))
        branch = self.block.mlp_out(F.gelu(self.block.mlp_in(self.block.mlp_norm(x))))
        return torch.cat([x + branch, branch], dim=-1)


class ModalityAdapter(nn.Module):
    """(batch, tokens, 2 * width) -> (batch, tokens, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width, self.adapter = width, Adapter(width)

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : self.width] + self.adapter(x[..., self.width :])


class LastBlock(nn.Module):
    """A frozen block with the task adapter beside its MLP."""

    def __init__(self, block: Layer, width: int) -> None:
        super().__init__()
        self.block, self.adapter = block, Adapter(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.block.attention(self.block.attention_norm(x))
        normed = self.block.mlp_norm(x)
        return x + self.block.mlp_out(F.gelu(self.block.mlp_in(normed))) + self.adapter(normed)


class Encoder(nn.Module):
    """An encoder of the built-in family's blocks, as `export.models.adapters.own` takes it."""

    def __init__(self, spec: Description) -> None:
        super().__init__()
        width = spec.width
        blocks = [Layer(width, spec.heads, spec.mlp_ratio) for _ in range(spec.layers)]
        self.input = spec.input
        self.stem = Below(make_stem(spec), blocks[0])
        self.layers = nn.ModuleList([ModalityAdapter(width), *blocks[1:-1], LastBlock(blocks[-1], width)])
        self.norm = nn.LayerNorm(width)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(".adapter." in name)


def make() -> dict[str, nn.Module]:
    """The encoders of AV-Digits with a random backbone: 4 image and 20 audio tokens, width 64, 6 blocks each."""
    return {encoder.modality: Encoder(encoder) for encoder in MODEL.encoders}
