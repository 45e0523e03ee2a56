"""Models as a user might bring them: factories for the tests, good ones and bad ones."""

import torch
from torch import Tensor, nn

from lamina.plans.model import Image, TextTokens, Values


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner, self.out, self.drop = nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.out(torch.relu(self.inner(x))))


class Peak(nn.Module):
    """(batch, tokens, width) -> (batch, width): a pool of the user's own."""

    def forward(self, x: Tensor) -> Tensor:
        return x.amax(dim=1)


class Signal(nn.Module):
    """Without `norm`: the protocol does not ask for one."""

    def __init__(self, layers: int = 2, width: int = 8) -> None:
        super().__init__()
        self.input = Values(shape=(5, 3))
        self.stem = nn.Linear(3, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.pool = Peak()


class Words(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.input = TextTokens(vocabulary=13, length=4)
        self.stem = nn.Embedding(13, width)
        self.layers = nn.ModuleList([Block(width), Block(width)])
        self.norm = nn.LayerNorm(width)


class Lora(nn.Module):
    """A layer whose base is frozen, with an adapter of rank 2: 4 * width numbers are trained, width**2 + width are not."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.base = nn.Linear(width, width).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, width) * 0.1), nn.Parameter(torch.randn(width, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.relu(self.base(x) + x @ self.a.t() @ self.b.t())


class Adapted(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.input = Values(shape=(5, width))
        self.stem = nn.Linear(width, width)
        self.layers = nn.ModuleList([Lora(width), Lora(width)])


class ByValue(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else super().forward(x)


def signal(layers: int = 2, width: int = 8) -> nn.Module:
    return Signal(layers, width)


def adapted() -> nn.Module:
    return Adapted()


def adapted_pair() -> dict[str, nn.Module]:
    return {"left": Adapted(), "right": Adapted(8)}


def frozen_stem() -> nn.Module:
    model = Signal(layers=2)
    model.stem.requires_grad_(False)
    return model


def lower_half() -> nn.Module:
    """Stem, the first two of five layers, and the fourth are frozen."""
    model = Signal(layers=5)
    for part in (model.stem, *model.layers[:2], model.layers[3]):
        part.requires_grad_(False)
    return model


def all_frozen() -> nn.Module:
    return Signal(layers=3).requires_grad_(False)


def words() -> nn.Module:
    return Words()


def pair() -> dict[str, nn.Module]:
    return {"signal": Signal(), "text": Words()}


def three() -> dict[str, nn.Module]:
    return {"signal": Signal(), "text": Words(), "other": Signal(layers=1)}


def raises() -> nn.Module:
    raise OSError("weights.bin is not there")


def half() -> nn.Module:
    return Signal().half()


def elsewhere() -> nn.Module:
    return Signal().to("meta")


def by_value() -> nn.Module:
    model = Signal()
    model.layers[1] = ByValue(8)
    return model


class Pictures(nn.Module):
    """Average pools that overlap have no gradient on the engines."""

    def __init__(self) -> None:
        super().__init__()
        self.input = Image(channels=2, height=8, width=8)
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.layers = nn.ModuleList([nn.Sequential(nn.Conv2d(4, 4, 1), nn.AvgPool2d(3, 1, 1))])
        self.pool = Corner()


class Corner(nn.Module):
    """(batch, channels, height, width) -> (batch, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, 0, 0]


def overlapping_pools() -> nn.Module:
    return Pictures()


def widths_differ() -> nn.Module:
    model = Signal()
    model.layers[1] = Block(9)
    return model


def a_number() -> int:
    return 3


not_a_function = 7


def small_resnet() -> nn.Module:
    from timm.models.resnet import BasicBlock, ResNet

    from export.models.adapters import adapt

    return adapt(ResNet(BasicBlock, [1, 1, 1, 1], channels=(4, 6, 8, 8), stem_width=4, num_classes=3), size=32)


class MeanOfPixels(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


def narrow_then_wide() -> nn.Module:
    model = Pictures()
    model.layers = nn.ModuleList([nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 1)])
    model.pool = MeanOfPixels()
    return model
